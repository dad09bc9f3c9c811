"""From a matrix to float8 and its scale, with torchao's arithmetic, bit by bit.

    s = max(dtype) / max(amax, 1e-12)   in float64, then float32; rounded down to a power of two where the recipe says so
    q = saturate(float32(x) s)          x is about q / s

What is not finite stays so: an infinite amax gives s = 0 and from there NaN, as does a NaN, in every number that shares the scale; `watching`
tells where that began. amax = 0 gives q = 0.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ftc.float8.recipes import Cast

_SMALLEST = 1e-12  # torchao's: keeps the scale of an all-zero matrix finite


@dataclass
class Scaled:
    """A float8 matrix `data` [M, N] that stands for data / scale; `scale` float32, [], [M, 1] or [1, N]."""

    data: Tensor
    scale: Tensor

    def t(self) -> "Scaled":
        return Scaled(self.data.t(), self.scale if self.scale.dim() < 2 else self.scale.t())

    def float(self) -> Tensor:
        """float32 [M, N]."""
        return self.data.float() / self.scale


@torch.no_grad()
def scale_of(amax: Tensor, cast: Cast) -> Tensor:
    """float32 scales for largest magnitudes `amax`, of its shape."""
    scale = (torch.finfo(cast.dtype).max / torch.clamp(amax.to(torch.float64), min=_SMALLEST)).to(torch.float32)
    return torch.exp2(torch.floor(torch.log2(scale))) if cast.power_of_two else scale


@torch.no_grad()
def amax_of(x: Tensor, cast: Cast) -> Tensor:
    """The largest magnitude of what shares a scale, in the dtype of x."""
    return torch.max(torch.abs(x)) if cast.over is None else torch.amax(torch.abs(x), dim=cast.over, keepdim=True)


@torch.no_grad()
def with_scale(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """x times its scale, saturated, in float8. The clamp is for torch before 2.12, where casts did not saturate."""
    limit = torch.finfo(dtype).max
    return (x.to(torch.float32) * scale).clamp(min=-limit, max=limit).to(dtype)


def to_float8(x: Tensor, cast: Cast, what: str = "operand") -> Scaled:
    """Matrix x [M, N] of any floating dtype in float8. `what` names it for `watching`."""
    amax = amax_of(x, cast)
    if _events is not None and not bool(torch.isfinite(amax).all()):
        _events.append(Overflow(what, tuple(x.shape), str(x.dtype).removeprefix("torch."), float(amax.float().nan_to_num(float("nan")).max())))
    scale = scale_of(amax, cast)
    return Scaled(with_scale(x, scale, cast.dtype), scale)


@dataclass(frozen=True)
class Overflow:
    """A scale that is not finite: the operand (x, weight, grad), its shape and dtype, and the largest magnitude met (inf or nan)."""

    what: str
    shape: tuple[int, ...]
    dtype: str
    amax: float

    def __str__(self) -> str:
        return f"{self.what} [{', '.join(map(str, self.shape))}] in {self.dtype} holds {self.amax}"


_events: list[Overflow] | None = None  # not a context variable: backward passes run on threads of their own


@contextlib.contextmanager
def watching() -> Iterator[list[Overflow]]:
    """Within it every scale that is not finite is recorded, in order. Each cast then waits for its amax, so it is for looking, not for training."""
    global _events
    before, _events = _events, []
    try:
        yield _events
    finally:
        _events = before
