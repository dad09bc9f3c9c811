"""Orders of graphs: what `check_order` refuses, what must not overtake what, costs, and the words for an order."""

import operator
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from merge_work import SLOW_LINK
from torch import fx

import ftc.pipeline.synthetic_exchange  # noqa: F401 - registers the operator
from ftc.errors import FtcError
from ftc.pipeline.communication import is_start, is_wait, lowered, moved_bytes
from ftc.pipeline.interleave import interleave, problem_of
from ftc.pipeline.interleave_check import check_order
from ftc.pipeline.interleave_costs import H100, Machine, flops_of, modelled
from ftc.pipeline.interleave_effects import is_random, order_edges, written
from ftc.pipeline.merge import Merged, merge
from ftc.pipeline.merge_trace import Half, Slot, trace

aten = torch.ops.aten


def exchanging(weights, x):
    """Two products, an exchange behind each."""
    for name in weights:
        x = torch.ops.ftc.synthetic_exchange(torch.tanh(x @ weights[name]), 1)
    return [x]


def merged_pair(rows: int = 64) -> Merged:
    weights = {n: torch.randn(16, 16, requires_grad=True) for n in "ab"}
    traced = trace(exchanging, weights, [torch.randn(rows, 16)], [0])
    return merge({"forward": lowered(traced.forward), "backward": lowered(traced.backward)})


def work(merged: Merged) -> list[fx.Node]:
    return [node for node in merged.graph.nodes if node.op not in ("placeholder", "output")]


def moved(order: list[fx.Node], node: fx.Node, place: int) -> list[fx.Node]:
    rest = [n for n in order if n is not node]
    return [*rest[:place], node, *rest[place:]]


def test_a_wait_moved_behind_its_use_is_refused():
    merged = merged_pair()
    found = interleave(merged, modelled(merged, SLOW_LINK), None).graph
    order = work(found)
    check_order(found.graph, order)
    for wait in [n for n in order if is_wait(n)]:
        users = [u for u in wait.users if u.op != "output"]
        if users:
            last = max(order.index(u) for u in users)
            with pytest.raises(FtcError, match=f"reads {wait.name}, which the order runs later"):
                check_order(found.graph, moved(order, wait, last))
    for start in [n for n in order if is_start(n)]:
        wait = next(iter(start.users))
        with pytest.raises(FtcError, match=f"{wait.name} waits for {start.name}"):
            check_order(found.graph, moved(order, start, order.index(wait)))


@settings(max_examples=12)
@given(seed=st.integers(0, 10_000))
def test_a_shuffled_order_is_accepted_only_where_it_gives_the_same_bits(seed):
    """Nodes moved to random places: orders that `check_order` lets through run, and give what the graph gives; others break a dependency."""
    torch.manual_seed(0)
    merged = merged_pair(rows=3)
    rng, order = random.Random(seed), work(merged)
    values = {place: torch.randn(node.meta["val"].shape) for place, node in zip(merged.inputs, merged.graph.find_nodes(op="placeholder"), strict=True)}
    expected, accepted = merged(values), []
    for _ in range(25):
        changed = moved(order, rng.choice(order), rng.randrange(len(order)))
        place = {node: k for k, node in enumerate(changed)}
        right = all(place[o] < place[n] for n in changed for o in n.all_input_nodes if o in place)
        try:
            check_order(merged.graph, changed)
        except FtcError:
            assert not right
        else:
            assert right
            accepted += [changed] if changed != order else []
            order = changed
    assert accepted
    results = merged.in_order(order)(values)
    assert all(torch.equal(results[place], expected[place]) for place in expected)


def test_an_order_names_every_node_once():
    merged = merged_pair()
    order = work(merged)
    with pytest.raises(FtcError, match=f"missing: {order[3].name}, named twice or foreign: -1"):
        check_order(merged.graph, [*order[:3], *order[4:]])
    with pytest.raises(FtcError, match="missing: none, named twice or foreign: 1"):
        check_order(merged.graph, [*order, order[-1]])


def test_what_is_pending_is_read_by_waits_alone():
    merged = merged_pair()
    start = next(n for n in work(merged) if is_start(n))
    wait = next(iter(start.users))
    user = next(u for u in wait.users if u.op != "output")
    user.replace_input_with(wait, start)  # reads what may still be under way
    with pytest.raises(FtcError, match=f"{user.name} reads {start.name}, which is pending"):
        check_order(merged.graph)


def hand_made(build) -> Merged:
    """A graph of one lane by hand: `build(graph, x)` returns its output node."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta["val"] = torch.empty(4, 4, device="meta")
    out = build(graph, x)
    graph.output((out,))
    for node in graph.nodes:
        node.meta.setdefault("val", torch.empty(4, 4, device="meta"))
    return merge({"only": Half(graph, [Slot("input", 0)], [Slot("result", 0)])})


def test_writes_stay_behind_earlier_reads_and_before_later_ones():
    """y = x + 1; a = view(y) * 2; y.mul_(3) ; b = y + a: the product must not follow the write, which must not follow the sum."""

    def build(graph, x):
        y = graph.call_function(aten.add.Scalar, (x, 1))
        view = graph.call_function(aten.view.default, (y, [16]))
        a = graph.call_function(aten.mul.Scalar, (view, 2))
        graph.call_function(aten.mul_.Scalar, (y, 3))
        b = graph.call_function(aten.add.Scalar, (y, 0))
        return graph.call_function(aten.add.Tensor, (b, graph.call_function(aten.view.default, (a, [4, 4]))))

    merged = hand_made(build)
    y, view, a, write, b, *_ = work(merged)
    assert written(write) == [y]
    edges = order_edges(merged.graph)
    assert set(edges[write]) >= {a} and write in edges[b]
    check_order(merged.graph)
    with pytest.raises(FtcError, match="they write the same memory"):
        check_order(merged.graph, [y, view, write, a, *work(merged)[4:]])
    with pytest.raises(FtcError, match="they write the same memory"):
        order = work(merged)
        check_order(merged.graph, [y, view, a, b, write, *order[5:]])


def test_random_operators_keep_their_order_and_attention_without_dropout_is_none():
    def build(graph, x):
        one = graph.call_function(aten.rand_like.default, (x,))
        two = graph.call_function(aten.bernoulli.default, (x,))
        return graph.call_function(aten.add.Tensor, (one, two))

    merged = hand_made(build)
    one, two, total = work(merged)
    assert is_random(one) and is_random(two) and not is_random(total)
    with pytest.raises(FtcError, match="both draw random numbers"):
        check_order(merged.graph, [two, one, total])
    graph = fx.Graph()
    x = graph.placeholder("x")
    attend = aten._scaled_dot_product_flash_attention_for_cpu.default
    assert not is_random(graph.call_function(attend, (x, x, x, 0.0, True)))
    assert is_random(graph.call_function(attend, (x, x, x, 0.1, True)))
    assert not is_random(graph.call_function(attend, (x, x, x)))


def test_calls_of_unknown_effect_are_refused():
    merged = hand_made(lambda graph, x: graph.call_function(torch.tanh, (x,)))
    with pytest.raises(FtcError, match="whose effects are not known"):
        interleave(merged, modelled(merged, H100))


def test_memory_follows_storages_and_not_views():
    """x [given, owned] -> y -> view -> z: while z is made, y and z are there; x is free once y is made."""

    def build(graph, x):
        y = graph.call_function(aten.tanh.default, (x,))
        view = graph.call_function(aten.t.default, (y,))
        return graph.call_function(aten.tanh.default, (view,))

    merged = hand_made(build)
    for owned, peak in ((True, 2), (False, 3)):
        _, problem = problem_of(merged, modelled(merged, H100), lambda place, owned=owned: owned)
        assert problem.simulate(range(3)).peak_bytes == peak * 64


def test_several_results_are_memories_of_their_own():
    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta["val"] = torch.empty(4, 4, device="meta")
    both = graph.call_function(aten.topk.default, (x, 2))
    both.meta["val"] = torch.empty(4, 2, device="meta"), torch.empty(4, 2, dtype=torch.int64, device="meta")
    values, indices = (graph.call_function(operator.getitem, (both, i)) for i in range(2))
    used = graph.call_function(aten.tanh.default, (values,))
    graph.output((used, indices))
    for node, value in ((values, both.meta["val"][0]), (indices, both.meta["val"][1]), (used, both.meta["val"][0])):
        node.meta["val"] = value
    merged = merge({"only": Half(graph, [Slot("input", 0)], [Slot("result", 0), Slot("result", 1)])})
    _, problem = problem_of(merged, modelled(merged, H100), lambda place: True)
    assert sorted(s.size for s in problem.storages) == [32, 32, 64, 64]
    assert problem.simulate(range(4)).peak_bytes == 64 + 32 + 64  # x, and both results; then used beside indices, values going


def test_the_model_counts_products_bytes_and_transfers():
    graph = fx.Graph()
    a, b = graph.placeholder("a"), graph.placeholder("b")
    a.meta["val"], b.meta["val"] = torch.empty(8, 16, device="meta"), torch.empty(16, 32, device="meta")
    product = graph.call_function(aten.mm.default, (a, b))
    product.meta["val"] = torch.empty(8, 32, device="meta")
    view = graph.call_function(aten.t.default, (product,))
    view.meta["val"] = torch.empty(32, 8, device="meta")
    sent = graph.call_function(torch.ops.ftc.synthetic_start.default, (product, 1))
    reduced = graph.call_function(torch.ops._c10d_functional.all_reduce.default, (product, "sum", "ranks"))
    sent.meta["val"] = reduced.meta["val"] = product.meta["val"]
    assert flops_of(product) == 2 * 8 * 16 * 32
    machine = Machine(flops_per_s=1e6, memory_bytes_per_s=1e12, link_bytes_per_s=1e6, latency_s=1e-3, launch_s=0.5)
    assert machine.cost(product) == pytest.approx(2 * 8 * 16 * 32 / 1e6 + 0.5)
    assert machine.cost(view) == 0
    assert moved_bytes(reduced) == 2 * moved_bytes(sent) == 2 * 4 * 8 * 32
    assert machine.cost(sent) == pytest.approx(1e-3 + 4 * 8 * 32 / 1e6)


def test_the_words_for_an_order_name_lanes_and_transfers():
    merged = merged_pair()
    found = interleave(merged, modelled(merged, SLOW_LINK), None)
    text = found.text()
    assert text.count("starts synthetic_start") == 4 and text.count("on copies") == 4
    assert "forward" in text and "backward" in text and "bound" in text
