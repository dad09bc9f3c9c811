"""The lens of a weight that is quantised: data, scale and zero point in its place, which are buffers and not trained.

There it rounds to nearest, unless values were planned for the region (calibrated rounding); back it dequantises, which is an approximation, so that it
counts as having no inverse.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ftc.errors import FtcError
from ftc.quantize.formats import Format, Quantised
from ftc.rewrite.lens import Lens, _exchange
from ftc.rewrite.lens_add import Beside


@dataclass(frozen=True)
class Quantize(Lens):
    """`source` [.., F, D] of dtype `original` becomes `source`_data, `source`_scale and, with zero points, `source`_zero in the format called `format`.

    `planned`: region -> values of the targets, taken once when a region's weights move; `region`: where the lens acts. Neither is part of what it is.
    """

    source: str
    format: str
    shape: tuple[int, ...]
    original: str
    planned: Mapping[str, dict[str, Quantised]] | None = field(default=None, compare=False, repr=False)
    region: str = field(default="", compare=False, repr=False)
    prefix: str = field(default="", compare=False, repr=False)

    kind = "quantize"
    moments = "reset"
    has_inverse = False
    makes_buffers = True

    def __post_init__(self):
        object.__setattr__(self, "shape", tuple(int(size) for size in self.shape))
        Format.named(self.format)

    @property
    def stored_as(self) -> Format:
        return Format.named(self.format)

    @property
    def sources(self) -> tuple[str, ...]:
        return (self.source,)

    @property
    def targets(self) -> tuple[str, ...]:
        return target_names(self.source, self.stored_as)

    def own_dtypes(self) -> set[torch.dtype]:
        """Of what it makes."""
        meta = torch.empty(self.shape, dtype=getattr(torch, self.original), device="meta")
        return {value.dtype for value in self._apply([meta])}

    def with_prefix(self, prefix: str) -> Quantize:
        return replace(self, source=prefix + self.source, prefix=prefix + self.prefix)

    def at(self, region: str) -> Quantize:
        return replace(self, region=region)

    def as_dict(self, tensors: dict | None = None) -> dict:
        return {"kind": self.kind, "source": self.source, "format": self.format, "shape": list(self.shape), "original": self.original}

    def forward_moments(self, exp_avg: dict, exp_avg_sq: dict) -> tuple[dict, dict]:
        """None: what is quantised is not trained."""
        return tuple({name: value for name, value in each.items() if name != self.source} for each in (exp_avg, exp_avg_sq))

    def backward_moments(self, exp_avg: dict, exp_avg_sq: dict) -> tuple[dict, dict]:
        return dict(exp_avg), dict(exp_avg_sq)

    def pull_back(self, gradients: dict) -> dict:
        """Gradients of everything else: quantised weights have none."""
        return {name: value for name, value in gradients.items() if name not in self.targets}

    def backward(self, tensors: dict) -> dict:
        """Dequantised weights in the place of the quantised ones."""
        return _exchange(self, tensors, self.targets, self.sources, self._undo)

    def _apply(self, values: list[Tensor]) -> list[Tensor]:
        if tuple(values[0].shape) != self.shape:
            raise FtcError(f"{self.source!r} has shape {list(values[0].shape)}, its quantize lens expects {list(self.shape)}")
        name = self.source.removeprefix(self.prefix)
        made = (self.planned or {}).get(self.region, {}).get(name)
        if made is None:
            try:
                made = self.stored_as.nearest(values[0])
            except FtcError as error:
                raise FtcError(f"{self.source}: {error}") from error
        place = values[0].device
        return [t.to(place, copy=True) for t in (made.data, made.scale, made.zero) if t is not None]

    def _undo(self, values: list[Tensor]) -> list[Tensor]:
        stored = Quantised(*values)
        return [self.stored_as.decode(stored, self.shape[-1], getattr(torch, self.original))]


def target_names(source: str, format: Format) -> tuple[str, ...]:
    """Names of what stands in the place of the weight `source`."""
    return tuple(f"{source}_{word}" for word in ("data", "scale", *(["zero"] if format.zero else [])))


@dataclass(frozen=True)
class InputScale(Beside):
    """`target`, a float32 buffer [1] beside `like`: the static scale of what a product reads; `scales`: region -> its value, 1 where it has none."""

    target: str
    like: str
    scales: Mapping[str, Mapping[str, float]] | None = field(default=None, compare=False, repr=False)
    region: str = field(default="", compare=False, repr=False)

    kind = "input_scale"
    moments = "bitwise"
    makes_buffers = True
    has_inverse = False

    def own_dtypes(self) -> set[torch.dtype]:
        return {torch.float32}

    def at(self, region: str) -> InputScale:
        return replace(self, region=region)

    def as_dict(self, tensors: dict | None = None) -> dict:
        return {"kind": self.kind, "target": self.target, "like": self.like}

    def _value(self, like: Tensor) -> Tensor:
        value = (self.scales or {}).get(self.region, {}).get(self.target, 1.0)
        return torch.tensor([value], dtype=torch.float32, device=like.device)
