"""What is lost when one product (or one layer) alone is quantised, in each of several formats: KL to the original, measured on text.

A small loss adds up: with e_i what unit i changes in the answer, KL is to second order E[(sum_i e_i)^2] / 2, and errors of different units are nearly
uncorrelated, so that the loss of many is the sum of their losses times a factor near 1, which is measured (`ftc.quantize.budget`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from ftc.capture.program import Program
from ftc.quantize.calibrate import calibrate
from ftc.quantize.formats import Format, why_not
from ftc.quantize.sites import Site, find_sites
from ftc.quantize.trial import Loss, Store, Trials
from ftc.rewrite.calibration import Batches

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Unit:
    """What gets one format: the weights of one product of a region (of the experts of a mixture), or of all products of a layer.

    `shapes` of the weights, `dtype` theirs; `reads`: the widest input."""

    region: str
    weights: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    dtype: torch.dtype

    @property
    def name(self) -> str:
        word = self.weights[0].removesuffix(".weight") if len(self.weights) == 1 else "experts" if any(len(s) == 3 for s in self.shapes) else "layer"
        return f"{self.region}.{word}"

    def num_bytes(self, format: Format | None) -> int:
        """In a format; as they are where it is None."""
        return sum(torch.Size(s).numel() * self.dtype.itemsize if format is None else format.num_bytes(s, self.dtype) for s in self.shapes)

    def takes(self, format: Format) -> bool:
        return all(why_not(format, shape) is None for shape in self.shapes)

    @property
    def width(self) -> int:
        return max(shape[-1] for shape in self.shapes)


@dataclass
class Sensitivity:
    """KL by unit and format, nats a token, and the bytes of each; in the order of the program."""

    units: list[Unit]
    formats: list[Format]
    kl: dict[tuple[Unit, str], float] = field(default_factory=dict)
    tokens: int = 0

    def lost(self, unit: Unit, format: Format | None) -> float:
        return 0.0 if format is None else max(self.kl[unit, format.name], 0.0)

    def options(self, unit: Unit) -> list[Format | None]:
        """What it may have: the formats that it takes, and none."""
        return [*(f for f in self.formats if (unit, f.name) in self.kl), None]

    def as_dict(self) -> dict:
        """JSON-ready."""
        rows = [
            {"unit": u.name, "region": u.region, "bytes": u.num_bytes(None), "formats": {f.name: {"kl": self.lost(u, f), "bytes": u.num_bytes(f)} for f in self.options(u) if f}}
            for u in self.units
        ]
        return {"formats": [f.name for f in self.formats], "tokens": self.tokens, "units": rows}


def find_units(program: Program, by: str, wanted: Callable[[Site], bool] = lambda site: True) -> list[Unit]:
    """The units of a program's regions: its products, or ("layer") all products of a region together. `wanted` says which sites count."""
    units = []
    for region in program.regions:
        variant = next(iter(region.code.all_variants()), None)
        sites = [] if variant is None else [s for s in find_sites(variant.captured.graph)[0] if wanted(s)]
        found = [Unit(region.ftc_name, s.names, tuple(tuple(s.shape(i)) for i in range(len(s.names))), s.weights[0].meta["val"].dtype) for s in sites]
        if by == "layer" and found:
            found = [Unit(region.ftc_name, sum((u.weights for u in found), ()), sum((u.shapes for u in found), ()), found[0].dtype)]
        units += found
    return units


def assignments(choice: Mapping[Unit, Format | None]) -> dict[str, dict[str, Format]]:
    """A choice by unit as region -> weight -> format, those that stay left out."""
    found: dict[str, dict[str, Format]] = {}
    for unit, format in choice.items():
        if format is not None:
            found.setdefault(unit.region, {}).update(dict.fromkeys(unit.weights, format))
    return found


def measure(
    program: Program, units: Sequence[Unit], formats: Sequence[Format], text: Batches, apart: Batches, nearest: bool = False, tell: Tell = lambda text: None
) -> tuple[Sensitivity, Trials, Loss]:
    """The sensitivity of each unit to each format that it takes: rounded on `text` as if it were the only one, measured on `apart`."""
    store = Store()
    wanted: dict[str, dict[str, list[Format]]] = {}
    for unit in units:
        for weight in unit.weights:
            wanted.setdefault(unit.region, {})[weight] = [f for f in formats if unit.takes(f)]
    calibrate(program, wanted, text, store, sequential=False, nearest=nearest, tell=tell)
    trials = Trials(program, store)
    loss = Loss(trials, apart)
    found = Sensitivity(list(units), list(formats), tokens=loss.tokens)
    for number, unit in enumerate(units, 1):
        tell(f"sensitivity of {unit.name} ({number} of {len(units)})")
        for format in formats:
            if unit.takes(format):
                found.kl[unit, format.name] = loss.of(assignments({unit: format}))
    return found, trials, loss
