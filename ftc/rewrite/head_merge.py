"""Several key-value heads as one: the best head that all of them can be had from, weighed by what the model's answer hangs on.

    k_g ~ B_g k',  k' = A [k_1; ..; k_r]        v_g likewise, with maps of their own

minimises tr(F (1 - B A) C (1 - B A)^T), C the second moment of the members and F that of the gradients that the answer sends them. B_g goes into what reads
the head: queries become B_g^T q, and the columns of the output product W B_g. Where RoPE turns a pair (a complex number), B_g must be a complex number
too, one for each frequency: any other map does not pass RoPE.

    values, and keys without RoPE    B any map: the principal part of F^(1/2) C F^(1/2) (Procrustes' rotation is the case in which members differ by one)
    rotated keys                     the leading Hermitian eigenvector of each frequency, then A and B in turns with all of F and C, frequencies together

Least squares shrinks members by what the merged head does not have of them; scaling them back to their norms was measured to lose 13 to 17% more (a decoder
of 8 heads, 2 and 4 in one). `pooled` is the plain mean: B_g = 1, A = [1, .., 1] / r.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ftc.rewrite.attention_site import pair_places
from ftc.rewrite.latent_statistics import HeadSizes

# Shapes: r members, W width of a head (K of keys, M of values), F frequencies.
_FLOOR = 1e-4  # of the largest eigenvalue of F: no direction is taken to be worth nothing
TURNS = 20  # of A and B, at most; on a small model one turn loses 3% more than 20
_SETTLED = 1e-4  # of the loss: a turn that takes less off it is the last


@dataclass(frozen=True)
class Merged:
    """`into` A [W, r W], `back` B [r W, W], and the loss, float64."""

    into: Tensor
    back: Tensor
    loss: float


def pooled(covariance: Tensor, fisher: Tensor, width: int) -> Merged:
    """The plain mean of the members."""
    eye = torch.eye(width, dtype=torch.float64)
    members = len(covariance) // width
    back = eye.repeat(members, 1)
    return _with_loss(covariance, fisher, back.mT / members, back)


def merged_values(covariance: Tensor, fisher: Tensor, width: int) -> Merged:
    """The best linear merge of r members of `width`, from moments [r W, r W]."""
    members = len(covariance) // width
    into, back = _principal(covariance, fisher, width)
    into, back = _even(into, back, members)
    return _with_loss(covariance, fisher, into, back)


def merged_keys(covariance: Tensor, fisher: Tensor, sizes: HeadSizes, turns: int = TURNS) -> Merged:
    """The best merge of keys that passes RoPE, from moments [r K, r K] of keys before RoPE, by at most `turns` of A and B."""
    width, members = sizes.width, len(covariance) // sizes.width
    pairs, rest = pair_places(sizes.rotary, width, sizes.interleaved)
    back = torch.zeros(members * width, width, dtype=torch.float64)
    if pairs:
        rows = torch.tensor([[[g * width + at for g in range(members)] for at in pair] for pair in pairs]).movedim(1, 0)  # [2, F, r]
        numbers = _principal(*(_hermitian(moment, *rows) for moment in (covariance, fisher)), 1)[1][..., 0]
        _write(back, rows, torch.tensor(pairs).mT[..., None], numbers)
    if rest:
        rows = [g * width + at for g in range(members) for at in rest]
        _, free = _even(*_principal(covariance[rows][:, rows], fisher[rows][:, rows], len(rest)), members)
        back[torch.tensor(rows)[:, None], torch.tensor(rest)] = free
    found = _with_loss(covariance, fisher, _best_into(back, fisher), back)
    for _ in range(turns if pairs else 0):
        back = _best_numbers(found.back, found.into, covariance, fisher, pairs, width)
        turned = _with_loss(covariance, fisher, _best_into(back, fisher), back)
        if turned.loss >= found.loss * (1 - _SETTLED):
            break
        found = turned
    return _with_loss(covariance, fisher, *_even_pairs(found.into, found.back, pairs, members))


def _with_loss(covariance: Tensor, fisher: Tensor, into: Tensor, back: Tensor) -> Merged:
    lost = torch.eye(len(covariance), dtype=torch.float64) - back @ into
    return Merged(into, back, float(((fisher @ lost) * (lost @ covariance)).sum()) / 2)


def _root(fisher: Tensor) -> tuple[Tensor, Tensor]:
    """F^(1/2) and its inverse, small eigenvalues lifted; F [.., n, n] real or Hermitian."""
    values, vectors = torch.linalg.eigh(fisher)
    root = torch.maximum(values, (values[..., -1:] * _FLOOR).clamp_min(1e-300)).sqrt()[..., None, :]
    return vectors * root @ vectors.mH, vectors / root @ vectors.mH


def _principal(covariance: Tensor, fisher: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    root, inverse = _root(fisher)
    vectors = torch.linalg.eigh(root @ covariance @ root)[1][..., -rank:]
    return vectors.mH @ root, inverse @ vectors


def _even(into: Tensor, back: Tensor, members: int) -> tuple[Tensor, Tensor]:
    """The same product in a basis in which back^T back = r: members have the norms of the merged head, as far as they can."""
    left, values, right = torch.linalg.svd(back, full_matrices=False)
    stretch = (right.mT * values) @ right / members**0.5
    return stretch @ into, members**0.5 * left @ right


def _hermitian(moment: Tensor, real: Tensor, imaginary: Tensor) -> Tensor:
    """The second moments of the pairs of all members as complex numbers, [F, r, r], from the rows of their parts [F, r]."""

    def part(left: Tensor, right: Tensor) -> Tensor:
        return moment[left[:, :, None], right[:, None]]

    return torch.complex(part(real, real) + part(imaginary, imaginary), part(imaginary, real) - part(real, imaginary))


def _write(back: Tensor, rows: Tensor, columns: Tensor, numbers: Tensor) -> None:
    """Complex numbers [F, r] as 2 x 2 matrices into B: rows [2, F, r], columns [2, F, 1]."""
    back[rows[0], columns[0]] = back[rows[1], columns[1]] = numbers.real
    back[rows[0], columns[1]], back[rows[1], columns[0]] = -numbers.imag, numbers.imag


def _best_into(back: Tensor, fisher: Tensor) -> Tensor:
    """A for B: (B^T F B)^-1 B^T F, F lifted so that nothing is worth nothing."""
    lifted = fisher + torch.eye(len(fisher), dtype=fisher.dtype) * (_FLOOR * fisher.diagonal().mean())
    return torch.linalg.solve(back.mT @ lifted @ back, back.mT @ lifted)


def _best_numbers(back: Tensor, into: Tensor, covariance: Tensor, fisher: Tensor, pairs: list[tuple[int, int]], width: int) -> Tensor:
    """B for A, its complex numbers by least squares; what is without RoPE stays."""
    members = len(back) // width
    real, imaginary = ([g * width + p[i] for g in range(members) for p in pairs] for i in (0, 1))
    rows = torch.tensor([real + real, imaginary + imaginary])
    left, right = ([p[i] for _ in range(members) for p in pairs] for i in (0, 1))
    columns = torch.tensor([left + right, right + left])
    signs = torch.ones(2, len(real) * 2, dtype=torch.float64)
    signs[0, len(real) :] = -1
    turned = set(real) | set(imaginary)
    rest = back.clone()
    rest[sorted(turned)] = 0
    z, cross = into @ covariance @ into.mT, covariance @ into.mT
    target = fisher @ (cross - rest @ z)
    normal = sum(
        signs[a][:, None] * signs[b] * fisher[rows[a]][:, rows[b]] * z[columns[a]][:, columns[b]] for a in (0, 1) for b in (0, 1)
    )
    wanted = sum(signs[a] * target[rows[a], columns[a]] for a in (0, 1))
    normal = normal + torch.eye(len(normal), dtype=normal.dtype) * (1e-10 * normal.diagonal().mean())
    numbers = torch.linalg.solve(normal, wanted)
    found = rest
    for a in (0, 1):
        found.index_put_((rows[a], columns[a]), signs[a] * numbers, accumulate=True)
    return found


def _even_pairs(into: Tensor, back: Tensor, pairs: list[tuple[int, int]], members: int) -> tuple[Tensor, Tensor]:
    """The same product with numbers of mean square 1 over the members, for each frequency."""
    scale = torch.ones(back.shape[1], dtype=torch.float64)
    for pair in pairs:
        size = float((back[:, pair[0]].square().sum() / members).sqrt())
        scale[list(pair)] = size if size > 0 else 1.0
    return into * scale[:, None], back / scale
