"""Rounding that knows the inputs: weights of a product chosen so that its results, not the weights themselves, change least.

With H = E[x x^T] over calibration text, the results of a row w change by tr-form

    loss(w') = (w - w') H (w - w')^T,         w' = (codes - zero) scale

and that is minimised in three steps, each of which can only lower it on the grid it has:

    scales    of each block, the best of a few shares of its largest element by diag(H), or a little narrower for integers
    feedback  columns one after the other, each error pushed onto the columns that are still free (GPTQ: Frantar et al. 2023, arXiv:2210.17323, algorithm 1),
              those with the largest H_jj first
    descent   every column again at its best value given all others, in turns with scales by least squares (QuantEase: Behdin et al. 2023,
              arXiv:2309.01885); a turn that does not lower the loss is the last

H may be weighed by how much the model's answer hangs on the results (`ftc.quantize.statistics`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ftc.dialect.quantized_linear import spread
from ftc.quantize.formats import Format, Quantised, blocks

SHARES = tuple(1.0 - 0.025 * i for i in range(21))  # of the largest element, for integers
FP8_SHARES = tuple(2.0 ** (-i / 12) for i in range(12))  # one octave: FP8 repeats itself from power of two to power of two
DAMP = 0.01  # of the mean of diag(H), added to it: directions that the text does not show are not free
COLUMNS = 64  # worked on between two products over all columns
TURNS = 6


@dataclass
class _Rows:
    """The state of a rounding: W [F, D], H [D, D], codes [F, D] (numbers), scale and zero by block."""

    weight: Tensor
    hessian: Tensor
    format: Format
    scale: Tensor
    zero: Tensor | None
    codes: Tensor | None = None

    @property
    def wide_scale(self) -> Tensor:
        return spread(self.scale, self.format.block(self.weight.shape), *self.weight.shape).to(self.weight.dtype).expand(self.weight.shape)

    @property
    def wide_zero(self) -> Tensor | float:
        return 0.0 if self.zero is None else spread(self.zero, self.format.block(self.weight.shape), *self.weight.shape).to(self.weight.dtype).expand(self.weight.shape)

    def value(self) -> Tensor:
        return (self.codes - self.wide_zero) * self.wide_scale

    def loss(self) -> float:
        error = self.weight - self.value()
        return float(((error @ self.hessian) * error).sum())


def calibrated(weight: Tensor, hessian: Tensor, format: Format, turns: int = TURNS) -> Quantised:
    """A weight [F, D] in `format`, rounded for inputs of second moment `hessian` [D, D]; see the module's docstring.

    Computed in float32 (float64 for such a weight) on the weight's device. Never worse by `loss` than round to nearest. Mutates nothing.
    """
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    hessian = _damped(hessian.to(weight.device, wide))
    plain_scale, plain_zero = format.scales(weight)
    found = []
    for search in (True, False):
        scale, zero = _searched(weight.to(wide), hessian.diagonal(), format, plain_scale, plain_zero) if search else (plain_scale, plain_zero)
        rows = _Rows(weight.to(wide), hessian, format, scale, zero)
        rows.codes = _feedback(rows)
        _descend(rows, turns)
        found.append((rows.loss(), rows))
    nearest = _Rows(weight.to(wide), hessian, format, plain_scale, plain_zero, format.codes(weight, plain_scale, plain_zero).to(wide))
    _, best = min([*found, (nearest.loss(), nearest)], key=lambda each: each[0])
    return format.encode(best.codes, best.scale, best.zero)


def _damped(hessian: Tensor) -> Tensor:
    mean = hessian.diagonal().mean().clamp_min(torch.finfo(hessian.dtype).tiny ** 0.5)
    return hessian + torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device) * (DAMP * mean)


def _searched(weight: Tensor, importance: Tensor, format: Format, scale: Tensor, zero: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """For each block the share of `scale` whose rounding to nearest loses least, columns weighed by diag(H)."""
    block, best, found = format.block(weight.shape), None, scale
    for share in FP8_SHARES if format.dtype == "fp8" else SHARES:
        tried = (scale * share).to(scale.dtype)
        wide = spread(tried, block, *weight.shape).to(weight.dtype)
        offset = 0.0 if zero is None else spread(zero, block, *weight.shape).to(weight.dtype)
        error = ((format.snap(weight / wide + offset) - offset) * wide - weight).square() * importance
        lost = blocks(error, block).sum((-3, -1))
        better = torch.ones_like(lost, dtype=torch.bool) if best is None else lost < best
        best = lost if best is None else torch.where(better, lost, best)
        found = torch.where(better, tried, found)
    return found, zero


def _feedback(rows: _Rows) -> Tensor:
    """GPTQ: codes [F, D] column by column, the error of each spread over those that follow by the Cholesky factor of H^-1."""
    order = rows.hessian.diagonal().argsort(descending=True, stable=True)
    weight, scale = rows.weight[:, order].clone(), rows.wide_scale[:, order]
    zero = rows.wide_zero if rows.zero is None else rows.wide_zero[:, order]
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(rows.hessian[order][:, order]))
    upper = torch.linalg.cholesky(inverse, upper=True)
    codes = torch.empty_like(weight)
    for start in range(0, weight.shape[1], COLUMNS):
        end = min(start + COLUMNS, weight.shape[1])
        errors = weight.new_empty(weight.shape[0], end - start)
        for column in range(start, end):
            offset = zero if rows.zero is None else zero[:, column]
            codes[:, column] = rows.format.snap(weight[:, column] / scale[:, column] + offset)
            error = (weight[:, column] - (codes[:, column] - offset) * scale[:, column]) / upper[column, column]
            weight[:, column + 1 : end] -= error[:, None] * upper[column, column + 1 : end]
            errors[:, column - start] = error
        weight[:, end:] -= errors @ upper[start:end, end:]
    found = torch.empty_like(codes)
    found[:, order] = codes
    return found


def _descend(rows: _Rows, turns: int) -> None:
    """Scales by least squares and every column again, in turns, in place; what does not lower the loss is taken back."""
    last = rows.loss()
    for _ in range(turns):
        before = rows.codes.clone(), rows.scale
        _fit_scales(rows)
        _columns_again(rows)
        found = rows.loss()
        if not found < last * (1 - 1e-4):
            if not found < last:
                rows.codes, rows.scale = before
            return
        last = found


def _columns_again(rows: _Rows) -> None:
    """Each column at its best value given all others: the minimum of a parabola, so the code nearest to where that lies."""
    scale, zero, value = rows.wide_scale, rows.wide_zero, rows.value()
    for start in range(0, value.shape[1], COLUMNS):
        part = slice(start, min(start + COLUMNS, value.shape[1]))
        pull = (rows.weight - value) @ rows.hessian[:, part]  # minus half the gradient
        inner = rows.hessian[part, part]
        for at, column in enumerate(range(part.start, part.stop)):
            offset = 0.0 if rows.zero is None else zero[:, column]
            wanted = value[:, column] + pull[:, at] / inner[at, at]
            rows.codes[:, column] = rows.format.snap(wanted / scale[:, column] + offset)
            made = (rows.codes[:, column] - offset) * scale[:, column]
            pull -= (made - value[:, column])[:, None] * inner[at]
            value[:, column] = made


def _fit_scales(rows: _Rows) -> None:
    """The scale of each block by least squares given codes and all other scales; one column of blocks after the other."""
    block, codes = rows.format.block(rows.weight.shape), rows.codes - rows.wide_zero
    width = min(block[1], rows.weight.shape[1])
    for at in range(rows.scale.shape[1]):
        part = slice(at * width, min((at + 1) * width, rows.weight.shape[1]))
        pull = (((rows.weight - codes * rows.wide_scale) @ rows.hessian[:, part]) * codes[:, part]).sum(1)
        size = ((codes[:, part] @ rows.hessian[part, part]) * codes[:, part]).sum(1)
        pull, size = (_by_rows(each, block[0], rows.scale.shape[0]) for each in (pull, size))
        change = torch.where(size > 0, pull / size.clamp_min(torch.finfo(size.dtype).tiny), 0)
        fitted = (rows.scale[:, at].to(change.dtype) + change).to(rows.scale.dtype)
        rows.scale = rows.scale.clone()
        rows.scale[:, at] = torch.where((fitted > 0) & torch.isfinite(fitted), fitted, rows.scale[:, at])


def _by_rows(values: Tensor, rows: int, count: int) -> Tensor:
    """Sums of so many rows each."""
    if rows == 1:
        return values
    return torch.nn.functional.pad(values, (0, rows * count - len(values))).view(count, rows).sum(1)
