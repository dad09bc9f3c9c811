"""What each region of a program costs in a step: forward, gradients of inputs, gradients of weights, and what is kept in between.

    measured    regions of equal code and input sizes run once with random weights on a device, alternating, medians of rounds
    modelled    the same runs on fake tensors, every operator at max(FLOPs / rate, bytes / bandwidth): the roofline of a machine that is not here

Regions run with their backward pass in two parts (`ftc.pipeline.split_backward`), as in a schedule; one that writes into buffers cannot, and has all of
its backward pass in I. The parts of the shell before the first and
after the last region (embedding; final norm, head and loss) are costs of their own, which the first and the last stage bear; their W is what the
gradients of all cost beyond those of the inputs, and what they keep is counted as kept for both.

Legend: I gradients of inputs, W gradients of weights, B = I + W.
"""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map

from ftc.capture.program import Program, Region
from ftc.errors import FtcError
from ftc.pipeline.split_backward import WeightGradients, putting_off, split_backward
from ftc.plan.clock import clock
from ftc.plan.measure_shell import noting, shell_parts
from ftc.plan.parts import PartCost, RunCosts, part_cost
from ftc.plan.roofline import Machine
from ftc.plan.stand_in import Call, called_through, gradable, real_like, standing_in

_ROUNDS = 5


def measure(
    program: Program, step: Callable[[torch.device], Tensor], device: torch.device | str = "cpu", *, machine: Machine | None = None,
    rounds: int = _ROUNDS, tell: Callable[[str], None] = lambda said: None,
) -> RunCosts:  # fmt: skip
    """The cost of every part of `program` in one microbatch.

    step: makes a microbatch on the device, runs the program on it and returns the loss; it is called on fake tensors too. The program's own parameters may
    be on the meta device, and are not touched: regions run with random ones, in the dtype that they compute in (`compute_dtype`). machine: model the
    costs for it in place of measuring. Raises FtcError for a program without regions.
    """
    if not program.regions:
        raise FtcError("the program has no regions (repeated blocks), so a pipeline has nothing to divide")
    device = torch.device(device)
    calls = _calls(program, step, device)
    measured: dict[tuple, PartCost] = {}
    regions = []
    for region in program.regions:
        key = (region.code, _signature(calls[region.name]))
        if key not in measured:
            tell(f"measuring {region.name}" if machine is None else f"modelling {region.name}")
            measured[key] = _region(region, calls[region.name], device, machine, rounds)
        regions.append(_named(measured[key], region.name))
    tell("measuring embedding and head" if machine is None else "modelling embedding and head")
    first, last = shell_parts(program, calls, step, device, machine, rounds)
    said = f"measured on {device.type}, median of {rounds} rounds" if machine is None else f"modelled for {machine}"
    return RunCosts(first, tuple(regions), last, said)


def _named(cost: PartCost, name: str) -> PartCost:
    return PartCost(**(vars(cost) | {"name": name}))


def _signature(call: Call) -> tuple:
    leaves = tree_leaves((call.args, call.kwargs))
    return tuple((tuple(t.shape), t.dtype) if isinstance(t, Tensor) else repr(t) for t in leaves)


def _calls(program: Program, step: Callable, device: torch.device) -> dict[str, Call]:
    """The call of each region in a step, on fake tensors."""
    seen: dict[str, Call] = {}

    def recorder(name: str) -> Callable:
        def around(run: Callable, args: tuple, kwargs: dict) -> Any:
            outputs = run(*args, **kwargs)
            seen[name] = Call(args, kwargs, outputs)
            return outputs

        return around

    try:
        with FakeTensorMode(allow_non_fake_inputs=True), called_through(program, recorder), standing_in(program, device, real=False):
            step(device)
    except DynamicOutputShapeException as error:
        raise FtcError(f"sizes in the program depend on values ({error}), as in a loop over the experts that were hit; apply raise-moe") from error
    missing = [region.name for region in program.regions if region.name not in seen]
    if missing:
        raise FtcError(f"the step does not run {missing[0]}; its cost cannot be known")
    return seen


def _region(region: Region, call: Call, device: torch.device, machine: Machine | None, rounds: int) -> PartCost:
    with contextlib.ExitStack() as stack:
        if machine is not None:
            stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        held = stack.enter_context(standing_in(region, device, real=machine is None))
        args, kwargs = tree_map(lambda value: real_like(value, device), (call.args, call.kwargs))
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.requires_grad]
        weights = [t for t in {id(t): t for t in held.values()}.values() if t.requires_grad]
        run = lambda: gradable(region(*args, **kwargs))  # noqa: E731
        stack.enter_context(_split_where_possible(region, run))
        samples = [_halves(run, inputs, weights, device, machine) for _ in range(1 if machine is not None else rounds + 1)]
        kept, outputs = _kept_bytes(run, [*inputs, *weights])
    forward, first, second, pending = (statistics.median(column) for column in zip(*(samples[1:] or samples), strict=True))
    return part_cost("", (forward, first, second), (kept, int(pending)), weights, outputs)


@contextlib.contextmanager
def _split_where_possible(region: Region, run: Callable) -> Iterator[None]:
    before, region.around = region.around, None
    try:
        split_backward(SimpleNamespace(regions=[region]))
        try:
            run()
        except FtcError:  # it writes into its buffers
            region.around = None
        yield
    finally:
        region.around = before


def _halves(run: Callable, inputs: list[Tensor], weights: list[Tensor], device: torch.device, machine: Machine | None) -> tuple[float, float, float, int]:
    """Seconds of F, I and W, and bytes that W waits with. Every `.grad` is left empty."""
    later = WeightGradients()
    with clock(device, machine) as forward:
        outputs = run()
    given = [torch.ones_like(t) for t in outputs]
    with clock(device, machine) as first, putting_off(later):
        torch.autograd.backward(outputs, given)
    del outputs, given
    pending = later.num_bytes
    with clock(device, machine) as second:
        later.compute()
    for tensor in (*inputs, *weights):
        tensor.grad = None
    return forward[0], first[0], second[0], pending


def _kept_bytes(run: Callable, known: list[Tensor]) -> tuple[int, list[Tensor]]:
    """Bytes of the storages that the forward pass keeps for the backward pass, parameters and inputs left out, and its outputs."""
    storages: dict[int, int] = {}
    with torch.autograd.graph.saved_tensors_hooks(noting(storages, known), lambda t: t):
        outputs = run()
    return sum(storages.values()), outputs
