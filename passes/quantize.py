"""quantize: weights in 8 or 4 bits, for serving.

    x W^T  ->  Q(x) W'^T,      W' = (codes - zero) scale by block,      Q the identity, or FP8

FP8 (e4m3), INT8 and INT4, with a scale a tensor, row, block of 128 x 128 or group of columns; activations as they are, or in FP8 with scales found while
running or on calibration text. With calibration text weights are rounded so that the products' results change least (`ftc.quantize.rounding`), each for what
the rounded program before it gives (`ftc.quantize.calibrate`); without, to nearest, with torchao's numbers. `max_kl` without `dtype` chooses for each product
the cheapest format that keeps the whole within the bound (`ftc.quantize.budget`).

What is lost is measured as KL(original || quantised) on text apart. What is proved is the construction: the rewritten graph is the one that the formats
make, and without rounding of activations it computes what the original does with dequantised weights, outputs and gradients.
"""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass, field, replace
from typing import ClassVar

from torch import fx

from ftc.errors import FtcError, nearest
from ftc.quantize.formats import Format
from ftc.quantize.plan import Plan, plan_formats
from ftc.quantize.proof import prove
from ftc.quantize.sites import Choice, Site, convert
from ftc.rewrite.calibration import as_batches
from ftc.rewrite.outcome import Outcome
from ftc.rewrite.passes import Pass, check_max_kl

ROUNDINGS = ("auto", "nearest", "calibrated")


@dataclass(frozen=True)
class Quantize(Pass):
    """The pass; see the module's docstring."""

    dtype: str | None = field(default=None, metadata={"help": "fp8, int8 or int4; left out, max_kl chooses among `formats`"})
    granularity: str | None = field(default=None, metadata={"help": "what shares a scale: tensor, row, block (128 x 128) or group; default: row, int4 group"})
    group: int = field(default=32, metadata={"help": "columns of a group; the last of a row may be shorter"})
    zero: bool | None = field(default=None, metadata={"help": "zero points for groups; default: for int4"})
    activations: str = field(default="none", metadata={"help": "none, or FP8 activations with dynamic or static (calibrated) scales"})
    rounding: str = field(default="auto", metadata={"help": "nearest, or calibrated on text; auto: calibrated where there is text"})
    max_kl: float | None = field(default=None, metadata={"help": "the most that may be lost, nats a token; past it the model stays as it was"})
    formats: list = field(default_factory=lambda: ["int4", "int8"], metadata={"help": "what max_kl chooses among where no dtype is given, such as int4-g64 or fp8"})
    by: str = field(default="product", metadata={"help": "what max_kl gives one format, and sensitivity is measured of: product or layer"})
    sensitivity: bool = field(default=False, metadata={"help": "measure what each product or layer loses alone, also where dtype is given"})
    head: bool = field(default=False, metadata={"help": "quantise the output head too, to nearest by row"})
    embedding: bool = field(default=False, metadata={"help": "quantise the embedding too, to nearest by row"})
    keep: list = field(default_factory=list, metadata={"help": "weights that stay, by name or pattern, such as *.down_proj.weight"})

    name: ClassVar[str] = "quantize"
    summary: ClassVar[str] = "weights of products in FP8, INT8 or INT4, rounded on calibration text, chosen by what they lose"
    contract: ClassVar[str] = "lossy"
    inverse: ClassVar[bool] = False
    requires: ClassVar[tuple[str, ...]] = ("raise-moe",)

    def __post_init__(self):
        for word, value, valid in (("rounding", self.rounding, ROUNDINGS), ("by", self.by, ("product", "layer"))):
            if value not in valid:
                raise ValueError(f"{word} = {value!r} is not known; {nearest(value, valid)}")
        check_max_kl(self.max_kl)
        if self.dtype is None and self.max_kl is None:
            raise ValueError("say how: dtype = fp8, int8 or int4, or max_kl = ... to have formats chosen by what they lose")
        if self.group < 2:
            raise ValueError(f"group = {self.group} is not a number of columns that can share a scale; use 2 or more")
        if self.dtype is None and not self.formats:
            raise ValueError("formats is empty; name some to choose among, such as [int4, int8]")
        _ = self.candidates

    @property
    def candidates(self) -> list[Format]:
        """The formats to choose among; one where `dtype` is given."""
        if self.dtype is not None:
            return [Format.of(self.dtype, self.granularity, self.group, self.zero, self.activations)]
        found = [Format.named(str(name)) for name in self.formats]
        return [replace(f, activations=self.activations) if f.dtype == "fp8" else f for f in found]

    def wanted(self, site: Site) -> bool:
        """Whether the options quantise a site at all."""
        allowed = {"linear": True, "experts": True, "head": self.head, "embedding": self.embedding}[site.kind]
        return allowed and not any(fnmatch.fnmatch(name, pattern) for name in site.names for pattern in self.keep)

    def apply(self, graph: fx.Graph) -> Outcome:
        """Without a plan: to nearest, the first of the candidates; head and embedding by row in any case."""
        format = self.candidates[0]

        def choose(kind: str, name: str, shape: list[int]) -> Format | None:
            allowed = {"linear": self.dtype is not None, "experts": self.dtype is not None, "head": self.head, "embedding": self.embedding}[kind]
            if not allowed or any(fnmatch.fnmatch(name, pattern) for pattern in self.keep):
                return None
            by_row = Format("fp8" if format.dtype == "fp8" else "int8")
            return by_row if kind in ("head", "embedding") else format

        return convert(graph, Choice(choose))

    def prove(self, before: fx.Graph, after: fx.Graph, earlier: list[dict] | None = None) -> list[dict]:
        return prove(before, after, earlier)

    def calibrate(self, program, calibration, tell=lambda text: None, check=True) -> dict[str, Plan] | None:
        """A plan for each region; None without text where none is needed. FtcError where it is needed, or too little, and where no block repeats."""
        needs = self.dtype is None or self.rounding == "calibrated" or self.activations == "static" or self.sensitivity or self.max_kl is not None
        if calibration is None and not needs:
            return None
        batches = as_batches(calibration, what=f"pass {self.name}")
        if not program.regions:
            if not needs:
                return None
            raise FtcError(f"pass {self.name}: the model has no repeated blocks, which calibration goes through one by one; give dtype and rounding = nearest")
        return plan_formats(self, program, batches, tell)
