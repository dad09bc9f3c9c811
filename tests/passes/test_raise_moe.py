"""raise-moe: every spelling of a mixture of experts is one operator, proved equal; what is not quite a mixture stays as it is."""

import itertools

import pytest
import torch
from blocks import calls, copied, export
from ftc.passes.raise_moe import MOE, RaiseMoe
from mixtures import (
    EXPERTS,
    LAYOUTS,
    LOOPS,
    ROUTERS,
    STACKED,
    WRONG,
    B,
    D,
    E,
    Mixture,
    Stacked,
    T,
    every_expert,
    gathered_bmm,
    loop_with_index_add,
    loop_with_mask,
    softmax_topk,
    stacked_loop,
    weighed_input,
)
from torch import fx, nn

import ftc
from ftc.rewrite import probe
from ftc.rewrite.lens import Compose, lens_from_dict
from ftc.rewrite.residue import residue


def raised(module: nn.Module) -> tuple[fx.Graph, fx.Graph, object]:
    """The module's graph, the graph after the pass, and what the pass says."""
    torch.manual_seed(0)
    graph = export(module, torch.randn(B, T, D))
    before = copied(graph)
    return before, graph, RaiseMoe().apply(graph)


def error_through(before: fx.Graph, after: fx.Graph, lenses, pulled_back: bool = False) -> float:
    """The largest error of outputs, and of gradients of inputs and original parameters through the lenses, at all probed sizes: through their
    `pull_back` where asked for, else by autograd through the lenses themselves."""
    worst, lens = 0.0, Compose(tuple(lenses))
    for sizes, seed in itertools.product(probe.symbol_sizes(before), (5, 6)):
        inputs = [x.requires_grad_() for x in probe.random_inputs(before, sizes, seed, torch.float64)]
        parameters = {n: p.requires_grad_(p.is_floating_point()) for n, p in probe.random_parameters(before, seed, dtype=torch.float64).items()}
        leaves = [*inputs, *(p for p in parameters.values() if p.is_floating_point())]
        moved = lens.forward(parameters)
        if pulled_back:
            moved = {name: value.detach().requires_grad_() for name, value in moved.items()}
        results = [probe.run(before, inputs, parameters), probe.run(after, inputs, moved)]
        along = [torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(3)) for out in results[0]]
        gradients = [list(torch.autograd.grad(results[0], leaves, along, allow_unused=True, materialize_grads=True))]
        behind = [*inputs, *moved.values()] if pulled_back else leaves
        found = torch.autograd.grad(results[1], behind, along, allow_unused=True, materialize_grads=True)
        if pulled_back:
            names = dict(zip(moved, found[len(inputs) :], strict=True))
            found = [*found[: len(inputs)], *(lens.pull_back(names)[name] for name, p in parameters.items() if p.is_floating_point())]
        gradients.append(list(found))
        worst = max([worst, *(probe.relative_error(b, a) for a, b in zip(*results, strict=True))])
        scale = float(max(g.abs().max() for g in gradients[0]))
        worst = max([worst, *(probe.relative_error(b, a, scale) for a, b in zip(*gradients, strict=True))])
    return worst


def check_raised(module: nn.Module) -> tuple[fx.Node, object]:
    before, after, outcome = raised(module)
    assert len(outcome.matches) == 1 and not outcome.misses, outcome.misses
    (call,) = calls(after, MOE)
    assert tuple(call.args[3].meta["val"].shape)[0] == E and {leftover.kind for leftover in residue(after)} <= {"router"}
    assert error_through(before, after, outcome.lenses) <= 1e-12
    return call, outcome


@pytest.mark.parametrize("combine", LOOPS)
def test_experts_in_modules_are_stacked(combine):
    call, outcome = check_raised(Mixture(combine))
    assert call.kwargs == {"activation": "silu"} and {lens.target for lens in outcome.lenses} == {"experts.gate_up", "experts.down"}


@pytest.mark.parametrize("route", ROUTERS)
def test_routers_stay_as_they_are(route):
    call, _ = check_raised(Mixture(loop_with_index_add, route))
    assert call.args[2].meta["val"].shape[1] == 2


@pytest.mark.parametrize("kind", EXPERTS)
def test_activations_and_biases_are_found(kind):
    call, _ = check_raised(Mixture(loop_with_mask, kind=kind))
    assert call.kwargs["activation"] == {"gelu": "gelu", "plain bias": "relu"}.get(kind, "silu")
    assert (len(call.args) == 7) == ("bias" in kind)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("combine", [gathered_bmm, stacked_loop])
def test_stacked_experts_keep_or_change_their_layout(combine, layout):
    call, outcome = check_raised(Stacked(combine, layout=layout))
    assert bool(outcome.lenses) == (layout != "fused")
    assert call.kwargs["activation"] == ("clamped_swish" if layout == "interleaved" else "silu")


def test_a_weight_on_the_input_is_found_there():
    call, _ = check_raised(Stacked(weighed_input))
    assert call.kwargs["weight_on_input"] is True
    call, _ = check_raised(Stacked(every_expert))
    assert "weight_on_input" not in call.kwargs


@pytest.mark.slow
@pytest.mark.parametrize("route", ROUTERS)
@pytest.mark.parametrize("kind", EXPERTS)
@pytest.mark.parametrize("combine", LOOPS)
def test_every_spelling_with_every_router_and_expert(combine, kind, route):
    check_raised(Mixture(combine, route, kind))


@pytest.mark.slow
@pytest.mark.parametrize("route", ROUTERS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("combine", STACKED)
def test_every_stacked_spelling_with_every_router_and_layout(combine, layout, route):
    if combine is weighed_input and layout == "interleaved":
        pytest.skip("its gate gives something for zeros, so that experts that were not chosen add to the result")
    check_raised(Stacked(combine, route, layout))


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("combine", [loop_with_index_add, loop_with_mask])
def test_what_is_wrong_is_never_rewritten_into_something_else(combine, wrong):
    before, after, outcome = raised(Mixture(combine, wrong=wrong))
    assert error_through(before, after, outcome.lenses) <= 1e-12
    if wrong != "stale index":  # a choice that is handed on late may still be written as a mixture of that choice
        assert not outcome.matches and outcome.misses and "experts" in outcome.misses[0].reason
        assert [leftover.kind for leftover in residue(after) if leftover.kind == "moe"] == ["moe"]


def test_a_parameter_that_something_else_reads_is_declined():
    class Tied(Mixture):
        def forward(self, x):
            return super().forward(x) + self.experts[0].w2(x[..., :7])

    _, after, outcome = raised(Tied(loop_with_mask))
    assert not outcome.matches and not calls(after, MOE) and "read" in outcome.misses[0].reason


def test_dropout_between_the_matrices_is_declined_while_training():
    class Dropping(Mixture):
        def forward(self, x):
            rows = x.reshape(-1, D)
            weights, indices = self.route(self.router(rows))
            out = torch.zeros_like(rows)
            for e, expert in enumerate(self.experts):
                inner = nn.functional.dropout(nn.functional.silu(expert.w1(rows)) * expert.w3(rows), 0.5, self.training)
                out = out + expert.w2(inner) * (weights * (indices == e)).sum(-1, keepdim=True)
            return out.view_as(x)

    assert "dropout" in raised(Dropping(None).train())[2].misses[0].reason
    assert raised(Dropping(None).eval())[2].matches


def test_two_mixtures_in_one_block_are_both_raised():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = Mixture(loop_with_index_add), Stacked(gathered_bmm)

        def forward(self, x):
            return self.two(self.one(x))

    before, after, outcome = raised(Two())
    assert len(calls(after, MOE)) == 2 and not outcome.misses
    assert error_through(before, after, outcome.lenses) <= 1e-12


@pytest.mark.parametrize("module", [Mixture(loop_with_mask, kind="silu bias"), *(Stacked(gathered_bmm, layout=layout) for layout in LAYOUTS)])
def test_the_lens_gives_the_same_bits_back(module):
    _, _, outcome = raised(module)
    lens = Compose(tuple(lens_from_dict(lens.as_dict()) for lens in outcome.lenses))
    state = {name: value.detach() for name, value in module.state_dict().items()}
    back = lens.backward(lens.forward(state))
    assert back.keys() == state.keys() and all(torch.equal(back[name], state[name]) for name in state)
    moments = {name: torch.rand_like(value) for name, value in state.items()}
    first, second = lens.backward_moments(*lens.forward_moments(moments, moments))
    assert all(torch.equal(first[name], moments[name]) and torch.equal(second[name], moments[name]) for name in state)


def test_bfloat16_keeps_its_router_in_float32():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(Mixture(loop_with_index_add, softmax_topk) for _ in range(2))

        def forward(self, x):
            for layer in self.layers:
                x = layer(x)
            return x

    torch.manual_seed(0)
    model = Model().bfloat16()
    x = torch.randn(3, 4, D, dtype=torch.bfloat16)
    program = ftc.rewrite(model, ["raise-moe"], example=(torch.randn(B, T, D, dtype=torch.bfloat16),))
    torch.testing.assert_close(program(x), model(x), rtol=0.02, atol=0.02)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in program.original_state_dict().items())
