"""upcycle: a gated MLP becomes experts that are its copies, with the same function; what is not quite a gated MLP stays."""

import pytest
import torch
import torch.nn.functional as F
from blocks import B, D, T, calls, copied, export
from ftc.passes.raise_mlp import RaiseMlp
from ftc.passes.upcycle import MOE, UpcycleMlp
from test_raise_moe import error_through
from torch import nn

import ftc
from ftc.rewrite.lens import Compose, lens_from_dict
from ftc.rewrite.lens_upcycle import Upcycle

MIDDLE = 12


class Mlp(nn.Module):
    def __init__(self, bias: bool = False, act=F.silu):
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(D, MIDDLE, bias), nn.Linear(D, MIDDLE, bias)
        self.down_proj, self.act = nn.Linear(MIDDLE, D, bias), act

    def forward(self, x):
        return x + self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))


def upcycled(module: nn.Module, **options):
    torch.manual_seed(0)
    graph = export(module, torch.randn(B, T, D))
    RaiseMlp().apply(graph)
    before = copied(graph)
    return before, graph, UpcycleMlp(**options).apply(graph)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("options", [{"experts": 4}, {"experts": 6, "top_k": 3}, {"experts": 8, "top_k": 4, "granularity": 2}, {"experts": 8, "top_k": 8, "granularity": 4}])
def test_copies_compute_what_the_mlp_does(options, bias):
    before, after, outcome = upcycled(Mlp(bias, F.gelu), **options)
    (call,) = calls(after, MOE)
    assert len(outcome.matches) == 1 and not outcome.misses and call.kwargs["activation"] == "gelu"
    assert tuple(call.args[4].meta["val"].shape) == (options["experts"], D, MIDDLE // options.get("granularity", 1))
    assert error_through(before, after, outcome.lenses, pulled_back=True) <= 1e-12


def test_drop_draws_its_share_of_each_expert_anew_and_the_same_places_everywhere():
    torch.manual_seed(0)
    module = Mlp()
    _, _, outcome = upcycled(module, experts=4, drop=0.25)
    state = {name: value.detach() for name, value in module.state_dict().items()}
    made = Compose(tuple(lens_from_dict(lens.as_dict()) for lens in outcome.lenses)).forward(state)
    gate_up, down = (made[name] for name in sorted(made, reverse=True) if name.endswith(("gate_up", "down")))
    gate, up = gate_up.chunk(2, 1)
    same = [(gate == state["gate_proj.weight"]).all(2), (up == state["up_proj.weight"]).all(2), (down == state["down_proj.weight"]).all(1)]
    assert all(torch.equal(places, same[0]) for places in same) and same[0].sum(1).tolist() == [9] * 4
    assert len({tuple(places.tolist()) for places in same[0]}) > 1


def test_the_way_back_is_the_mean_of_the_copies():
    torch.manual_seed(0)
    weight = torch.randn(6, 5)
    lens = Upcycle(("w",), "experts", 4, 2)
    there = lens.forward({"w": weight})
    assert there["experts"].shape == (4, 3, 5) and torch.equal(there["experts"][1], weight[:3]) and torch.equal(there["experts"][2], weight[3:])
    torch.testing.assert_close(lens.backward(there)["w"], weight)
    there["experts"][0] += 1
    torch.testing.assert_close(lens.backward(there)["w"][:3], weight[:3] + 0.5)


BAD = [
    ({"experts": 1}, "no mixture"),
    ({"experts": 4, "top_k": 5}, "more than experts = 4"),
    ({"experts": 4, "granularity": 3}, "does not divide"),
    ({"experts": 8, "top_k": 2, "granularity": 2}, "never be trained"),
    ({"experts": 4, "drop": 1.0}, "below 1"),
    ({"experts": 4, "router_scale": 0.0}, "more than 0"),
]


@pytest.mark.parametrize(("options", "words"), BAD)
def test_options_that_make_no_mixture_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        UpcycleMlp(**options)


def test_near_misses_are_declined_and_named():
    class Shared(Mlp):
        def forward(self, x):
            return super().forward(x) + self.gate_proj(x).sum(-1, keepdim=True)

    class Used(Mlp):
        def forward(self, x):
            middle = self.act(self.gate_proj(x)) * self.up_proj(x)
            return x + self.down_proj(middle) + middle.mean(-1, keepdim=True)

    class Apart(Mlp):
        def forward(self, x):
            return x + self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x + 1))

    for module, words in ((Shared(), "alone"), (Used(), "elsewhere"), (Apart(), "different tensors")):
        _, after, outcome = upcycled(module, experts=4)
        assert not outcome.matches and not calls(after, MOE) and words in outcome.misses[0].reason
    _, _, outcome = upcycled(Mlp(), experts=10, top_k=10, granularity=5)
    assert "cannot be cut into granularity = 5 parts" in outcome.misses[0].reason


def test_a_model_keeps_its_logits_and_trains_on_as_a_mixture(tmp_path):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(Mlp() for _ in range(2))

        def forward(self, x):
            for layer in self.layers:
                x = layer(x)
            return x

    torch.manual_seed(0)
    model, x = Model(), torch.randn(3, 5, D)
    program = ftc.rewrite(model, [("upcycle", {"experts": 4}), "fuse-moe", ("balance", {"switch": 0.01})], example=(torch.randn(B, T, D),))
    torch.testing.assert_close(program(x), model(x), rtol=1e-5, atol=1e-6)
    optimizer = torch.optim.AdamW(program.parameters(), lr=0.01)
    losses = []
    for _ in range(30):
        loss = (program(x) - x.flip(-1)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    assert losses[-1] < losses[0] / 2
    experts = dict(program.named_parameters())["layers.0.mlp.experts.gate_up"]
    assert not torch.allclose(experts[0], experts[1])  # the router tells the copies apart
    program.save(tmp_path / "program")
    torch.testing.assert_close(ftc.load(tmp_path / "program")(x), program(x))
