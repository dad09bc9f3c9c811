"""A backward graph as two: gradients of inputs, and gradients of parameters from what the first hands over; and both as one lane of a merged graph."""

from __future__ import annotations

from collections.abc import Mapping

from torch import fx

from ftc.pipeline.merge import Merged, Place, merge
from ftc.pipeline.merge_trace import Half, Slot
from ftc.pipeline.weight_gradients import halve

INPUT, WEIGHTS = "input", "weights"


def split_half(backward: Half) -> tuple[Half, Half]:
    """(the half that gives the gradients of inputs, the half that gives those of parameters and shards), see `ftc.pipeline.weight_gradients`.

    The first also gives Slot("handed", i), which the second takes, beside those inputs of `backward` that it reads itself. `backward` stays as it is.
    """
    halves = halve(backward.graph, [slot.kind != "input gradient" for slot in backward.outputs])
    output = next(iter(halves.input.graph.find_nodes(op="output")))
    gradients, handed = output.args[0]
    own = [(node, slot) for node, slot in zip(gradients, backward.outputs, strict=True) if slot.kind == "input gradient"]
    between = [Slot("handed", i) for i in range(len(handed))]
    output.args = ((*(node for node, _ in own), *handed),)
    first = Half(halves.input.graph, list(backward.inputs), [*(slot for _, slot in own), *between])
    output = next(iter(halves.weight.graph.find_nodes(op="output")))
    theirs = [(node, slot) for node, slot in zip(output.args[0], backward.outputs, strict=True) if slot.kind != "input gradient"]
    output.args = (tuple(node for node, _ in theirs),)
    second = Half(halves.weight.graph, [backward.inputs[i] for i in halves.kept] + between, [slot for _, slot in theirs])
    return first, second


def merge_split(forward: Half, backward: Half, shared: tuple[str, ...]) -> Merged:
    """`merge` of a forward and a backward whose two halves stand apart, in lanes "forward" and "backward".

    Operators that give both kinds of gradients at once stand there twice, each with what its half wants, so that gradients of parameters can fill the
    time of an exchange that others wait for.
    """
    first, second = split_half(backward)
    links: dict[Place, Place] = {(WEIGHTS, slot): (INPUT, slot) for slot in second.inputs if slot.kind not in shared}
    merged = merge({"forward": forward, INPUT: first, WEIGHTS: second}, shared, links)
    one: Mapping[str | None, str | None] = {INPUT: "backward", WEIGHTS: "backward", "forward": "forward", None: None}
    merged.lane = {node: one[lane] for node, lane in merged.lane.items()}
    merged.inputs = [(one[lane], slot) for lane, slot in merged.inputs]
    kept = [i for i, (_, slot) in enumerate(merged.outputs) if slot.kind != "handed"]
    output = next(iter(merged.graph.find_nodes(op="output")))
    output.args = (tuple(output.args[0][i] for i in kept),)
    merged.outputs = [(one[lane], slot) for lane, slot in (merged.outputs[i] for i in kept)]
    assert all(isinstance(value, fx.Node) or value is None for value in output.args[0])
    return merged
