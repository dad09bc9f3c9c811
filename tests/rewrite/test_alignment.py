"""What a pass that sees calls leaves undeclared is refused."""

import pytest
import torch
from torch import fx

from ftc.capture.results import add_results, drop_results, extras, name_result, pruned
from ftc.capture.trace import World
from ftc.errors import FtcFailure
from ftc.rewrite.alignment import align

aten = torch.ops.aten


def shell(blocks=("a", "b"), extra=False, plain=None) -> fx.Graph:
    """input -> each block in turn -> relu; with `extra` the last block's result is an output too."""
    world, graph = World.new(), fx.Graph()
    fake = world.fake([2, 3], torch.float32, "cpu")

    def valued(node):
        node.meta["val"] = fake
        return node

    node = valued(graph.placeholder("x"))
    for block in blocks:
        node = valued(graph.create_node("call_module", block, (node, plain)))
    out = valued(graph.call_function(aten.relu.default, (node,)))
    graph.output([out, node] if extra else [out])
    return graph


def test_equal_shells_pair_everything():
    pair = align(shell(), shell())
    assert pair.inputs == [0, 1, 2] and pair.kept_before == pair.kept_after == [0, 1, 2]


def test_what_is_new_is_not_compared_and_all_else_is():
    pair = align(shell(("a",)), shell(("a", "n"), extra=True), added=["n"])
    assert pair.inputs == [0, 1, None] and list(zip(pair.kept_before, pair.kept_after, strict=True)) == [(0, 0), (1, 2)]
    back = align(shell(("a", "n"), extra=True), shell(("a",)), dropped=[1], gone=["n"])
    assert back.inputs == [0, 1] and list(zip(back.kept_before, back.kept_after, strict=True)) == [(0, 0), (2, 1)]


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        (shell(("a",)), shell(("a", "n")), "adds a call of n"),
        (shell(("a", "b")), shell(("a",)), "removes a call of b"),
        (shell(("a",)), shell(("a", "a")), "called 2 times"),
        (shell(plain=None), shell(plain=3), "with other arguments"),
        (shell(extra=True), shell(), "gives 1 outputs where 2 were kept"),
    ],
)
def test_undeclared_changes_are_refused(before, after, message):
    with pytest.raises(FtcFailure, match=message):
        align(before, after)


def test_named_results_follow_when_others_go():
    graph = shell(extra=True)
    node = next(n for n in graph.nodes if n.op == "placeholder")
    assert add_results(graph, {"one": node, "two": node}) == {"one": 2, "two": 3}
    name_result(graph, "first", 0)
    drop_results(graph, [1, 2])
    assert extras(graph) == {"two": 1, "first": 0}
    small, places = pruned(graph, [1])
    assert [n.op for n in small.nodes] == ["placeholder", "output"] and places == {1: 0}
    assert pruned(graph, [0, 1])[0] is graph
