"""The backward pass of regions, and of the code around them, in two parts: input gradients now, weight gradients when they are asked for.

    split_backward(stage.body)
    later = WeightGradients()
    with putting_off(later):
        output.backward(gradient)       # I: gradients of the stage's inputs; no weight's .grad is touched
    later.compute()                     # W: the same bits in .grad as `output.backward(gradient)` alone gives

Every region that code was captured for can be split, as the graph is: attention, experts, operators of ours, recomputed or compiled ones. A
gradient is put off where nothing but `.grad` waits for it: that of a leaf among the attributes of a region or of the shell. What a region's input
needs is computed at once, so where no input needs a gradient (behind the embedding of the first stage) all is weights' and is put off.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import sympy
import torch
from torch import Tensor

from ftc.capture.program import Region
from ftc.capture.variants import Variant
from ftc.pipeline.split_backward_shell import ShellRunner
from ftc.pipeline.split_backward_trace import Traced, structure_of, trace
from ftc.pipeline.weight_gradients_store import AtOnce, WeightGradients, putting_off, store

__all__ = ["SplitFunction", "WeightGradients", "putting_off", "split_backward"]


def split_backward(body: Any) -> None:
    """Make the backward pass of a stage's body (or of any tree of regions) one of two parts, in place.

    body: `Stage.body`, whose shell is split as well, or a module with `regions`. Call it after recomputation and compilation were set up: what
    `Region.around` holds runs around the split region, and its compile options hold for its graphs. Done twice it is as done once. The numbers that a
    forward and a whole backward pass give do not change.
    """
    for region in body.regions:
        if not isinstance(region.around, _SplitRegion):
            region.around = _SplitRegion(region, region.around)
    if hasattr(body, "runner") and body.runner is None:
        body.runner = ShellRunner(SplitFunction)


class _SplitRegion:
    """What stands in `Region.around`."""

    def __init__(self, region: Region, inner: Callable | None):
        self.region, self.inner = region, inner

    def __call__(self, run: Callable, args: tuple, kwargs: dict) -> Any:
        return self._run(*args, **kwargs) if self.inner is None else self.inner(self._run, args, kwargs)

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        region = self.region
        variant, tensors = region.code.find(region, args, kwargs)
        return variant.run(region, region.fetch, tensors, through=_split_of(variant, region.name))


_of_functions: weakref.WeakKeyDictionary[Callable, dict[str, SplitFunction]] = weakref.WeakKeyDictionary()


def _split_of(variant: Variant, name: str) -> SplitFunction:
    """The split function of a variant, which twins share; made anew when a pass has changed its graph."""
    known = _of_functions.setdefault(variant.function, {})
    options = variant.compile_options
    if repr(options) not in known:
        function = variant.function
        marks = [[isinstance(size, sympy.Basic) for size in spec.sizes] for spec in variant.captured.inputs]
        known[repr(options)] = SplitFunction(_without_root(function), marks, options, f"region {name}")
    return known[repr(options)]


def _without_root(function: Callable) -> Callable:
    reference = weakref.ref(function)  # the values of a WeakKeyDictionary must not hold their keys
    return lambda *tensors: reference()(None, *tensors)


class SplitFunction:
    """`function(*attributes, *inputs)` -> tensors, with a backward pass of two parts.

    `dynamic` marks the dims of inputs that may change without a new trace, `compiled` are the options of torch.compile or None, `what` names it in
    errors. Traces are made on first use and kept, one for each structure of arguments.
    """

    def __init__(self, function: Callable[..., Sequence[Tensor]], dynamic: Sequence[Sequence[bool]], compiled: dict | None, what: str):
        self.function, self.dynamic, self.compiled, self.what = function, dynamic, compiled, what
        self.traces: dict[tuple, list[Traced]] = {}

    def __call__(self, attributes: Sequence[Tensor], inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        """The results, as the function gives them. Where no attribute is a leaf that needs a gradient the function itself runs."""
        if not torch.is_grad_enabled() or not any(t.requires_grad and t.is_leaf for t in attributes):
            return self.function(*attributes, *inputs)
        places, attributes, kept = _distinct(attributes, inputs)
        inputs = [inputs[i].contiguous() for i in kept]
        traced = self._traced(places, attributes, inputs, kept)
        arguments = [*attributes, *inputs]
        made = iter(_Split.apply(traced, *arguments))
        return [arguments[traced.passed[i]] if i in traced.passed else next(made) for i in range(traced.num_results + len(traced.passed))]

    def _traced(self, places: tuple[int, ...], attributes: Sequence[Tensor], inputs: Sequence[Tensor], kept: Sequence[int]) -> Traced:
        known = self.traces.setdefault((places, structure_of(attributes, inputs)), [])
        for traced in known:
            if traced.accepts(inputs):
                return traced
        function = self.function

        def spread(*distinct: Tensor) -> Sequence[Tensor]:
            return function(*(distinct[i] for i in places))

        known.append(trace(spread, attributes, inputs, [self.dynamic[i] for i in kept], self.compiled, self.what))
        return known[-1]


def _distinct(attributes: Sequence[Tensor], inputs: Sequence[Tensor]) -> tuple[tuple[int, ...], list[Tensor], list[int]]:
    """Each tensor once, as a gradient is one for each: where every argument stands among them, the attributes, and the numbers of inputs kept."""
    known: dict[int, int] = {}
    distinct, places, kept = [], [], []
    for attribute in attributes:
        if id(attribute) not in known:
            known[id(attribute)] = len(known)
            distinct.append(attribute)
        places.append(known[id(attribute)])
    for i, tensor in enumerate(inputs):
        if id(tensor) not in known:
            known[id(tensor)] = len(known)
            kept.append(i)
        places.append(known[id(tensor)])
    return tuple(places), distinct, kept


class _Split(torch.autograd.Function):
    """A traced function. Its backward pass returns the gradients of inputs, and leaves those of weights where `store` says."""

    @staticmethod
    def forward(ctx, traced: Traced, *arguments: Tensor) -> tuple[Tensor, ...]:
        outputs = traced.forward(*arguments)
        results, kept = outputs[: traced.num_results], outputs[traced.num_results :]
        ctx.traced = traced
        ctx.save_for_backward(*(t for t in kept if isinstance(t, Tensor)))
        ctx.sizes = [None if isinstance(t, Tensor) else t for t in kept]
        ctx.weights = [t if w else None for t, w in zip(arguments, traced.is_weight, strict=True)]
        ctx.mark_non_differentiable(*(r for i, r in enumerate(results) if i not in traced.differentiable))
        return tuple(results)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        traced, where = ctx.traced, store()
        tensors = iter(ctx.saved_tensors)
        kept = [next(tensors) if size is None else size for size in ctx.sizes]
        tangents = [gradients[i].contiguous() for i in traced.differentiable]
        sources = {"saved": kept, "tangent": tangents}
        values = [sources[kind][number] for kind, number in traced.placeholders]
        if where is None:
            return (None, *traced.backward(*values))
        if isinstance(where, AtOnce):
            found = traced.backward(*values)
            own = [f.clone() if f is not None and i in traced.shared else f for i, f in enumerate(found)]
            where.add(lambda: own, ctx.weights, own)
            return (None, *(f if w is None else None for f, w in zip(found, ctx.weights, strict=True)))
        made, handed = traced.first(*values)
        given = [values[i] for i in traced.halves.kept] + list(handed)
        where.add(lambda: traced.second(given), ctx.weights, given)
        return (None, *made)
