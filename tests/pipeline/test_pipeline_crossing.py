"""No choice of what is computed before a cut sends less across it."""

import itertools
import operator

import torch
from hypothesis import given
from hypothesis import strategies as st
from pipeline_odd import VOCABULARY, Odd
from torch import fx

import ftc
from ftc.pipeline import cut
from ftc.pipeline.cut_cheapest import MESSAGE_BYTES
from ftc.pipeline.cut_graph import cut_graph

BLOCK = MESSAGE_BYTES // 4  # float32 numbers: a tensor of this many costs two messages, with its own


def random_graph(draw: st.DataObject) -> tuple[fx.Graph, list[fx.Node]]:
    """Two regions, some results of the first, some nodes between, and a second region that takes any of them; the nodes between."""
    graph = fx.Graph()
    values = []

    def made(node: fx.Node, blocks: int) -> fx.Node:
        node.meta["val"] = torch.empty(blocks * BLOCK, device="meta")
        values.append(node)
        return node

    first = graph.call_module("first", ())
    for number in range(draw.draw(st.integers(1, 3))):
        made(graph.call_function(operator.getitem, (first, number)), draw.draw(st.integers(0, 4)))
    results = len(values)
    for _ in range(draw.draw(st.integers(0, 6))):
        operands = draw.draw(st.lists(st.sampled_from(values), min_size=1, max_size=3, unique=True))
        made(graph.call_function(torch.add, tuple(operands)), draw.draw(st.integers(0, 4)))
    taken = draw.draw(st.lists(st.sampled_from(values), min_size=1, max_size=3, unique=True))
    last = graph.call_module("second", tuple(taken))
    last.meta["val"] = torch.empty(1, device="meta")
    graph.output([last, *draw.draw(st.lists(st.sampled_from(values), max_size=2, unique=True))])
    graph.eliminate_dead_code(is_impure_node=lambda n: n.op in ("call_module", "output"))
    alive = set(graph.nodes)
    return graph, [node for node in values[results:] if node in alive]


def cost(graph: fx.Graph, before: set[fx.Node]) -> int:
    """What crosses where the first region, its results and `before` stand before the cut; more than everything where that cannot be."""
    held = before | {n for n in graph.nodes if n.target in ("first", operator.getitem)}
    if any(parent not in held for node in before for parent in node.all_input_nodes):
        return 1 << 40
    crossing = [n for n in held if "val" in n.meta and any(user not in held for user in n.users)]
    return sum(node.meta["val"].numel() * 4 + MESSAGE_BYTES for node in crossing)


@given(draw=st.data())
def test_no_other_choice_sends_less(draw):
    graph, between = random_graph(draw)
    first, second = cut_graph(graph, {"first": 0, "second": 1}, 2, ())
    found = sum(value.numel() * 4 + MESSAGE_BYTES for value in first.gives_values)
    subsets = itertools.chain.from_iterable(itertools.combinations(between, size) for size in range(len(between) + 1))
    costs: dict[int, int] = {}
    for subset in subsets:
        costs[len(subset)] = min(costs.get(len(subset), 1 << 40), cost(graph, set(subset)))
    assert found == min(costs.values())
    moved = sum(node.target is torch.add for node in first.graph.nodes)
    assert moved == min(size for size, value in costs.items() if value == found)  # nothing moves without a gain
    assert second.takes == first.gives


def test_statistics_cross_as_their_sum_and_slices_as_what_is_left_of_them():
    ids = torch.randint(VOCABULARY, (2, 5), generator=torch.Generator().manual_seed(0))
    stages = cut(ftc.capture(Odd(), {"ids": ids}), (2, 3))
    first, middle = (stage.examples({"ids": ids})[1] for stage in stages[:2])
    assert [len(first), len(middle)] == [4, 4]  # hidden states, the first embedding, the sum, what later blocks get
    last_slice = middle[-1]
    assert last_slice.shape == (2, 5, 8)  # of the values for four blocks [2, 5, 4, 8] the one that is left


def test_the_same_program_is_cut_alike_each_time():
    draws = [cut(ftc.capture(Odd(), {"ids": torch.zeros(2, 5, dtype=torch.long)}), (1, 3)) for _ in range(2)]
    given = {"ids": torch.zeros(2, 5, dtype=torch.long)}
    assert [s.body.piece(given).gives for s in draws[0]] == [s.body.piece(given).gives for s in draws[1]]
