"""The matcher: patterns are functions, a mismatch names the node where graph and pattern part."""

import pytest
import torch
import torch.nn.functional as F

from ftc.capture.trace import World, trace
from ftc.rewrite.matcher import Mismatch, Pattern

aten = torch.ops.aten
SHAPES = {"x": (2, 3, 8), "a": (12, 8), "b": (12, 8)}


def graph_of(function, *shapes):
    world = World.new()
    fakes = [world.fake(shape, torch.float32, "cpu") for shape in shapes]
    return trace(lambda *tensors, tracer: [function(*tensors)], world, fakes).graph


def gate(x, a, b):
    return F.silu(F.linear(x, a)) * F.linear(x, b)


def test_a_pattern_matches_its_own_function_and_binds_its_arguments():
    graph = graph_of(gate, *SHAPES.values())
    found, misses = Pattern(gate, SHAPES).find(graph)
    assert len(found) == 1 and not misses
    assert [found[0].arguments[name].name for name in SHAPES] == [n.name for n in graph.nodes if n.op == "placeholder"]
    assert len(found[0].inner) == 3


def test_commuted_operands_match():
    graph = graph_of(lambda x, a, b: F.linear(x, b) * F.silu(F.linear(x, a)), *SHAPES.values())
    found, _ = Pattern(gate, SHAPES).find(graph)
    assert len(found) == 1


def test_two_sites_that_share_an_input_are_both_found():
    graph = graph_of(lambda x, a, b: gate(x, a, b) + gate(x, b, a), *SHAPES.values())
    found, _ = Pattern(gate, SHAPES).find(graph)
    assert len(found) == 2 and not (found[0].inner & found[1].inner)


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        (lambda x, a, b: F.gelu(F.linear(x, a)) * F.linear(x, b), "aten.silu.default was expected, aten.gelu.default found"),
        (lambda x, a, b: F.silu(F.linear(x, a)) * F.linear(x + 1, b), "stands elsewhere in the pattern"),
    ],
)
def test_a_near_miss_names_the_node_where_pattern_and_graph_part(other, reason):
    found, misses = Pattern(gate, SHAPES).find(graph_of(other, *SHAPES.values()))
    assert not found
    assert reason in misses[0].reason


def test_an_inner_node_with_another_user_is_no_match():
    def leaky(x, a, b):
        g = F.silu(F.linear(x, a))
        return g * F.linear(x, b) + g

    pattern, graph = Pattern(gate, SHAPES), graph_of(leaky, *SHAPES.values())
    anchor = next(node for node in graph.nodes if node.target is aten.mul.Tensor)
    with pytest.raises(Mismatch, match="used outside the pattern"):
        pattern.match_at(graph, anchor)


def test_constants_must_be_equal():
    def shifted(x):
        return torch.softmax(x * 0.5, -1)

    pattern = Pattern(shifted, {"x": (2, 8)})
    assert len(pattern.find(graph_of(shifted, (2, 8)))[0]) == 1
    found, misses = pattern.find(graph_of(lambda x: torch.softmax(x * 0.25, -1), (2, 8)))
    assert not found and "0.25 where the pattern has 0.5" in misses[0].reason


def test_several_results_match_together():
    def pair(x, a, b):
        return F.linear(x, a), F.linear(x, b)

    def both(x, a, b):
        return torch.cat([F.linear(x, a), F.linear(x, b)], -1)

    graph = graph_of(both, *SHAPES.values())
    first = next(node for node in graph.nodes if node.target is aten.linear.default)
    match = Pattern(pair, SHAPES).match_at(graph, first)
    assert len(set(match.results)) == 2
