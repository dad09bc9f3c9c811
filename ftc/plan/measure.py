"""What each region of a program costs in a step: forward, gradients of inputs, gradients of weights, and what is kept in between.

    measured    regions of equal code and input sizes run once with random weights on a device, alternating, medians of rounds
    modelled    the same runs on fake tensors, every operator at max(FLOPs / rate, bytes / bandwidth): the roofline of a machine that is not here

Regions run with their backward pass in two parts (`ftc.pipeline.split_backward`), as in a schedule. The parts of the shell before the first and
after the last region (embedding; final norm, head and loss) are costs of their own, which the first and the last stage bear; their W is what the
gradients of all cost beyond those of the inputs, and what they keep is counted as kept for both.

Legend: I gradients of inputs, W gradients of weights, B = I + W.
"""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode
from torch.nn.utils.stateless import _reparametrize_module
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from ftc.capture.program import Captured, Program, Region
from ftc.errors import FtcError
from ftc.pipeline.split_backward import WeightGradients, putting_off, split_backward
from ftc.plan.costs import Costs
from ftc.plan.roofline import Machine, Roofline

FIRST, LAST = "embedding", "head"
_ROUNDS = 5


@dataclass(frozen=True)
class PartCost:
    """One region, or a part of the shell. Seconds of a microbatch, and bytes."""

    name: str
    forward: float
    input_gradient: float
    weight_gradient: float
    activation_bytes: int  # kept from the forward to the backward pass
    pending_bytes: int  # kept for W once I is done
    output_bytes: int  # what the next part is given
    num_parameters: int

    @property
    def seconds(self) -> float:
        """Forward and backward."""
        return self.forward + self.input_gradient + self.weight_gradient


@dataclass(frozen=True)
class RunCosts:
    """All parts of a program in order: embedding, regions, head."""

    first: PartCost
    regions: tuple[PartCost, ...]
    last: PartCost
    source: str  # where the numbers come from, in words

    def costs(self, bytes_per_parameter: float, microbatches: int, hop_latency: float = 0.0, bytes_per_second: float = math.inf, exchange: float = 0.0) -> Costs:
        """For the planner. bytes_per_parameter: of weights, gradients and optimizer state on one rank. exchange: seconds of exposed communication in each
        region's forward, and again in its backward."""
        first, last = ([_as_costs([part], bytes_per_parameter)] for part in (self.first, self.last))
        inside = replace(
            _as_costs(self.regions, bytes_per_parameter), exchange_forward=(exchange,) * len(self.regions), exchange_backward=(exchange,) * len(self.regions),
            boundary_bytes=tuple(part.output_bytes for part in self.regions[:-1]), hop_latency=hop_latency, bytes_per_second=bytes_per_second, microbatches=microbatches,
        )  # fmt: skip
        return inside.with_ends(*first, *last)

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {"source": self.source, "parts": [vars(part) for part in (self.first, *self.regions, self.last)]}


def _as_costs(parts: Sequence[PartCost], bytes_per_parameter: float) -> Costs:
    """Costs without boundaries."""
    return Costs(
        tuple(p.forward for p in parts), tuple(p.input_gradient for p in parts), tuple(p.weight_gradient for p in parts),
        activation_bytes=tuple(p.activation_bytes for p in parts), pending_bytes=tuple(p.pending_bytes for p in parts),
        fixed_bytes=tuple(p.num_parameters * bytes_per_parameter for p in parts),
    )  # fmt: skip


@dataclass
class _Call:
    """A region's call as it was seen: tensors' sizes, dtypes and whether a gradient comes back."""

    args: tuple
    kwargs: dict[str, Any]
    outputs: Any


def measure(
    program: Program, step: Callable[[torch.device], Tensor], device: torch.device | str = "cpu", *, machine: Machine | None = None,
    rounds: int = _ROUNDS, tell: Callable[[str], None] = lambda said: None,
) -> RunCosts:  # fmt: skip
    """The cost of every part of `program` in one microbatch.

    step: makes a microbatch on the device, runs the program on it and returns the loss; it is called on fake tensors too. The program's own parameters may
    be on the meta device, and are not touched: regions run with random ones, in the dtype that they compute in (`compute_dtype`). machine: model the costs for it in place of measuring. Raises FtcError for a
    program without regions.
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
    first, last = _shell(program, calls, step, device, machine, rounds)
    said = f"measured on {device.type}, median of {rounds} rounds" if machine is None else f"modelled for {machine}"
    return RunCosts(first, tuple(regions), last, said)


def _named(cost: PartCost, name: str) -> PartCost:
    return PartCost(**(vars(cost) | {"name": name}))


def _signature(call: _Call) -> tuple:
    leaves = tree_leaves((call.args, call.kwargs))
    return tuple((tuple(t.shape), t.dtype) if isinstance(t, Tensor) else repr(t) for t in leaves)


def _calls(program: Program, step: Callable, device: torch.device) -> dict[str, _Call]:
    """The call of each region in a step, on fake tensors."""
    seen: dict[str, _Call] = {}

    def recorder(name: str) -> Callable:
        def around(run: Callable, args: tuple, kwargs: dict) -> Any:
            outputs = run(*args, **kwargs)
            seen[name] = _Call(args, kwargs, outputs)
            return outputs

        return around

    try:
        with FakeTensorMode(allow_non_fake_inputs=True), _around(program, recorder), _standing_in(program, device, real=False):
            step(device)
    except DynamicOutputShapeException as error:
        raise FtcError(f"sizes in the program depend on values ({error}), as in a loop over the experts that were hit; apply raise-moe") from error
    missing = [region.name for region in program.regions if region.name not in seen]
    if missing:
        raise FtcError(f"the step does not run {missing[0]}; its cost cannot be known")
    return seen


@contextlib.contextmanager
def _around(program: Program, make: Callable[[str], Callable]) -> Iterator[None]:
    """Regions called through `make(name)`; their own hooks stand aside."""
    before = {region: region.around for region in program.regions}
    for region in before:
        region.around = make(region.name)
    try:
        yield
    finally:
        for region, around in before.items():
            region.around = around


@contextlib.contextmanager
def _standing_in(module: Captured, device: torch.device, real: bool) -> Iterator[dict[str, Tensor]]:
    """Random parameters in the module's place: matrices of variance 1 / columns, vectors of ones. Yields them by name."""
    made: dict[int, Tensor] = {}
    names: dict[str, Tensor] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if id(parameter) not in made:
            shape, dtype = parameter.shape, module.dtype_of(parameter)
            if not parameter.is_floating_point():
                value = torch.zeros(shape, dtype=dtype, device=device)
            elif real and len(shape) > 1:
                value = torch.randn(shape, dtype=dtype, device=device).mul_(shape[-1] ** -0.5)
            else:
                value = torch.ones(shape, dtype=dtype, device=device)
            made[id(parameter)] = value.requires_grad_(parameter.requires_grad)
        names[name] = made[id(parameter)]
    for name, buffer in module.named_buffers(remove_duplicate=False):
        if buffer.device.type == "meta":
            names[name] = torch.zeros(buffer.shape, dtype=buffer.dtype, device=device)
        elif buffer.device != device:
            names[name] = buffer.to(device)
    with _reparametrize_module(module, names):
        yield names


def _real(value: Any, device: torch.device) -> Any:
    """A tensor of the same size with values: normal floats, zeros of integers, True of booleans."""
    if not isinstance(value, Tensor):
        return value
    shape = [int(size) for size in value.shape]
    if value.is_floating_point():
        return torch.randn(shape, dtype=value.dtype, device=device).requires_grad_(value.requires_grad)
    return torch.ones(shape, dtype=value.dtype, device=device) if value.dtype is torch.bool else torch.zeros(shape, dtype=value.dtype, device=device)


def _region(region: Region, call: _Call, device: torch.device, machine: Machine | None, rounds: int) -> PartCost:
    with contextlib.ExitStack() as stack:
        if machine is not None:
            stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        held = stack.enter_context(_standing_in(region, device, real=machine is None))
        stack.enter_context(_split(region))
        args, kwargs = tree_map(lambda value: _real(value, device), (call.args, call.kwargs))
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.requires_grad]
        weights = [t for t in {id(t): t for t in held.values()}.values() if t.requires_grad]
        run = lambda: _gradable(region(*args, **kwargs))  # noqa: E731
        samples = [_halves(run, inputs, weights, device, machine) for _ in range(1 if machine is not None else rounds + 1)]
        kept, outputs = _kept_bytes(run, [*inputs, *weights])
    forward, first, second, pending = (statistics.median(column) for column in zip(*(samples[1:] or samples), strict=True))
    return _cost("", (forward, first, second), (kept, int(pending)), weights, outputs)


@contextlib.contextmanager
def _split(region: Region) -> Iterator[None]:
    before, region.around = region.around, None
    split_backward(SimpleNamespace(regions=[region]))
    try:
        yield
    finally:
        region.around = before


def _halves(run: Callable, inputs: list[Tensor], weights: list[Tensor], device: torch.device, machine: Machine | None) -> tuple[float, float, float, int]:
    """Seconds of F, I and W, and bytes that W waits with. The weights' `.grad` is left empty."""
    later = WeightGradients()
    with _clock(device, machine) as forward:
        outputs = run()
    given = [torch.ones_like(t) for t in outputs]
    with _clock(device, machine) as first, putting_off(later):
        torch.autograd.grad(outputs, inputs or weights, given, allow_unused=True)
    del outputs, given
    pending = later.num_bytes
    with _clock(device, machine) as second:
        later.compute()
    for weight in weights:
        weight.grad = None
    return forward[0], first[0], second[0], pending


def _cost(name: str, times: tuple[float, float, float], kept: tuple[int, int], weights: list[Tensor], outputs: list[Tensor]) -> PartCost:
    """times: of F, I and W; kept: bytes for I and for W."""
    return PartCost(name, *times, *kept, sum(t.numel() * t.element_size() for t in outputs), sum(t.numel() for t in weights))


def _gradable(outputs: Any) -> list[Tensor]:
    return [t for t in tree_leaves(outputs) if isinstance(t, Tensor) and t.requires_grad]


@contextlib.contextmanager
def _clock(device: torch.device, machine: Machine | None) -> Iterator[list[float]]:
    """Yields a list that holds the seconds of what ran inside, once it has ended."""
    taken: list[float] = []
    if machine is not None:
        with Roofline(machine) as model:
            yield taken
        taken.append(model.seconds)
        return
    _synchronize(device)
    started = time.perf_counter()
    yield taken
    _synchronize(device)
    taken.append(time.perf_counter() - started)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _kept_bytes(run: Callable, known: list[Tensor]) -> tuple[int, list[Tensor]]:
    """Bytes of the storages that the forward pass keeps for the backward pass, parameters and inputs left out, and its outputs."""
    storages: dict[Any, int] = {}
    left_out = {t.untyped_storage()._cdata for t in known}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage._cdata not in left_out:
            storages[storage._cdata] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        outputs = run()
    return sum(storages.values()), outputs


def _shell(
    program: Program, calls: Mapping[str, _Call], step: Callable, device: torch.device, machine: Machine | None, rounds: int
) -> tuple[PartCost, PartCost]:
    """The shell before the first region, and all that follows the last: each region gives random results at once."""
    names = [region.name for region in program.regions]
    with contextlib.ExitStack() as stack:
        if machine is not None:
            stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        inside = {id(p) for region in program.regions for p in region.parameters()}
        held = stack.enter_context(_standing_in(program, device, real=machine is None))
        own = [held[name] for name, p in _own_parameters(program, inside)]
        state: dict[str, Any] = {}

        def stub(name: str) -> Callable:
            def around(run: Callable, args: tuple, kwargs: dict) -> Any:
                if name == names[0]:
                    state["entered"] = _gradable((args, kwargs))
                    state["mark"]()
                outputs = tree_map_only(Tensor, lambda t: _real(t, device).detach().requires_grad_(t.is_floating_point()), calls[name].outputs)
                if name == names[-1]:
                    state["left"] = _gradable(outputs)
                    state["mark"]()
                return outputs

            return around

        stack.enter_context(_around(program, stub))
        return _shell_costs(step, own, state, device, machine, rounds)


def _own_parameters(program: Program, inside: set[int]) -> list[tuple[str, Tensor]]:
    return [(name, p) for name, p in program.named_parameters() if id(p) not in inside and p.requires_grad]


def _shell_costs(step: Callable, own: list[Tensor], state: dict[str, Any], device: torch.device, machine: Machine | None, rounds: int) -> tuple[PartCost, PartCost]:
    samples, used = [], {}
    for _ in range(1 if machine is not None else rounds + 1):
        reader = _Reader(device, machine)
        state["mark"] = reader.mark
        kept: dict[int, int] = {}
        with reader, torch.autograd.graph.saved_tensors_hooks(_packer(kept, own), lambda t: t):
            loss = step(device)
        forward_first, _, forward_last = reader.laps()
        back = {}
        for which, outputs, entry in ((LAST, [loss], state["left"]), (FIRST, state["entered"], [])):
            for wanted, tensors in (("inputs", entry), ("all", [*entry, *own])):
                with _clock(device, machine) as taken:
                    found = torch.autograd.grad(outputs, tensors, [torch.ones_like(t) for t in outputs], retain_graph=True, allow_unused=True) if outputs and tensors else []
                back[which, wanted] = taken[0] if tensors else 0.0
            used[which] = [t for t, g in zip(tensors, found, strict=True) if g is not None and any(t is p for p in own)]
        samples.append((forward_first, 0.0, back[FIRST, "all"], forward_last, back[LAST, "inputs"], back[LAST, "all"]))
    medians = [statistics.median(column) for column in zip(*(samples[1:] or samples), strict=True)]
    everything = sum(kept.values())
    first = _cost(FIRST, (medians[0], 0.0, medians[2]), (0, 0), used[FIRST], state["entered"])
    last = _cost(LAST, (medians[3], medians[4], max(medians[5] - medians[4], 0.0)), (everything, everything), used[LAST], [])
    return first, last


def _packer(kept: dict[int, int], own: list[Tensor]) -> Callable[[Tensor], Tensor]:
    left_out = {t.untyped_storage()._cdata for t in own}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage._cdata not in left_out:
            kept[storage._cdata] = storage.nbytes()
        return t

    return pack


class _Reader:
    """Reads the clock at marks within one forward pass."""

    def __init__(self, device: torch.device, machine: Machine | None):
        self.device, self.model = device, None if machine is None else Roofline(machine)
        self.marks: list[float] = []

    def mark(self) -> None:
        _synchronize(self.device)
        self.marks.append(time.perf_counter() if self.model is None else self.model.seconds)

    def laps(self) -> tuple[float, ...]:
        """Seconds from the start to the first region, to the last region, and to the end. Where marks are missing, an error."""
        if len(self.marks) != 4 or any(not math.isfinite(m) for m in self.marks):
            raise FtcError("the step does not run its first and its last region once each; its costs cannot be known")
        return tuple(b - a for a, b in zip(self.marks, self.marks[1:], strict=False))

    def __enter__(self) -> _Reader:
        if self.model is not None:
            self.model.__enter__()
        self.mark()
        return self

    def __exit__(self, *error: Any) -> None:
        self.mark()
        if self.model is not None:
            self.model.__exit__(*error)
