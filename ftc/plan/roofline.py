"""Seconds of operators on a machine that is not here: each takes max(FLOPs / rate, bytes / bandwidth), one after the other.

Williams, Waterman, Patterson, "Roofline", CACM 2009. Bytes are those of an operator's tensors, each read or written once; views take none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ftc.errors import FtcError
from ftc.flops import operator_flops


@dataclass(frozen=True)
class Machine:
    """Rates that a device reaches, not those of its data sheet: FLOP/s of matrix products, bytes/s of memory, seconds to start an operator."""

    flops: float
    bandwidth: float
    launch: float = 0.0

    def __post_init__(self) -> None:
        if not (self.flops > 0 and self.bandwidth > 0 and self.launch >= 0):
            raise FtcError(f"a machine of {self.flops:g} FLOP/s, {self.bandwidth:g} bytes/s and {self.launch:g} s a start cannot be; rates are above 0")

    def __str__(self) -> str:
        return f"{self.flops / 1e12:g} TFLOP/s, {self.bandwidth / 1e9:g} GB/s"


class Roofline(TorchDispatchMode):
    """Adds up the seconds that the operators inside would take. Entered after a FakeTensorMode, nothing is computed."""

    def __init__(self, machine: Machine):
        super().__init__()
        self.machine, self.seconds = machine, 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if not func.is_view and any(isinstance(t, Tensor) for t in tree_leaves(result)):
            given = {id(t): t for t in tree_leaves((args, kwargs, result)) if isinstance(t, Tensor)}
            moved = sum(t.numel() * t.element_size() for t in given.values())
            flops = operator_flops(func, args, kwargs, result)
            self.seconds += self.machine.launch + max(flops / self.machine.flops, moved / self.machine.bandwidth)
        return result
