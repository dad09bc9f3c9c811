"""The two graphs of a captured region, program or stage: an example is run once to find the variants that it takes, then these are traced."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from ftc.errors import FtcError
from ftc.pipeline.merge_trace import Traced, trace


def trace_module(module: nn.Module, args: Sequence = (), kwargs: Mapping | None = None, differentiable: Sequence[int] | None = None) -> Traced:
    """The two graphs of a captured Region, Program or stage at an example's sizes; results are the tensors it returns, in order.

    `parameter` keys are names in `module` (buffers too). Inputs are the example's tensors in the order of `tree_flatten((args, kwargs))`; those that
    float are differentiable unless `differentiable` numbers them. The example is run once, without gradients, to find the variants that it takes.
    """
    kwargs = dict(kwargs or {})
    flat, spec = tree_flatten((tuple(args), kwargs))
    places = [i for i, leaf in enumerate(flat) if isinstance(leaf, Tensor)]
    inputs = [flat[i] for i in places]
    if differentiable is None:
        differentiable = [i for i, x in enumerate(inputs) if x.is_floating_point()]
    held = dict(module.named_parameters()) | dict(module.named_buffers())
    with _recorded(module) as variants, torch.no_grad():
        module(*args, **kwargs)

    def function(parameters, *values):
        leaves = list(flat)
        for place, value in zip(places, values, strict=True):
            leaves[place] = value
        given, named = tree_unflatten(leaves, spec)
        with torch.nn.utils.stateless._reparametrize_module(module, parameters, tie_weights=True), _replayed(module, variants):
            found = tree_flatten(module(*given, **named))[0]
        return [value for value in found if isinstance(value, Tensor)]

    return trace(function, held, inputs, differentiable)


def _codes(module: nn.Module) -> list:
    from ftc.capture.program import Captured

    return list(dict.fromkeys(m.code for m in module.modules() if isinstance(m, Captured) and hasattr(m, "code")))


@contextlib.contextmanager
def _recorded(module: nn.Module) -> Iterator[list]:
    """The variants that calls take meanwhile, in order."""
    found: list = []

    def finding(code):
        def find(region, args, kwargs):
            place = len(found)
            found.append(None)
            variant, tensors = type(code).find(code, region, args, kwargs)
            found[place] = variant
            return variant, tensors

        return find

    with _finding(module, finding):
        yield found


@contextlib.contextmanager
def _replayed(module: nn.Module, variants: list) -> Iterator[None]:
    """Calls take these variants in turn, uncompiled: what they are called with has no data to choose by."""
    from ftc.capture.variants import take_apart

    left = iter(variants)

    def finding(code):
        return lambda region, args, kwargs: (next(left), take_apart((args, kwargs), tree_flatten, region.ftc_name).tensors)

    compiled = {id(v): (v, v.compiled) for v in variants}
    for variant, _ in compiled.values():
        variant.compiled = None
    try:
        with _finding(module, finding):
            yield
    finally:
        for variant, function in compiled.values():
            variant.compiled = function


@contextlib.contextmanager
def _finding(module: nn.Module, finding: Callable) -> Iterator[None]:
    """Codes look variants up by `finding` meanwhile, and run as they are: what splits their backward pass is set aside."""
    codes, aside = _codes(module), _set_aside(module)
    for code in codes:
        code.find = finding(code)
    try:
        yield
    finally:
        for code in codes:
            del code.find
        for owner, name, value in aside:
            setattr(owner, name, value)


def _set_aside(module: nn.Module) -> list[tuple]:
    """What runs regions in another way, taken off: (owner, attribute, value) to put back. FtcError where it is more than splitting the backward pass."""
    found = []
    for owner in module.modules():
        for name in ("around", "runner"):
            value = owner.__dict__.get(name)
            if value is None:
                continue
            if name == "around" and getattr(value, "inner", value) is not None:
                raise FtcError(
                    f"{owner.ftc_name} runs its forward in another way (recomputation of activations?), which a merged graph does not know of; "
                    "turn that off for stages that are overlapped"
                )
            found.append((owner, name, value))
    for owner, name, _ in found:
        setattr(owner, name, None)
    return found
