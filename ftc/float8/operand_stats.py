"""What a cast to float8 does to a matrix, in numbers: scales, what saturates, what underflows, the rounding error."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ftc.errors import FtcError
from ftc.float8.cast import amax_of, scale_of, with_scale
from ftc.float8.recipes import BLOCK, E4M3, FINE, Cast, recipe_of

SHORT = {torch.float8_e4m3fn: "e4m3", torch.float8_e5m2: "e5m2"}
_OF_ZEROS = 2.0**47  # below 448 / 1e-12, what an amax of 0 gives


@dataclass
class OperandStats:
    """Sums over matrices. Shares are of numbers that are not zero: `saturated`, beyond the format's largest once scaled (0 wherever the scale is made from the
    matrix itself); `underflow`, rounded to 0. `error`: root mean square of the rounding over that of the numbers. Scales multiply the numbers."""

    format: str
    scaling: str
    lowest: float = float("inf")
    highest: float = 0.0
    amax: float = 0.0
    saturated: int = 0
    underflow: int = 0
    count: int = 0
    squares: float = 0.0
    errors: float = 0.0

    def add(self, x: Tensor, scaled: Tensor, scale: Tensor, back: Tensor, largest: float) -> None:
        """One matrix: the numbers, those times their scale, the scales, what comes back."""
        live = x != 0
        used = scale[scale < _OF_ZEROS]  # rows of zeros have a scale as well
        if used.numel():
            self.lowest, self.highest = min(self.lowest, float(used.min())), max(self.highest, float(used.max()))
        self.amax = max(self.amax, float(x.abs().max()))
        self.saturated += int((scaled.abs() > largest * (1 + 2.0**-12)).sum())  # a scale is rounded to float32
        self.underflow += int(((back == 0) & live).sum())
        self.count += int(live.sum())
        self.squares += float(x.double().square().sum())
        self.errors += float((back.double() - x.double()).square().sum())

    def as_dict(self) -> dict:
        """JSON-ready."""
        count, lowest = max(self.count, 1), self.lowest if self.lowest <= self.highest else 0.0
        return {
            "format": self.format, "scaling": self.scaling, "scale_lowest": lowest, "scale_highest": self.highest, "amax": self.amax,
            "saturated": self.saturated / count, "underflow": self.underflow / count, "error": (self.errors / max(self.squares, 1e-300)) ** 0.5,
        }  # fmt: skip


def operand_casts(recipe: str) -> dict[str, Cast | str]:
    """How each operand of the three products is cast, by a name; "tiles" and "blocks" for the fine-grained recipe."""
    if recipe == FINE:
        return {"x": "tiles", "weight": "blocks", "gradient": "tiles", "x for dW": "turned tiles", "gradient for dW": "turned tiles"}
    casts = recipe_of(recipe)
    found = {"x": casts.x, "weight": casts.weight, "gradient": casts.grad}
    if casts.weight_for_dx != casts.weight:
        found["weight for dx"] = casts.weight_for_dx
    if casts.x_for_dw is not None and casts.x_for_dw != casts.x:
        found |= {"x for dW": casts.x_for_dw}
    if casts.grad_for_dw is not None and casts.grad_for_dw != casts.grad:
        found |= {"gradient for dW": casts.grad_for_dw}
    return found


def empty(cast: Cast | str) -> OperandStats:
    """Statistics of no matrix yet."""
    if isinstance(cast, str):
        return OperandStats("e4m3", "a scale for 128 x 128" if cast == "blocks" else "a scale for 1 x 128")
    return OperandStats(SHORT[cast.dtype], cast.scaling + (", powers of two" if cast.power_of_two else ""))


@torch.no_grad()
def look(stats: OperandStats, x: Tensor, cast: Cast | str, where: str) -> None:
    """Add a matrix x [M, N]. FtcError where it holds numbers that are not finite: no scale fits them."""
    if not bool(torch.isfinite(x).all()):
        raise FtcError(f"{where} holds numbers that are not finite; float8 has no scale for them")
    if isinstance(cast, str):
        x, cast = _by_blocks(x.t() if cast.startswith("turned") else x, 128 if cast == "blocks" else 1), Cast(E4M3, -1)
    scale = scale_of(amax_of(x, cast), cast)
    back = with_scale(x, scale, cast.dtype).float() / scale
    stats.add(x, x.float() * scale, scale, back, torch.finfo(cast.dtype).max)


def _by_blocks(x: Tensor, rows: int) -> Tensor:
    """x [M, N] filled up with zeros, a row for each block of `rows` x 128."""
    filled = torch.nn.functional.pad(x, (0, -x.shape[1] % BLOCK, 0, -x.shape[0] % rows))
    return filled.unflatten(0, (-1, rows)).unflatten(2, (-1, BLOCK)).transpose(1, 2).flatten(2).flatten(0, 1)
