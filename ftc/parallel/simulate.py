"""A program that is not bound, run on all its ranks in one process, in lock step. Same call and outputs as the model; gradients reach whole weights.

Slow (every rank's work is done here) and meant for tests, for looking at a saved program, and for small evaluations.

Ranks with batches of their own (expert parallelism) are all given the same one here, and each counts for its share of the loss.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_flatten

from ftc.capture.results import extras
from ftc.capture.variants import Call, Hole, Variant, take_apart
from ftc.dialect.sequence import in_order, own_part
from ftc.rewrite.lockstep import Seat, run, seats_of
from ftc.rewrite.shard import placements


def simulate(program, given: dict, whole: bool = False) -> Any:
    """What `program(**given)` gives on ranks, put together: the inputs are whole, and so are the outputs.

    With `whole` also the results that passes added, by name."""
    axes = {axis: options["degree"] for axis, options in program.axes.items()}
    cuts = {axis: options["balanced"] for axis, options in program.axes.items() if "balanced" in options}
    call = take_apart(((), given), tree_flatten, program.ftc_name)
    seats = seats_of(axes)
    tensors = {seat: [_own(t, axes, cuts, seat) for t in call.tensors] for seat in seats}
    runner = _Runner(program, axes)
    variant, results = runner.call(program, call, tensors)
    leaves = _joined(variant, results, axes, cuts, own_batches(program))
    answer = variant.structured(leaves)
    return (answer, {name: leaves[place] for name, place in extras(variant.captured.graph).items()}) if whole else answer


def own_batches(program) -> set[str]:
    """The axes whose ranks have batches of their own."""
    return {axis for axis, options in program.axes.items() if options["pass"] == "expert-parallel"}


def _own(tensor: Tensor, axes: dict[str, int], cuts: dict[str, bool], seat: Seat) -> Tensor:
    for (axis, degree), rank in zip(axes.items(), seat, strict=True):
        if axis in cuts and tensor.dim() > 1:
            tensor = own_part(tensor, 1, rank, degree, cuts[axis])
    return tensor


def _joined(
    variant: Variant, results: dict[Seat, tuple[Tensor, ...]], axes: dict[str, int], cuts: dict[str, bool], batches: set[str]
) -> list[Tensor]:
    """The outputs of the first rank, whole; every rank's copy passes its gradient on, or its share where ranks have `batches` of their own."""
    sequence = next((s.sizes[1] for s in variant.captured.inputs if len(s.sizes) > 1), None)
    output = next(node for node in variant.captured.graph.nodes if node.op == "output")
    joined = []
    for i, node in enumerate(output.args[0]):
        shape = node.meta["val"].shape
        divided = cuts and len(shape) > 1 and isinstance(shape[1], torch.SymInt) and shape[1].node.shape_env.replace(shape[1].node.expr) == sequence
        values = {seat: results[seat][i] for seat in results}
        for axis, degree in reversed(axes.items()):  # the last axis varies fastest
            rest = sorted({seat[:-1] for seat in values})
            ranks = {seat: [values[(*seat, r)] for r in range(degree)] for seat in rest}
            share = 1 / degree if axis in batches else 1.0
            values = {s: in_order(r, 1, cuts[axis]) if divided and axis in cuts else _Copies.apply(share, *r) for s, r in ranks.items()}
        joined.append(values[()])
    return joined


class _Copies(torch.autograd.Function):
    """One of the ranks' equal results; each gets the gradient, or a share of it."""

    @staticmethod
    def forward(ctx, share, first, *others):
        ctx.share, ctx.count = share, 1 + len(others)
        return first.clone()

    @staticmethod
    def backward(ctx, grad):
        return None, *(grad if ctx.share == 1 else grad * ctx.share,) * ctx.count


class _Replicas(torch.autograd.Function):
    """What ranks hold alike; the gradient is the mean of theirs (equal ones), or their sum, where each saw a share."""

    @staticmethod
    def forward(ctx, x, count, shares):
        ctx.scale = shares / count
        return tuple(x.clone() for _ in range(count))

    @staticmethod
    def backward(ctx, *grads):
        return sum(grads[1:], grads[0]) * ctx.scale, None, None


class _Runner:
    """Runs the shell, and the regions it calls, on all seats."""

    def __init__(self, program, axes: dict[str, int]):
        self.program, self.axes = program, axes
        self.seats = seats_of(axes)
        batches = own_batches(program)
        self.shares = {axis: options["degree"] for axis, options in program.axes.items() if "balanced" in options or axis in batches}
        self._parameters: dict[tuple, dict[Seat, Tensor]] = {}

    def call(self, host, call: Call, tensors: dict[Seat, list[Tensor]]) -> tuple[Variant, dict[Seat, tuple[Tensor, ...]]]:
        """Find the variant by the first seat's tensors, and run its graph."""
        first = Call(tensors[self.seats[0]], call.leaves, call.spec)
        variant = host.code.variant_for(host, host.code.key(host, first), first, whole=call)
        names = dict.fromkeys(node.target for node in variant.captured.graph.nodes if node.op == "get_attr")
        parameters: dict[Seat, dict[str, Tensor]] = {seat: {} for seat in self.seats}
        for name in names:
            for seat, value in self._values(host, name, variant).items():
                parameters[seat][name] = value
        results = run(variant.captured.graph, self.axes, tensors, parameters, lifted=False, call_module=self._region)
        return variant, results

    def _values(self, host, name: str, variant: Variant) -> dict[Seat, Tensor]:
        if name in variant.captured.constants:
            return dict.fromkeys(self.seats, variant.captured.constants[name])
        whole, shard = host.fetch(name), placements(host.code.lenses).get(name)
        key = (id(whole), shard)
        if key not in self._parameters:
            if shard is not None:
                place = list(self.axes).index(shard.axis)
                pieces = [shard.piece(whole, r) for r in range(shard.degree)]
                groups = [[seat for seat in self.seats if seat[place] == r] for r in range(shard.degree)]
            else:
                pieces, groups = [whole], [self.seats]
            found = {}
            shares = math.prod(degree for axis, degree in self.shares.items() if shard is None or axis != shard.axis)
            for piece, group in zip(pieces, groups, strict=True):
                trained = piece.requires_grad and len(group) > 1
                copies = _Replicas.apply(piece, len(group), shares) if trained else [piece] * len(group)
                found |= dict(zip(group, copies, strict=True))
            self._parameters[key] = found
        return self._parameters[key]

    def _region(self, node: fx.Node, operands: dict[Seat, tuple[tuple, dict]]) -> dict[Seat, Any]:
        region = self.program._regions[node.target]
        calls = {seat: take_apart((tuple(args), dict(kwargs)), tree_flatten, node.target) for seat, (args, kwargs) in operands.items()}
        first = calls[self.seats[0]]
        variant, results = self.call(region, first, {seat: call.tensors for seat, call in calls.items()})
        if variant.out_spec.is_leaf() and isinstance(variant.outputs[0], Hole):
            return {seat: values[variant.outputs[0].index] for seat, values in results.items()}
        return {seat: variant.structured(values) for seat, values in results.items()}
