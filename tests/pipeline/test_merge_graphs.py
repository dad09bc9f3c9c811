"""Two graphs made one in one process: same bits as both run separately; names, parameters, random numbers and errors."""

import pytest
import torch
from ftc.models.decoder import Decoder
from ftc.models.presets import preset
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from merge_work import SLOW_LINK, equal, gradients, pair_alone_and_autograd
from torch.utils._pytree import tree_flatten

import ftc
from ftc.errors import FtcError
from ftc.pipeline import cut
from ftc.pipeline.communication import is_start, is_wait, lowered
from ftc.pipeline.interleave import interleave
from ftc.pipeline.interleave_costs import H100, Machine, measured, modelled
from ftc.pipeline.merge import merge, read_once
from ftc.pipeline.merge_module import trace_module
from ftc.pipeline.merge_split import merge_split, split_half
from ftc.pipeline.merge_trace import Slot, trace
from ftc.pipeline.overlapped import OverlappedPair, StageGraphs

SMALL = dict(vocab_size=61, hidden_size=32, head_dim=8)
MODELS = {
    "dense": lambda: Decoder(preset("tiny", intermediate_size=44, **SMALL)),
    "tied": lambda: Decoder(preset("tiny", intermediate_size=44, tie_word_embeddings=True, **SMALL)),
    "experts": lambda: Decoder(preset("tiny-moe", moe=dict(num_experts=4, top_k=2, intermediate_size=16), **SMALL)),
}


def program_of(name: str, passes: list = ()):
    torch.manual_seed(3)
    model, ids = MODELS[name](), torch.randint(0, 61, (2, 7))
    return ftc.rewrite(model, list(passes), example={"input_ids": ids, "labels": ids}, check=False)


def batch(seed: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(0, 61, (2, 8), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids[:, :-1].contiguous(), "labels": ids[:, 1:].contiguous()}


@pytest.mark.parametrize(("name", "passes"), [("dense", []), ("tied", []), ("experts", ["raise-moe"]), ("dense", ["raise", "fuse-qkv", "fuse-gate-up"])])
def test_stages_by_graph_give_the_bits_of_autograd(name, passes):
    """Two stages, two microbatches: F0 F0' | F1 with B0' in one graph | B0, and the same for the second stage."""
    program = program_of(name, passes)
    one, two = batch(1), batch(2)
    expected = {}
    for each in (two, one):
        program(**each).backward()
    expected, first, last = gradients(program), *cut(program, (1,))
    crossing = first(**one)
    front, back = StageGraphs(first, (), one), StageGraphs(last, tuple(x.detach() for x in crossing), one)
    inputs = lambda each: [each[n] for n in one]  # noqa: E731
    hidden, saved_two = front.forward(inputs(two))
    losses, saved = back.forward([*hidden, *inputs(two)])
    pair = OverlappedPair(front, back, machine=H100)
    hidden, saved_one, dx = pair.run(inputs(one), saved, [torch.ones(())])
    assert equal(hidden, [x.detach() for x in crossing]) and not saved
    front.backward(saved_two, dx)
    losses, saved = back.forward([*hidden, *inputs(one)])
    front.backward(saved_one, back.backward(saved, [torch.ones_like(losses[0])]))
    found = [gradients(stage.body) for stage in (first, last)]
    assert set().union(*found) == set(expected)
    for name in expected:
        held = [grads[name] for grads in found if name in grads]
        if len({id(g) for g in held}) > 1:  # each stage that holds a shared parameter has its own part of the sum
            torch.testing.assert_close(sum(held), expected[name], rtol=1e-5, atol=1e-7)
        else:
            assert torch.equal(held[0], expected[name]), name


def region_calls(program) -> list[tuple[tuple, dict]]:
    """What a call of the program calls each region with."""
    taken = []
    for region in program.regions:
        region.around = lambda run, args, kwargs: taken.append((args, kwargs)) or run(*args, **kwargs)
    with torch.no_grad():
        program(**batch(1))
    for region in program.regions:
        region.around = None
    return taken


@pytest.mark.parametrize("parts", [False, True])
def test_a_region_paired_with_itself(parts):
    program = program_of("dense")
    region, (args, kwargs) = program.regions[1], region_calls(program)[1]
    inputs = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)]
    graphs = StageGraphs(region, args, kwargs)
    assert graphs.trained_results == [0]
    results, saved = graphs.forward(inputs)
    assert torch.equal(results[0], region(*args, **kwargs))
    pair = OverlappedPair(graphs, graphs, machine=SLOW_LINK, parts=parts)
    results, _, dx = pair.run(inputs, saved, [torch.ones_like(results[0])])
    found = gradients(region)
    x = args[0].clone().requires_grad_()
    region(x, *args[1:], **kwargs).sum().backward()
    assert torch.equal(dx[0], x.grad)
    assert all(torch.equal(found[n], p.grad) for n, p in region.named_parameters())


@st.composite
def stages(draw):
    """A stage drawn at random: products, exchanges, norms, dropout-free nonlinearities, weights used twice or not trained."""
    steps = draw(st.lists(st.sampled_from(["product", "exchange", "again", "norm", "gate", "frozen"]), min_size=2, max_size=7))
    return ["product", *steps]


def stage_function(steps: list[str]):
    def function(weights, x, y):
        for number, step in enumerate(steps):
            if step in ("product", "frozen"):
                x = torch.tanh(x @ weights[f"{number}"])
            elif step == "again":
                x = x + x @ weights["0"]
            elif step == "exchange":
                x = torch.ops.ftc.synthetic_exchange(x, number % 3)
            elif step == "norm":
                x = torch.nn.functional.layer_norm(x, x.shape[-1:])
            else:
                x = x * torch.sigmoid(y)
        return [x, (x * y).transpose(0, 1)]

    return function


@settings(max_examples=12, phases=[Phase.explicit, Phase.generate])
@given(steps=stages(), seed=st.integers(0, 99), more=st.one_of(st.none(), st.integers(0, 4096)), parts=st.booleans(), rows=st.integers(1, 5))
def test_a_merged_graph_in_any_order_found_is_both_graphs_run_separately(steps, seed, more, parts, rows):
    import ftc.pipeline.synthetic_exchange  # noqa: F401 - registers the operator

    torch.manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, dtype=torch.float64)  # noqa: E731
    weights = {f"{i}": draw(4, 4).requires_grad_(s == "product") for i, s in enumerate(steps) if s in ("product", "frozen")}
    traced = trace(stage_function(steps), weights, [draw(rows, 4), draw(rows, 4)], [0, 1])
    forward, backward = lowered(traced.forward), lowered(traced.backward)
    own = {Slot("parameter", n): w.detach() for n, w in weights.items()}
    microbatches = [{Slot("input", i): draw(rows, 4) for i in range(2)} for _ in range(2)]
    saved = traced.forward(own | microbatches[1])
    given_back = own | saved | {Slot("gradient", 0): draw(rows, 4), Slot("gradient", 1): draw(4, rows)}
    expected = {("forward", s): v for s, v in traced.forward(own | microbatches[0]).items()}
    expected |= {("backward", s): v for s, v in traced.backward(given_back).items()}
    merged = merge_split(forward, backward, ("parameter",)) if parts else merge({"forward": forward, "backward": backward})
    found = interleave(merged, modelled(merged, SLOW_LINK), more)
    values = {p: own[p[1]] if p[0] is None else (microbatches[0] if p[0] == "forward" else given_back)[p[1]] for p in merged.inputs}
    results = found.graph(values)
    assert set(results) == set(expected)
    assert all(torch.equal(results[place], expected[place]) for place in expected)
    starts = [n for n in found.graph.graph.nodes if is_start(n)]
    assert len(starts) == len([n for n in found.graph.graph.nodes if is_wait(n)])
    assert not any(n.target is torch.ops.ftc.synthetic_exchange.default for n in found.graph.graph.nodes)
    assert len(starts) >= 2 * steps.count("exchange") - 1  # the gradient behind the last may be none of the first stage's business


def test_random_numbers_come_as_forward_then_backward_draws_them():
    """Dropout in both halves (the backward draws again): one generator, the order of concatenation, whatever the order found."""

    def function(weights, x):
        y = torch.ops.ftc.synthetic_exchange(torch.dropout(x @ weights["a"], 0.5, True), 2)
        return [torch.dropout(y @ weights["b"], 0.5, True)]

    weights = {n: torch.randn(8, 8, requires_grad=True) for n in "ab"}
    x = torch.randn(5, 8)
    traced = trace(function, weights, [x], [0])
    merged = merge({"one": lowered(traced.forward), "two": lowered(traced.forward)})
    found = interleave(merged, modelled(merged, SLOW_LINK), None)
    assert found.found.interleaved.exposed < found.found.concatenated.exposed
    own = {Slot("parameter", n): w.detach() for n, w in weights.items()} | {Slot("input", 0): x}
    torch.manual_seed(0)
    expected = [traced.forward(own), traced.forward(own)]
    torch.manual_seed(0)
    results = found.graph({place: own[place[1]] for place in merged.inputs})
    for lane, values in zip(("one", "two"), expected, strict=True):
        assert all(torch.equal(results[lane, slot], value) for slot, value in values.items())


def test_views_of_parameters_are_made_again_and_not_kept():
    weight = torch.randn(6, 4, requires_grad=True)
    traced = trace(lambda w, x: [torch.tanh(x @ w["w"].t()) @ w["w"]], {"w": weight}, [torch.randn(3, 4)], [0])
    shapes = [node.meta["val"].shape for slot, node in zip(traced.forward.outputs, traced.forward.results(), strict=True) if slot.kind == "saved"]
    assert torch.Size([4, 6]) not in shapes and torch.Size([6, 4]) not in shapes
    assert Slot("parameter", "w") in traced.backward.inputs


def test_shared_inputs_go_in_once_and_what_follows_from_them_is_made_once():
    weight = torch.randn(4, 4, dtype=torch.float64)
    traced = trace(lambda w, x: [x @ w["w"].to(torch.float32).t()], {"w": weight.requires_grad_()}, [torch.randn(3, 4)], [0])
    merged = merge({"a": traced.forward, "b": traced.forward})
    assert [place for place in merged.inputs if place[0] is None] == [(None, Slot("parameter", "w"))]
    before = len(merged.graph.nodes)
    assert read_once(merged) == 2 == before - len(merged.graph.nodes)  # the cast and its transpose
    given = {(None, Slot("parameter", "w")): weight.detach()} | {(lane, Slot("input", 0)): torch.full((3, 4), float(i)) for i, lane in enumerate("ab")}
    results = merged(given)
    for i, lane in enumerate("ab"):
        assert torch.equal(results[lane, Slot("result", 0)], torch.full((3, 4), float(i)) @ weight.detach().float().t())


def test_parameters_of_one_name_that_are_two_tensors_stay_two():
    program = program_of("dense")
    graphs = [StageGraphs(region, *call) for region, call in zip(program.regions, region_calls(program), strict=True)]
    pair = OverlappedPair(*graphs, machine=H100)
    names = [slot for lane, slot in pair.merged.inputs if lane is None]
    read = sum(slot.kind == "parameter" for slot in graphs[1].traced.backward.inputs)
    assert len(names) == len({*names}) and sum("(backward)" in str(slot.key) for slot in names) == read > 0


def test_links_that_do_not_fit_are_errors():
    traced = trace(lambda w, x: [x @ w["w"]], {"w": torch.randn(4, 4, requires_grad=True)}, [torch.randn(3, 4)], [0])
    with pytest.raises(FtcError, match="input 0 of lane 'b' is linked to result 9 of 'a', which no earlier lane gives"):
        merge({"a": traced.forward, "b": traced.forward}, links={("b", Slot("input", 0)): ("a", Slot("result", 9))})
    with pytest.raises(FtcError, match="there is no input saved 5 in lane 'b' to link"):
        merge({"a": traced.forward, "b": traced.forward}, links={("b", Slot("saved", 5)): ("a", Slot("result", 0))})


def test_what_cannot_be_merged_is_an_error():
    weight = {"w": torch.randn(4, 4, requires_grad=True)}

    def writes(w, x):
        x.add_(1)
        return [x @ w["w"]]

    with pytest.raises(FtcError, match="changes its inputs in place"):
        trace(writes, weight, [torch.randn(3, 4)], [])
    with pytest.raises(FtcError, match="wants a gradient"):
        trace(lambda w, x: [x], {"w": weight["w"].detach()}, [torch.randn(3, 4)], [])
    one, two = (trace(lambda w, x: [x @ w["w"]], {"w": torch.randn(4, n, requires_grad=True)}, [torch.randn(3, 4)], [0]).forward for n in (4, 5))
    with pytest.raises(FtcError, match=r"parameter w is torch.float32 \[4, 4\] in one graph and torch.float32 \[4, 5\] in the other"):
        merge({"a": one, "b": two})
    with pytest.raises(FtcError, match="Machine.link_bytes_per_s is 0"):
        Machine(1.0, 1.0, 0)


def test_gradients_that_are_what_came_in_are_copied_before_they_are_added_to():
    """y = x + a + b: the gradient of both is that of y, which the schedule may use again."""
    weights = {n: torch.randn(3, 4, requires_grad=True) for n in "ab"}
    graphs = StageGraphs.of(trace(lambda w, x: [x + w["a"] + w["b"]], weights, [torch.randn(3, 4)], [0]), weights)
    gradient = torch.randn(3, 4)
    kept = gradient.clone()
    for _ in range(2):
        _, saved = graphs.forward([torch.randn(3, 4)])
        (dx,) = graphs.backward(saved, [gradient])
    assert torch.equal(gradient, kept) and torch.equal(dx, kept)
    assert all(torch.equal(w.grad, 2 * kept) for w in weights.values())


def test_sizes_that_only_data_tell_are_an_error_that_names_the_pass():
    with pytest.raises(FtcError, match="depend on data .*nonzero.* raise-moe"):
        trace_module(program_of("experts"), (), batch(1))


def test_a_stage_that_recomputes_is_refused():
    program = program_of("dense")
    program.regions[0].around = lambda run, args, kwargs: run(*args, **kwargs)
    with pytest.raises(FtcError, match="runs its forward in another way"):
        trace_module(program, (), batch(1))


def test_a_pair_takes_a_machine_or_costs():
    program = program_of("dense")
    graphs = StageGraphs(program, (), batch(1))
    with pytest.raises(FtcError, match="a machine, or a function"):
        OverlappedPair(graphs, graphs)


def test_measured_costs_name_every_node_that_takes_time():
    def function(weights, x):
        return [torch.ops.ftc.synthetic_exchange(x @ weights["w"], 20) @ weights["w"]]

    weights = {"w": torch.randn(16, 16, requires_grad=True)}
    traced = trace(function, weights, [torch.randn(4, 16)], [0])
    half = lowered(traced.forward)
    merged = merge({"forward": half})
    costs = measured(merged, {(None, Slot("parameter", "w")): weights["w"].detach(), ("forward", Slot("input", 0)): torch.randn(4, 16)}, rounds=2)
    for node in merged.graph.nodes:
        if is_start(node):
            assert costs[node] >= 0.02  # it sleeps as long
        elif node.target is torch.ops.aten.mm.default:
            assert costs[node] > 0
        else:
            assert costs[node] == 0


def test_a_split_half_hands_over_what_its_other_half_needs():
    traced = trace(lambda w, x: [torch.tanh(x @ w["a"]) @ w["b"]], {n: torch.randn(4, 4, requires_grad=True) for n in "ab"}, [torch.randn(3, 4)], [0])
    first, second = split_half(traced.backward)
    assert [slot.kind for slot in first.outputs if slot.kind != "handed"] == ["input gradient"]
    assert {slot.key for slot in second.outputs} == {"a", "b"}
    assert [slot for slot in second.inputs if slot.kind == "handed"] == [slot for slot in first.outputs if slot.kind == "handed"] != []


def test_a_whole_program_with_itself():
    program = program_of("dense")
    found, pair = pair_alone_and_autograd(program, [], [], batch(1), ())
    assert all(found.values()), found
    assert pair.interleaved.found.way == "concatenated"  # without communication there is nothing to gain
