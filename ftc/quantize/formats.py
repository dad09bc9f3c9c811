"""How the weights of a product may be stored: a dtype, the block of weights that shares a scale, and what happens to the activations before it.

Round to nearest gives the numbers of torchao 0.18: FP8 scales are amax / 448, symmetric integers amax / 127.5 (INT8) and amax / 7.5 (INT4), integers with a
zero point (max - min) / 15, all computed in the weight's dtype; FP8 and INT8 scales are kept in float32, those of groups in the weight's dtype.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from ftc.dialect.quantized_linear import (
    ACTIVATIONS,
    DTYPES,
    FP8_COLUMNS,
    FP8_LARGEST,
    LIMITS,
    SMALLEST_SCALE,
    dequantize,
    pack_int4,
    spread,
)
from ftc.errors import FtcError, nearest

GRANULARITIES = ("tensor", "row", "block", "group")
_NAME = re.compile(r"(fp8|int8|int4)(?:-(tensor|row|block|g(\d+)))?(-zero|-symmetric)?(?:-(dynamic|static))?")
# torchao's smallest scales: those of float32 for INT8, of the weight's dtype for groups.
_EPS = torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class Quantised:
    """A weight [.., F, D] in a format: `data`, `scale` [.., R, C], and `zero` beside it or None."""

    data: Tensor
    scale: Tensor
    zero: Tensor | None = None


@dataclass(frozen=True)
class Format:
    """One way to store weights. `granularity`: what shares a scale; `group`: columns of a group; `zero`: whether groups have zero points;
    `activations`: "none", or FP8 with scales found while running ("dynamic") or on calibration text ("static"). ValueError for what there is not."""

    dtype: str
    granularity: str = "row"
    group: int = 0
    zero: bool = False
    activations: str = "none"

    def __post_init__(self):
        for word, value, valid in (("dtype", self.dtype, DTYPES), ("granularity", self.granularity, GRANULARITIES), ("activations", self.activations, ACTIVATIONS)):
            if value not in valid:
                raise ValueError(f"{word} = {value!r} is not known; {nearest(str(value), valid)}")
        if (self.granularity == "group") != (self.group > 0):
            raise ValueError(f"a group of {self.group} columns does not go with granularity {self.granularity!r}; give group = 32 (or another size) for groups")
        if self.dtype == "int4" and self.granularity != "group":
            raise ValueError(f"int4 has a scale for each group of columns, not for each {self.granularity}; give granularity = group")
        if self.zero and (self.dtype == "fp8" or self.granularity != "group"):
            raise ValueError("zero points are for integers in groups; leave zero out, or use int4")
        if self.activations != "none" and self.dtype != "fp8":
            raise ValueError(f"activations = {self.activations!r} is for fp8; {self.dtype} is of weights only")
        if self.activations != "none" and self.granularity == "group":
            raise ValueError("FP8 activations go with weights by tensor, row or block, not by group")

    @classmethod
    def of(cls, dtype: str, granularity: str | None = None, group: int = 32, zero: bool | None = None, activations: str = "none") -> Format:
        """With the usual granularity where none is given, groups with zero points for int4, rows for the others."""
        if dtype not in DTYPES:
            raise ValueError(f"dtype = {dtype!r} is not known; {nearest(str(dtype), DTYPES)}")
        granularity = granularity or ("group" if dtype == "int4" else "row")
        return cls(dtype, granularity, group if granularity == "group" else 0, dtype == "int4" if zero is None else zero, activations)

    @classmethod
    def named(cls, name: str) -> Format:
        """The format called `name`: "fp8", "fp8-block-dynamic", "int8", "int4-g64-symmetric", ... FtcError for what is none."""
        found = _NAME.fullmatch(name)
        if found is None:
            raise FtcError(f"there is no format {name!r}; {nearest(name, ['fp8', 'fp8-block', 'fp8-tensor', 'fp8-row-dynamic', 'int8', 'int4-g32', 'int4-g64-symmetric'])}")
        dtype, kind, group, zero, activations = found.groups()
        kind = "group" if group else kind
        try:
            return cls.of(dtype, kind, int(group or 32), None if zero is None else zero == "-zero", activations or "none")
        except ValueError as error:
            raise FtcError(f"format {name!r}: {error}") from error

    @property
    def name(self) -> str:
        kind = f"g{self.group}" if self.granularity == "group" else self.granularity
        usual = self.zero == (self.dtype == "int4")
        return "-".join([self.dtype, kind, *([] if usual else ["zero" if self.zero else "symmetric"]), *([self.activations] if self.activations != "none" else [])])

    def block(self, shape: Sequence[int]) -> list[int]:
        """[rows, columns] that share a scale of a weight [.., F, D]."""
        rows, columns = int(shape[-2]), int(shape[-1])
        return {"row": [1, columns], "tensor": [rows, columns], "block": [FP8_COLUMNS, FP8_COLUMNS], "group": [1, self.group]}[self.granularity]

    def scale_shape(self, shape: Sequence[int]) -> list[int]:
        """[.., R, C]: the scales of a weight [.., F, D]; the last of a row or column may be of a ragged block."""
        rows, columns = self.block(shape)
        return [*shape[:-2], -(-int(shape[-2]) // rows), -(-int(shape[-1]) // columns)]

    def data_shape(self, shape: Sequence[int]) -> list[int]:
        return [*shape[:-1], -(-int(shape[-1]) // 2) if self.dtype == "int4" else int(shape[-1])]

    def scale_dtype(self, weight: torch.dtype) -> torch.dtype:
        return torch.float32 if self.granularity != "group" or weight == torch.float64 else weight

    def num_bytes(self, shape: Sequence[int], weight: torch.dtype) -> int:
        """Of a weight of `shape` and dtype `weight` in this format, scales and zero points counted."""
        scales = torch.Size(self.scale_shape(shape)).numel()
        return torch.Size(self.data_shape(shape)).numel() + scales * (self.scale_dtype(weight).itemsize + self.zero)

    def weights_only(self) -> Format:
        return replace(self, activations="none")

    # ------------------------------------------------------------------------------------------------------------ numbers

    def nearest(self, weight: Tensor) -> Quantised:
        """Round to nearest. FtcError for weights that are not finite, or whose scale is not."""
        scale, zero = self.scales(weight)
        return self.encode(self.codes(weight, scale, zero), scale, zero)

    def scales(self, weight: Tensor) -> tuple[Tensor, Tensor | None]:
        """The scale of each block by its largest element, and its zero point."""
        parts = blocks(weight, self.block(weight.shape))
        if weight.device.type == "meta":
            found = parts.abs().amax((-3, -1))
            return found.to(self.scale_dtype(weight.dtype)), found.to(torch.int8) if self.zero else None
        low, high = parts.amin((-3, -1)), parts.amax((-3, -1))
        if not bool(torch.isfinite(low).all() and torch.isfinite(high).all()):
            raise FtcError("the weights hold infinities or NaN, and no scale fits them")
        zero = None
        if self.dtype == "fp8":
            scale = (torch.maximum(-low, high) / FP8_LARGEST).clamp_min(SMALLEST_SCALE)
        elif self.zero:
            least, most = LIMITS[self.dtype]
            low, high = low.clamp(max=0), high.clamp(min=0)
            scale = ((high - low) / float(most - least)).clamp_min(torch.finfo(weight.dtype).eps)
            zero = (least - torch.round(low / scale)).clamp(least, most).to(torch.int8)
        else:
            least, most = LIMITS[self.dtype]
            eps = torch.finfo(weight.dtype).eps if self.granularity == "group" else _EPS
            scale = (torch.maximum(-low, high) / (float(most - least) / 2)).clamp_min(eps)
        scale = scale.to(self.scale_dtype(weight.dtype))
        if not bool(torch.isfinite(scale).all()):
            raise FtcError(f"a scale of {self.name} overflows {scale.dtype}: the largest weight is {float(torch.maximum(-low, high).max()):.3g}")
        return scale, zero

    def codes(self, weight: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        """The codes nearest to a weight [.., F, D], as numbers of its dtype (of float32 for FP8): what `dequantize` multiplies, zero point included."""
        block, (rows, columns) = self.block(weight.shape), weight.shape[-2:]
        wide = spread(scale, block, rows, columns)
        if self.dtype == "fp8":
            return self.snap((weight if weight.dtype == torch.float64 else weight.float()) / wide)
        inverse = weight * (1.0 / wide)
        added = 0 if zero is None else spread(zero, block, rows, columns)
        return (torch.round(inverse) + added).clamp(*LIMITS[self.dtype])

    def snap(self, codes: Tensor) -> Tensor:
        """The nearest codes, as numbers of the same dtype."""
        if self.dtype == "fp8":
            return codes.clamp(-FP8_LARGEST, FP8_LARGEST).to(torch.float8_e4m3fn).to(codes.dtype)
        return torch.round(codes).clamp(*LIMITS[self.dtype])

    def encode(self, codes: Tensor, scale: Tensor, zero: Tensor | None) -> Quantised:
        """Codes [.., F, D] as they are stored."""
        if codes.device.type == "meta":
            return Quantised(codes.new_empty(self.data_shape(codes.shape), dtype=DTYPES[self.dtype]), scale, zero)
        return Quantised(pack_int4(codes) if self.dtype == "int4" else codes.to(DTYPES[self.dtype]), scale, zero)

    def decode(self, stored: Quantised, width: int, dtype: torch.dtype) -> Tensor:
        """The weights [.., F, width] in `dtype`."""
        shape = [*stored.data.shape[:-1], width]
        if stored.data.device.type == "meta":
            return stored.data.new_empty(shape, dtype=dtype)
        return dequantize(stored.data, stored.scale, stored.zero, self.dtype, self.block(shape), width, dtype)


def blocks(weight: Tensor, block: Sequence[int]) -> Tensor:
    """A weight [.., F, D] as [.., R, rows, C, columns] of a block each, with zeros after what is ragged."""
    rows, columns = block
    padded = F.pad(weight, (0, -weight.shape[-1] % columns, 0, -weight.shape[-2] % rows))
    return padded.unflatten(-1, (-1, columns)).unflatten(-3, (-1, rows))


def why_not(format: Format, shape: Sequence[int]) -> str | None:
    """Why a weight of this shape cannot have the format; None where it can."""
    rows, columns = int(shape[-2]), int(shape[-1])
    if format.activations != "none" and len(shape) == 2 and (rows % 16 or columns % 16):
        return f"products with FP8 activations take sizes that 16 divides, and this weight is {rows} x {columns}"
    if format.activations == "static" and len(shape) == 3:
        return "experts have no static scales of activations; use dynamic ones"
    if format.granularity == "group" and format.group % 2 and format.dtype == "int4":
        return f"int4 packs two columns into a byte, and a group has {format.group}"
    return None
