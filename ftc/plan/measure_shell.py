"""What the code around the regions costs: before the first (embedding) and behind the last (final norm, head, loss)."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

from ftc.capture.program import Program
from ftc.plan.clock import Reader, clock
from ftc.plan.parts import PartCost, part_cost
from ftc.plan.roofline import Machine
from ftc.plan.stand_in import Call, called_through, gradable, real_like, standing_in

FIRST, LAST = "embedding", "head"


def shell_parts(
    program: Program, calls: Mapping[str, Call], step: Callable, device: torch.device, machine: Machine | None, rounds: int
) -> tuple[PartCost, PartCost]:
    """The shell before the first region, and all that follows the last: each region gives random results at once."""
    names = [region.name for region in program.regions]
    with contextlib.ExitStack() as stack:
        if machine is not None:
            stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        inside = {id(p) for region in program.regions for p in region.parameters()}
        held = stack.enter_context(standing_in(program, device, real=machine is None))
        own = [held[name] for name, p in _own_parameters(program, inside)]
        state: dict[str, Any] = {}

        def stub(name: str) -> Callable:
            def around(run: Callable, args: tuple, kwargs: dict) -> Any:
                if name == names[0]:
                    state["entered"] = gradable((args, kwargs))
                    state["mark"]()
                outputs = tree_map_only(Tensor, lambda t: real_like(t, device).detach().requires_grad_(t.is_floating_point()), calls[name].outputs)
                if name == names[-1]:
                    state["left"] = gradable(outputs)
                    state["mark"]()
                return outputs

            return around

        stack.enter_context(called_through(program, stub))
        return _shell_costs(step, own, state, device, machine, rounds)


def _own_parameters(program: Program, inside: set[int]) -> list[tuple[str, Tensor]]:
    return [(name, p) for name, p in program.named_parameters() if id(p) not in inside and p.requires_grad]


def _shell_costs(step: Callable, own: list[Tensor], state: dict[str, Any], device: torch.device, machine: Machine | None, rounds: int) -> tuple[PartCost, PartCost]:
    samples, used = [], {}
    for _ in range(1 if machine is not None else rounds + 1):
        reader = Reader(device, machine)
        state["mark"] = reader.mark
        kept: dict[int, int] = {}
        with reader, torch.autograd.graph.saved_tensors_hooks(noting(kept, own), lambda t: t):
            loss = step(device)
        forward_first, _, forward_last = reader.laps()
        back = {}
        for which, outputs, entry in ((LAST, [loss], state["left"]), (FIRST, state["entered"], [])):
            for wanted, tensors in (("inputs", entry), ("all", [*entry, *own])):
                with clock(device, machine) as taken:
                    found = torch.autograd.grad(outputs, tensors, [torch.ones_like(t) for t in outputs], retain_graph=True, allow_unused=True) if outputs and tensors else []
                back[which, wanted] = taken[0] if tensors else 0.0
            used[which] = [t for t, g in zip(tensors, found, strict=True) if g is not None and any(t is p for p in own)]
        samples.append((forward_first, 0.0, back[FIRST, "all"], forward_last, back[LAST, "inputs"], back[LAST, "all"]))
    medians = [statistics.median(column) for column in zip(*(samples[1:] or samples), strict=True)]
    everything = sum(kept.values())
    first = part_cost(FIRST, (medians[0], 0.0, medians[2]), (0, 0), used[FIRST], state["entered"])
    last = part_cost(LAST, (medians[3], medians[4], max(medians[5] - medians[4], 0.0)), (everything, everything), used[LAST], [])
    return first, last


def noting(kept: dict[int, int], own: list[Tensor]) -> Callable[[Tensor], Tensor]:
    left_out = {t.untyped_storage()._cdata for t in own}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage._cdata not in left_out:
            kept[storage._cdata] = storage.nbytes()
        return t

    return pack
