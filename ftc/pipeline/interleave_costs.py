"""What each node costs: by a model of the machine, or measured.

    compute   max(FLOPs / matrix rate, bytes / memory rate) + time of a launch; views cost nothing
    transfer  latency + bytes / link rate

The model needs rates alone and gives the same on every rank of equal sizes. Measured costs are one rank's own: `interleave(..., group=...)` lets all
ranks that talk take the first one's order.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_map

from ftc.errors import FtcError
from ftc.pipeline.communication import STARTS, is_start, is_wait, moved_bytes
from ftc.pipeline.merge import Merged, Place
from ftc.pipeline.merge_trace import is_getitem, is_view, node_bytes

_FREE = {"ftc::exchange_counts", "ftc::exchange_read"}  # a few bytes


@dataclass(frozen=True)
class Machine:
    """Rates of one rank. `flops_per_s`: of matrix products in the dtype used; `memory_bytes_per_s`: of memory; `link_bytes_per_s`: to the other
    ranks; `latency_s` of a transfer; `launch_s` of a kernel."""

    flops_per_s: float
    memory_bytes_per_s: float
    link_bytes_per_s: float
    latency_s: float = 10e-6
    launch_s: float = 2e-6

    def __post_init__(self):
        for name, value in vars(self).items():
            if not (value >= 0 and math.isfinite(value)) or (value == 0 and name.endswith("per_s")):
                raise FtcError(f"Machine.{name} is {value}; it must be a positive number")

    def cost(self, node: fx.Node) -> float:
        """Seconds of a node: of the processor, of a start those of its channel."""
        if is_start(node):
            return self.latency_s + moved_bytes(node) / self.link_bytes_per_s
        if node.op != "call_function" or is_wait(node) or is_getitem(node) or is_view(node) or _name(node) in _FREE:
            return 0.0
        moved = node_bytes(node) + sum(node_bytes(operand) for operand in node.all_input_nodes)
        return max(flops_of(node) / self.flops_per_s, moved / self.memory_bytes_per_s) + self.launch_s


H100 = Machine(flops_per_s=600e12, memory_bytes_per_s=2.8e12, link_bytes_per_s=45e9)  # bfloat16; a link of 400 Gbit/s


def flops_of(node: fx.Node) -> int:
    """Multiplications and additions of a node's products; 0 for what has none."""
    from torch.utils.flop_counter import flop_registry

    name = _name(node)
    if name in _EXPERTS:
        return _experts_flops(node, *_EXPERTS[name])
    formula = flop_registry.get(getattr(node.target, "overloadpacket", None))
    if formula is None:
        return 0
    args = fx.node.map_arg(node.args, lambda n: n.meta["val"])
    kwargs = fx.node.map_arg(node.kwargs, lambda n: n.meta["val"])
    return int(formula(*args, **kwargs, out_val=node.meta["val"]))


def _name(node: fx.Node) -> str:
    """The qualified name of a node's operator."""
    return getattr(getattr(node.target, "_schema", None), "name", "")


# Of operators over experts: (place of the choices, of gate_up, of down, products with each matrix: 1 forward; 3 backward, up again among them).
_EXPERTS = {
    "ftc::moe": (1, 3, 4, 1), "ftc::fused_moe": (1, 3, 4, 1), "ftc::exchange_experts": (1, 3, 4, 1),
    "ftc::moe_backward": (2, 4, 5, 3), "ftc::fused_moe_backward": (2, 4, 5, 3), "ftc::exchange_experts_backward": (2, 4, 5, 3),
}  # fmt: skip


def _experts_flops(node: fx.Node, choices: int, up: int, down: int, times: int) -> int:
    """2 (rows x choices) x matrix for each product. Of dispatched rows half the places or more hold no expert: each row counts with the choices
    that it has on the mean, one where there are as many ranks as experts a token."""
    indices, matrices = node.args[choices].meta["val"], (node.args[up].meta["val"], node.args[down].meta["val"])
    chosen = indices.shape[0] if node.target._schema.name.startswith("ftc::exchange") else indices.numel()
    return sum(2 * chosen * m.shape[1] * m.shape[2] for m in matrices) * times


def modelled(merged: Merged, machine: Machine) -> dict[fx.Node, float]:
    """Seconds of every node by the model."""
    return {node: machine.cost(node) for node in merged.graph.nodes}


# ------------------------------------------------------------------------------------------------------------------- measured


def measured(merged: Merged, given: Mapping[Place, Tensor], rounds: int = 3, warmup: int = 1) -> dict[fx.Node, float]:
    """Seconds of every node, run one after the other on `given`; medians over `rounds`. A transfer is timed from its start to its wait with nothing
    between. All ranks have to call it together where the graph has collectives."""
    taken: dict[fx.Node, list[float]] = {}
    for index in range(warmup + rounds):
        timer = _Timer(merged.graph)
        if torch.cuda.is_available():
            torch.cuda._sleep(50_000_000)  # about 30 ms, in which launches queue up: the device is timed, not Python
        with torch.no_grad():
            timer.run(*(given[place] for place in merged.inputs))
        for node, seconds in timer.taken().items():
            if index >= warmup:
                taken.setdefault(node, []).append(seconds)
    found = {node: statistics.median(times) for node, times in taken.items()}
    return {node: found.get(node, 0.0) for node in merged.graph.nodes}


class _Timer(fx.Interpreter):
    """Runs a graph and times each node: with events on CUDA, else by the clock. Starts are waited for at once, and run again as what they give."""

    def __init__(self, graph: fx.Graph):
        super().__init__(fx.GraphModule(nn.Module(), graph))
        self.own = dict(zip(self.module.graph.nodes, graph.nodes, strict=True))
        self.marks: dict[fx.Node, tuple] = {}

    def run_node(self, node: fx.Node):
        original = self.own[node]
        if node.op != "call_function" or is_view(node) or is_getitem(node):
            return super().run_node(node)
        if is_wait(node):
            return self.fetch_args_kwargs_from_env(node)[0][0]
        tensors = [x for x in self.env.values() if isinstance(x, Tensor) and x.is_cuda]
        begin = _mark(bool(tensors))
        value = super().run_node(node)
        if is_start(node):
            value = tree_map(STARTS[node.target].wait, value)
        self.marks[original] = (begin, _mark(bool(tensors)))
        return value

    def taken(self) -> dict[fx.Node, float]:
        return {node: _between(begin, end) for node, (begin, end) in self.marks.items()}


def _mark(cuda: bool):
    if not cuda:
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _between(begin, end) -> float:
    if isinstance(begin, float):
        return end - begin
    end.synchronize()
    return begin.elapsed_time(end) / 1e3
