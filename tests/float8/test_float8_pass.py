"""The pass float8: what it takes, what it leaves, what it says, and that nothing wrong is proved."""

import pytest
import torch
from torch import nn

import ftc
from ftc.errors import FtcError, FtcFailure

IDS = torch.randint(128, (2, 16), generator=torch.Generator().manual_seed(0))
EXAMPLE = {"input_ids": IDS[:, :9]}


def decoder(name: str = "tiny", **changes) -> nn.Module:
    from ftc.models.decoder import Decoder
    from ftc.models.presets import preset

    torch.manual_seed(1)
    return Decoder(preset(name, vocab_size=128, num_hidden_layers=1, **changes))


def applied(program) -> dict:
    return program._applied[-1]


def notes(program) -> str:
    return "\n".join(line for lines in applied(program)["notes"].values() for line in lines)


def test_every_product_gets_a_decision_and_head_and_router_stay():
    program = ftc.rewrite(decoder("tiny-moe"), ["raise", ("float8", {"recipe": "fine"})], example=EXAMPLE)
    assert applied(program)["matches"] == 5  # q, k, v, o and the experts
    said = notes(program)
    assert "the router stays" in said and "the head stays" in said and "experts as grouped products" in said
    assert said in str(program.report).replace("float8: layers.0: ", "").replace("float8: shell: ", "")
    source = program.regions[0].graph_code()
    assert "float8_moe" in source and source.count("aten.linear.default") == 1  # the router


@pytest.mark.parametrize("option", ["head", "router"])
def test_head_and_router_run_in_float8_where_asked_for(option):
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "head_dim": 16}
    model = decoder(**sizes) if option == "head" else decoder("tiny-moe")
    if option == "router":  # 8 experts are no multiple of 16
        with pytest.raises(FtcError, match="multiples of 16, not 8"):
            ftc.rewrite(model, ["raise", ("float8", {option: True, "expect": "all"})], example=EXAMPLE, check=False)
        return
    program = ftc.rewrite(model, [("float8", {option: True})], example=EXAMPLE, check=False)
    assert applied(program)["matches"] == 8 and "stays" not in notes(program)


def test_sizes_that_float8_cannot_take_are_told_and_an_error_where_all_are_wanted():
    model = decoder(intermediate_size=88)
    program = ftc.rewrite(model, ["float8"], example=EXAMPLE, check=False)
    assert applied(program)["matches"] == 4 and "multiples of 16, not 88" in notes(program)
    assert {miss["anchor"] for miss in applied(program)["misses"]} == {f"mlp.{n}_proj.weight" for n in ("gate", "up", "down")}
    with pytest.raises(FtcError, match="not 88"):
        ftc.rewrite(model, [("float8", {"expect": "all"})], example=EXAMPLE, check=False)
    assert applied(ftc.rewrite(model, [("float8", {"recipe": "fine", "expect": "all"})], example=EXAMPLE, check=False))["matches"] == 7


def test_small_products_stay_by_rule():
    program = ftc.rewrite(decoder(), [("float8", {"min_n": 64})], example=EXAMPLE, check=False)
    assert applied(program)["matches"] == 5 and notes(program).count("32 is less than min_n = 64") == 2  # k and v
    with pytest.raises(FtcError, match="found no site"):
        ftc.rewrite(decoder(), [("float8", {"min_k": 10_000})], example=EXAMPLE, check=False)


def test_measured_products_go_where_they_are_faster(monkeypatch):
    import ftc.float8.decide as decide

    monkeypatch.setattr(decide, "measured", lambda tokens, k, n, *rest: (2.0, 1.0) if n == 176 else (1.0, 2.0))
    program = ftc.rewrite(decoder(), [("float8", {"measure": 256})], example=EXAMPLE, check=False)
    assert {m["detail"]["weight"] for m in applied(program)["sites"]["layers.0"]["matches"]} == {"mlp.gate_proj.weight", "mlp.up_proj.weight"}
    assert "2 ms in float32, 1 ms in float8, 256 tokens" in notes(program) and "1 ms in float32, 2 ms in float8" in notes(program)


def test_both_ways_are_timed():
    from ftc.float8.decide import measured

    assert all(ms > 0 for ms in measured(16, 32, 32, torch.float32, "cpu", "rowwise", "auto"))


class Spelled(nn.Module):
    """Products that are not spelled as aten.linear."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.bias = (nn.Parameter(torch.randn(*s) / 6) for s in ((32, 48), (16, 48), (48,)))

    def forward(self, x):
        h = torch.relu(torch.addmm(self.bias, x, self.first))
        return x + torch.matmul(h, self.second.t()).repeat(1, 2)


def test_other_spellings_of_a_product_are_found():
    model, x = Spelled(), torch.randn(32, 32)
    program = ftc.rewrite(model, [("float8", {"recipe": "tensorwise"})], example=(x,))
    assert applied(program)["matches"] == 2
    wanted, found = model(x), program(x)
    assert 0 < float((wanted - found).detach().norm()) < 0.1 * float(wanted.detach().norm())
    found.sum().backward()
    assert all(p.grad is not None for p in program.parameters())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"recipe": "rowise"}, "rowwise"), ({"save": "bfloat16"}, "exact"), ({"min_k": 0}, "min_k = 0"), ({"measure": -1}, "measure = -1"),
        ({"recipe": "fine", "products": "emulated"}, "kernels of its own"), ({"recip": "fine"}, "recipe"),
    ],
)  # fmt: skip
def test_options_that_are_not_valid_are_named(options, words):
    with pytest.raises(FtcError, match=words):
        ftc.rewrite(decoder(), [("float8", options)], example=EXAMPLE)


def test_a_certificate_holds_both_parts_and_can_be_run_again(tmp_path):
    program = ftc.rewrite(decoder(), ["raise-norm", ("float8", {"save": "exact"})], example=EXAMPLE)
    (certificate,) = applied(program)["certificates"]
    exact = [t for t in certificate["trials"] if t["lifted"]]
    (lossy,) = [t for t in certificate["trials"] if "metric" in t]
    assert len(exact) == 2 and max(t["output_error"] for t in exact) <= 1e-12
    assert 0.01 < lossy["output_error"] < lossy["bound"] and 0.01 < lossy["gradient_error"] < lossy["bound"]
    program.save(tmp_path / "p")
    assert ftc.verify(tmp_path / "p").ok
    assert torch.equal(ftc.load(tmp_path / "p")(input_ids=IDS), program(input_ids=IDS))


@pytest.mark.parametrize("sabotage", ["another weight", "a scale twice", "a gradient lost"])
def test_a_sabotaged_product_is_not_proved(monkeypatch, sabotage):
    import ftc.float8.place as place
    import ftc.float8.schemes as schemes

    if sabotage == "another weight":
        plain = place._place_group

        def swapped(graph, x, group, how):
            group = [group[1], group[0], *group[2:]] if len(group) == 2 else group
            nodes = [site.node for site in group][::-1] if len(group) == 2 else [site.node for site in group]
            import dataclasses

            plain(graph, x, [dataclasses.replace(site, node=node) for site, node in zip(group, nodes, strict=True)], how)

        monkeypatch.setattr(place, "_place_group", swapped)
    elif sabotage == "a scale twice":
        plain_multiply = schemes.multiply
        monkeypatch.setattr(schemes, "multiply", lambda *a: plain_multiply(*a) * 2)
    else:
        plain_both = schemes.ByScale.dx_and_dw
        monkeypatch.setattr(schemes.ByScale, "dx_and_dw", lambda self, *a: (plain_both(self, *a)[0], torch.zeros_like(plain_both(self, *a)[1])))
    with pytest.raises(FtcFailure, match="does not keep its contract"):
        ftc.rewrite(decoder(), ["float8"], example=EXAMPLE)


def test_it_runs_after_other_passes_in_eval_and_recomputed():
    from torch.utils.checkpoint import checkpoint

    program = ftc.rewrite(decoder(), ["fuse-qkv", "fuse-gate-up", ("float8", {"save": "float8"})], example=EXAMPLE, check=False)
    program.train()
    logits = program(input_ids=IDS)
    logits.square().sum().backward()
    grads = {n: p.grad.clone() for n, p in program.named_parameters()}
    program.zero_grad()
    for region in program.regions:
        region.around = lambda run, args, kwargs: checkpoint(run, *args, use_reentrant=False, **kwargs)
    program(input_ids=IDS).square().sum().backward()
    assert all(torch.equal(grads[n], p.grad) for n, p in program.named_parameters())
    program.eval()
    with torch.no_grad():
        assert torch.equal(program(input_ids=IDS), logits.detach())


def test_a_second_time_everything_is_there_already():
    program = ftc.rewrite(decoder(), ["float8"], example=EXAMPLE, check=False)
    again = ftc.rewrite(program, ["float8"], check=False)
    assert applied(again)["matches"] == 0 and applied(again)["already"] == 4  # q, k, v as one; o; gate and up as one; down
