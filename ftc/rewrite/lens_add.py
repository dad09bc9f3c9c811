"""Lenses that add parameters to a model and take them away: what `Stack` and its kin, which only move values, cannot do.

    add    y = f(like) stands beside the others     back: y is left out      moments: none yet
           a buffer likewise, of zeros
    drop   x is gone                                back: x is missing, which matters only to what needs it

So a parameter that one pass adds and another drops leaves no trace on the way back to the original weights.
"""

from dataclasses import dataclass, replace

import torch

from ftc.capture.growth import normal
from ftc.errors import FtcError, nearest
from ftc.rewrite.lens import Lens, Tensors

FILLS = ("copy", "ones", "identity", "normal")


class Beside(Lens):
    """What lenses share that put `target` beside the others: it is made by `_value(like)`, and left out on the way back."""

    target: str
    like: str
    sources = ()

    @property
    def targets(self) -> tuple[str, ...]:
        return (self.target,)

    @property
    def reads(self) -> tuple[str, ...]:
        return (self.like,)

    def with_prefix(self, prefix: str) -> "Beside":
        return replace(self, target=prefix + self.target, like=prefix + self.like)

    def forward(self, tensors: Tensors) -> Tensors:
        if self.like not in tensors:
            raise FtcError(f"an {self.kind} lens misses {self.like}; {nearest(self.like, list(tensors)[:12])}")
        if self.target in tensors:
            raise FtcError(f"an {self.kind} lens would overwrite {self.target}")
        return {**tensors, self.target: self._value(tensors[self.like])}

    def backward(self, tensors: Tensors) -> Tensors:
        return {name: value for name, value in tensors.items() if name != self.target}

    def forward_moments(self, exp_avg: Tensors, exp_avg_sq: Tensors) -> tuple[Tensors, Tensors]:
        """A new parameter has no moments yet, which an optimizer makes in its first step; a buffer never has."""
        return dict(exp_avg), dict(exp_avg_sq)

    def _value(self, like: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError


@dataclass(frozen=True)
class Add(Beside):
    """`target [shape]` in the dtype and place of `like`, which stays as it is.

    fill: "copy" of the values of `like`; "ones"; "identity": blocks side by side, the i-th `scales[i]` times the identity of
    `widths[i]` columns; "normal" with standard deviation `scales[0]`, drawn from `seed` and the name alone.
    """

    target: str
    like: str
    fill: str
    shape: tuple[int, ...]
    scales: tuple[float, ...] = (1.0,)
    widths: tuple[int, ...] = ()
    seed: int = 0

    kind = "add"
    moments = "reset"

    def __post_init__(self):
        for name in ("shape", "scales", "widths"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if self.fill not in FILLS:
            raise FtcError(f"{self.target!r} cannot be filled with {self.fill!r}; {nearest(self.fill, FILLS)}")

    def _value(self, like: torch.Tensor) -> torch.Tensor:
        if self.fill == "copy":
            if tuple(like.shape) != self.shape:
                raise FtcError(f"{self.target!r} copies {self.like!r}, whose shape is {list(like.shape)}, not {list(self.shape)}")
            return like.clone()
        if self.fill == "ones":
            return like.new_ones(self.shape)
        if self.fill == "normal":
            return (normal(self.shape, self.target, self.seed) * self.scales[0]).to(like.dtype).to(like.device)
        blocks = [torch.eye(self.shape[0], width, dtype=like.dtype, device=like.device) * scale for scale, width in zip(self.scales, self.widths, strict=True)]
        return torch.cat(blocks, 1)


@dataclass(frozen=True)
class AddBuffer(Beside):
    """`target [shape]`, zeros of `dtype` at the place of `like`, which stays as it is: a buffer, which no optimizer sees.

    `exact`: whether the model is the same without it, whatever it comes to hold. Otherwise there is no way back.
    """

    target: str
    like: str
    shape: tuple[int, ...]
    dtype: str
    exact: bool = True

    kind = "add_buffer"
    makes_buffers = True

    def __post_init__(self):
        object.__setattr__(self, "shape", tuple(self.shape))
        if not isinstance(getattr(torch, self.dtype, None), torch.dtype):
            raise FtcError(f"{self.target!r} cannot be of dtype {self.dtype!r}; use one of torch's, such as float32")

    @property
    def has_inverse(self) -> bool:
        return self.exact

    def own_dtypes(self) -> set[torch.dtype]:
        return {getattr(torch, self.dtype)}

    def _value(self, like: torch.Tensor) -> torch.Tensor:
        return like.new_zeros(self.shape, dtype=getattr(torch, self.dtype))


@dataclass(frozen=True)
class Drop(Lens):
    """`source` is gone."""

    source: str

    kind = "drop"
    moments = "reset"
    targets = ()

    @property
    def sources(self) -> tuple[str, ...]:
        return (self.source,)

    def with_prefix(self, prefix: str) -> "Drop":
        return replace(self, source=prefix + self.source)

    def backward(self, tensors: Tensors) -> Tensors:
        return dict(tensors)

    def backward_moments(self, exp_avg: Tensors, exp_avg_sq: Tensors) -> tuple[Tensors, Tensors]:
        return dict(exp_avg), dict(exp_avg_sq)

    def _apply(self, values: list[torch.Tensor]) -> list[torch.Tensor]:
        return []
