"""A stage as two graphs that run by themselves, and the forward of one stage with the backward of another as one graph (action OVERLAP_F_B).

    front, back = StageGraphs(stage_a, example_a), StageGraphs(stage_b, example_b)
    results, saved = front.forward(inputs)                        # warm-up
    input_gradients = back.backward(saved, gradients)             # cool-down; adds to the parameters' .grad

    pair = OverlappedPair(front, back, machine=H100)
    results, saved, input_gradients = pair.run(inputs, saved_of_back, gradients)

What a pair gives is what `front.forward` and then `back.backward` give, bit for bit. Both may be the same stage. `inputs`, `saved` and `gradients` are
lists of tensors; `saved` and `gradients` are emptied by the run, which frees each tensor behind its last reader. Sizes are those of the example.

A function registered for OVERLAP_F_B keeps `saved` by (stage, microbatch) where autograd would keep its graph: `inputs` of `front` are what the
schedule received (and the microbatch's own inputs), `gradients` those of the results of `back` that have one, in the order of `back.trained_results`,
and what goes on to the stage before are `input_gradients` for the inputs in `back.trained_inputs`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from ftc.errors import FtcError
from ftc.pipeline.communication import lowered
from ftc.pipeline.interleave import Interleaved, interleave
from ftc.pipeline.interleave_costs import Machine, modelled
from ftc.pipeline.interleave_effects import roots
from ftc.pipeline.merge import Merged, Place, merge, read_once
from ftc.pipeline.merge_compile import compiled
from ftc.pipeline.merge_module import trace_module
from ftc.pipeline.merge_split import merge_split, split_half
from ftc.pipeline.merge_trace import Half, Slot, Traced
from ftc.pipeline.parameter_gathers import GATHERS, Sharding, gather_parameters

PARAMETERS = ("parameter", "shard")


class StageGraphs:
    """The two graphs of a captured stage, region or program at the sizes of an example.

    module: what is called; args, kwargs: an example of its inputs; `differentiable`: numbers of the input tensors that want a gradient (default: those
    that float). `sharding` with `shards` (this rank's rows by name, leaves that require gradients
    where they are trained): these parameters go in as shards and are gathered by the graphs. `compile_options` go to torch.compile for what every
    graph computes between its transfers (`merge_compile`); None runs it as it is. Raises FtcError where the module cannot be traced, see `merge_trace.trace`.
    """

    def __init__(
        self,
        module: nn.Module,
        args: Sequence = (),
        kwargs: Mapping[str, Any] | None = None,
        *,
        differentiable: Sequence[int] | None = None,
        sharding: Sharding | None = None,
        shards: Mapping[str, Tensor] | None = None,
        compile_options: Mapping[str, Any] | None = None,
    ):
        traced = trace_module(module, args, kwargs, differentiable)
        held = dict(module.named_parameters()) | dict(module.named_buffers())
        self._set(traced, held, sharding, shards, compile_options)

    @classmethod
    def of(cls, traced: Traced, parameters: Mapping[str, Tensor], *, sharding=None, shards=None, compile_options=None) -> StageGraphs:
        """The same from two graphs made by `merge_trace.trace`."""
        new = object.__new__(cls)
        new._set(traced, parameters, sharding, shards, compile_options)
        return new

    def _set(self, traced: Traced, held: Mapping[str, Tensor], sharding, shards, compile_options) -> None:
        if (sharding is None) != (shards is None):
            raise FtcError("a sharding and the shards of this rank go together; give both or none")
        if sharding is not None:
            traced = gather_parameters(traced, shards, sharding)
        self.traced = replace(traced, forward=lowered(traced.forward), backward=lowered(traced.backward))
        self.tensors = {Slot("parameter", name): tensor for name, tensor in held.items()}
        self.tensors |= {Slot("shard", name): tensor for name, tensor in (shards or {}).items()}
        self.compile_options = compile_options
        self.trained_inputs = [int(s.key) for s in self.traced.backward.outputs if s.kind == "input gradient"]
        self.trained_results = [int(s.key) for s in self.traced.backward.inputs if s.kind == "gradient"]
        self._borrowed = borrowed(self.traced.backward)
        self._functions: dict[str, Callable] = {}
        self._parts: tuple[Half, Half] | None = None

    @property
    def num_saved(self) -> int:
        return self.traced.num_saved

    def forward(self, inputs: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """(results, saved)."""
        values = self._run("forward", self.traced.forward, {"input": list(inputs)})
        return values[: self.traced.num_results], values[self.traced.num_results :]

    def backward(self, saved: list[Tensor], gradients: list[Tensor]) -> list[Tensor]:
        """Gradients of `trained_inputs`; those of parameters are added to `.grad`. Empties `saved` and `gradients`."""
        by_result = dict(zip(self.trained_results, gradients, strict=True))
        values = self._run("backward", self.traced.backward, {"saved": list(saved), "gradient": by_result}, saved, gradients)
        return self.take(zip(self.traced.backward.outputs, values, strict=True))

    def backward_input(self, saved: list[Tensor], gradients: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """The first part of `backward` (action I): (gradients of `trained_inputs`, what `backward_weights` takes). Empties `saved` and `gradients`."""
        first, second = self._split()
        given = {"saved": list(saved), "gradient": dict(zip(self.trained_results, gradients, strict=True))}
        own = [given[s.kind][s.key] for s in second.inputs if s.kind in given]
        values = self._run("input", first, given, saved, gradients)
        count = len(self.trained_inputs)
        return values[:count], own + values[count:]

    def backward_weights(self, kept: list[Tensor]) -> None:
        """The second part (action W): adds to `.grad` of parameters what `backward` adds, the same bits. Empties `kept`."""
        _, second = self._split()
        slots = [s for s in second.inputs if s.kind not in PARAMETERS]
        given: dict[str, dict] = {"saved": {}, "gradient": {}, "handed": {}}
        for slot, value in zip(slots, kept, strict=True):
            given[slot.kind][slot.key] = value
        self.take(zip(second.outputs, self._run("weights", second, given, kept), strict=True))

    def _split(self) -> tuple[Half, Half]:
        if self._parts is None:
            self._parts = split_half(self.traced.backward)
        return self._parts

    def _run(self, name: str, half: Half, given: Mapping[str, Any], *emptied: list) -> list:
        if name not in self._functions:
            self._functions[name] = compiled(merge({name: half}, shared=PARAMETERS), self.compile_options)
        values = [given[s.kind][s.key] if s.kind in given else self.tensors[s] for s in half.inputs]
        for used in (*emptied, *given.values()):
            used.clear()
        return list(self._functions[name](values))

    def take(self, found) -> list[Tensor]:
        """Add parameters' gradients to `.grad` (a shard's to the shard's); returns those of inputs."""
        rest = []
        for slot, value in found:
            if slot.kind == "input gradient":
                rest.append(value)
            elif value is not None:
                tensor = self.tensors[Slot(slot.kind.removesuffix(" gradient"), slot.key)]
                value = value if value.dtype == tensor.dtype else value.to(tensor.dtype)
                if tensor.grad is None:
                    copied = slot in self._borrowed or _is_part(value)
                    tensor.grad = value.clone(memory_format=torch.contiguous_format) if copied else value
                else:
                    tensor.grad.add_(value)
        return rest


def borrowed(half: Half) -> set[Slot]:
    """Outputs that show the memory of an input or of an output before them: to be copied by who keeps them and writes to them."""
    shown, seen, found = roots(half.graph), set(), set()
    for slot, node in zip(half.outputs, half.results(), strict=True):
        if node is not None:
            if shown[node].op == "placeholder" or shown[node] in seen:
                found.add(slot)
            seen.add(shown[node])
    return found


def _is_part(value: Tensor) -> bool:
    """Whether a tensor shows a part of a larger memory, or not in its order."""
    return value.untyped_storage().nbytes() != value.nbytes or not value.is_contiguous()


class OverlappedPair:
    """The forward of `front` and the backward of `back` as one graph, ordered to hide communication; see the module's docstring.

    Costs come from `machine`, or from `costs(merged) -> seconds by node`. `more_bytes`: memory allowed above the peak of running one after the other
    (None: any). `group`: whose first rank's order all ranks take, needed where sizes or costs differ between ranks that talk. `parts`: the
    backward as its two halves, see `merge_split`. Parameters that both hold (the same tensors) go in once, and a gather of one is made once.
    """

    def __init__(
        self,
        front: StageGraphs,
        back: StageGraphs,
        *,
        machine: Machine | None = None,
        costs: Callable[[Merged], Mapping[fx.Node, float]] | None = None,
        more_bytes: int | None = 0,
        parts: bool = False,
        group: Any = None,
        compile_options: Mapping[str, Any] | None = None,
    ):
        if (machine is None) == (costs is None):
            raise FtcError("an OverlappedPair takes a machine, or a function that gives the costs: one of the two")
        self.front, self.back = front, back
        halves, self._tensors = _apart(front, back)
        merged = merge_split(*halves.values(), shared=PARAMETERS) if parts else merge(halves, shared=PARAMETERS)
        read_once(merged, pure=GATHERS)
        self.merged = merged
        seconds = costs(merged) if costs is not None else modelled(merged, machine)
        self.interleaved: Interleaved = interleave(merged, seconds, more_bytes, group=group)
        self._function = compiled(self.interleaved.graph, compile_options)

    def run(self, inputs: Sequence[Tensor], saved: list[Tensor], gradients: list[Tensor]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """(results of `front`, what its own backward will want, gradients of the inputs of `back`). Adds to `.grad` of the parameters of `back`, and
        empties `saved` and `gradients`."""
        by_result = dict(zip(self.back.trained_results, gradients, strict=True))
        sources = {("forward", "input"): inputs, ("backward", "saved"): saved, ("backward", "gradient"): by_result}
        values = [self._value(place, sources) for place in self.interleaved.graph.inputs]
        sources = by_result = None
        saved.clear()
        gradients.clear()
        found = list(self._function(values))
        mine = [value for (lane, _), value in zip(self.interleaved.graph.outputs, found, strict=True) if lane == "forward"]
        theirs = [(slot, value) for (lane, slot), value in zip(self.interleaved.graph.outputs, found, strict=True) if lane == "backward"]
        count = self.front.traced.num_results
        return mine[:count], mine[count:], self.back.take(theirs)

    def _value(self, place: Place, sources: Mapping) -> Tensor:
        lane, slot = place
        return self._tensors[slot] if lane is None else sources[lane, slot.kind][slot.key]


def _apart(front: StageGraphs, back: StageGraphs) -> tuple[dict[str, Half], dict[Slot, Tensor]]:
    """The two halves with one name for each parameter: those of `back` that are other tensors under a name of `front` get another."""
    tensors = dict(front.tensors)
    renamed: dict[Slot, Slot] = {}
    known = {id(tensor): slot for slot, tensor in tensors.items()}
    for slot, tensor in back.tensors.items():
        same = known.get(id(tensor))
        if same is not None and same.kind == slot.kind:
            renamed[slot] = same
        elif slot in tensors:
            renamed[slot] = Slot(slot.kind, f"{slot.key} (backward)")
        tensors[renamed.get(slot, slot)] = tensor
    half = back.traced.backward
    half = Half(half.graph, [renamed.get(slot, slot) for slot in half.inputs], half.outputs)
    return {"forward": front.traced.forward, "backward": half}, tensors
