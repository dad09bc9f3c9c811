"""How an attention becomes latent: which key components keep RoPE, what the latent holds, and the matrices that follow.

For every RoPE frequency f an invertible complex T_f [G, G] mixes the keys of all groups, which no rotation notices: k' = T_f k, and a head of group g reads
q'_j = q conj((T_f^-1)_gj). Pairs (f, j) in `kept` go into the shared rotated key part; what is left of the keys,

    rest_g = k_g - sum over kept j of (T_f^-1)_gj k'_j,     read without RoPE by c_hf q_hf,

goes with the values into one latent, c = encode_z [rest; v], decoded by decode_z. With all pairs kept nothing is left but values, and all is exact.

    q_h     = query_h (W_Q,h x) = [c q; q'_kept]           query [H, N + E, K]
    a       = encode (W_K x, W_V x) = [latent; k'_kept]    encode [L + E, G (K + M)]
    k, v    = decode latent                                decode [G (N + M), L]
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ftc.rewrite.attention_site import pair_places
from ftc.rewrite.latent_statistics import HeadSizes

# Shapes: H heads, G groups, K head, M value, N = K or 0 the part without RoPE, E = 2 x kept pairs, L latent, F frequencies.


@dataclass(frozen=True, eq=False)
class LatentPlan:
    """Matrices as in the module's docstring, float64 on the CPU. `frequencies` of the kept pairs in their order; `keep` [G K, E] gives the kept part of the
    keys back; `shift` [H M] is the constant that the attention's result lacks, None for none."""

    sizes: HeadSizes
    query: Tensor
    encode: Tensor
    decode: Tensor
    keep: Tensor
    frequencies: tuple[int, ...]
    shift: Tensor | None = None
    exact: bool = False

    @property
    def latent(self) -> int:
        """L."""
        return self.decode.shape[1]

    @property
    def rotated(self) -> int:
        """E."""
        return 2 * len(self.frequencies)

    @property
    def unrotated(self) -> int:
        """N."""
        return self.query.shape[1] - self.rotated

    @property
    def cache_elements(self) -> int:
        """Numbers that a cache keeps for a token."""
        return self.latent + self.rotated

    def about(self) -> dict:
        """JSON-ready: what a report shows of it."""
        return {"rope": self.rotated, "latent": self.latent, "cache_elements": self.cache_elements, "frequencies": list(self.frequencies)}

    def rotated_places(self) -> list[tuple[int, int]]:
        """Where the real and imaginary part of each kept pair stand in the rotated part."""
        return pair_places(self.rotated, self.rotated, self.sizes.interleaved)[0]

    def table_columns(self) -> list[int]:
        """Columns of the original cos and sin tables, for each element of the rotated part."""
        theirs, _ = pair_places(self.sizes.rotary, self.sizes.width, self.sizes.interleaved)
        columns = [0] * self.rotated
        for (real, imaginary), f in zip(self.rotated_places(), self.frequencies, strict=True):
            columns[real], columns[imaginary] = theirs[f]
        return columns


@dataclass(frozen=True, eq=False)
class Latent:
    """c = encode z, z ~ decode c, with z = [rest of the keys; values] [G (K + M)]; `mean` of z where it is left out, else None."""

    encode: Tensor  # [L, G (K + M)]
    decode: Tensor  # [G (K + M), L]
    mean: Tensor | None = None


def make_plan(sizes: HeadSizes, mix: Tensor, kept: list[tuple[int, int]], constants: Tensor, latent: Latent, exact: bool = False) -> LatentPlan:
    """The matrices. mix complex [F, G, G], `kept` pairs (f, j) in order, constants complex [H, F]."""
    nothing_left = len(kept) == sizes.frequencies * sizes.groups and sizes.rotary == sizes.width
    into, back, query_pe = kept_parts(sizes, mix, kept)
    rotated = 2 * len(kept)
    rest = torch.eye(sizes.keys, dtype=torch.float64) - back @ into
    encode = torch.cat([latent.encode[:, : sizes.keys] @ rest, latent.encode[:, sizes.keys :]], 1)
    keys, values = latent.decode[: sizes.keys].unflatten(0, (sizes.groups, -1)), latent.decode[sizes.keys :].unflatten(0, (sizes.groups, -1))
    query = query_pe if nothing_left else torch.cat([_unrotated_query(sizes, constants), query_pe], 1)
    decode = values if nothing_left else torch.cat([keys, values], 1)
    encode = torch.cat([encode, torch.cat([into, into.new_zeros(rotated, sizes.values)], 1)])
    return LatentPlan(sizes, query, encode, decode.flatten(0, 1), back, tuple(f for f, _ in kept), _shift(sizes, latent), exact)


def kept_parts(sizes: HeadSizes, mix: Tensor, kept: list[tuple[int, int]]) -> tuple[Tensor, Tensor, Tensor]:
    """The kept key components from the keys [E, G K], their contribution to the keys [G K, E], and the queries' map to them [H, E, K]."""
    inverse = torch.linalg.inv(mix) if sizes.frequencies else mix
    rotated, per_group = 2 * len(kept), sizes.heads // sizes.groups
    order = pair_places(rotated, rotated, sizes.interleaved)[0]
    theirs, _ = pair_places(sizes.rotary, sizes.width, sizes.interleaved)
    into, back = torch.zeros(rotated, sizes.keys, dtype=torch.float64), torch.zeros(sizes.keys, rotated, dtype=torch.float64)
    query = torch.zeros(sizes.heads, rotated, sizes.width, dtype=torch.float64)
    for place, (f, j) in zip(order, kept, strict=True):
        for g in range(sizes.groups):
            columns = [g * sizes.width + at for at in theirs[f]]
            _put(into, place, columns, mix[f, j, g])
            _put(back, columns, place, inverse[f, g, j])
            for h in range(g * per_group, (g + 1) * per_group):
                _put(query[h], place, theirs[f], inverse[f, g, j].conj())
    return into, back, query


def _put(matrix: Tensor, rows, columns, number: Tensor) -> None:
    """A complex number as the 2 x 2 matrix that multiplies a pair by it."""
    real, imaginary = float(number.real), float(number.imag)
    if real == imaginary == 0:
        return
    matrix[rows[0], columns[0]], matrix[rows[0], columns[1]] = real, -imaginary
    matrix[rows[1], columns[0]], matrix[rows[1], columns[1]] = imaginary, real


def _unrotated_query(sizes: HeadSizes, constants: Tensor) -> Tensor:
    """[H, K, K]: each pair of a query times its constant; what RoPE leaves alone as it is."""
    theirs, _ = pair_places(sizes.rotary, sizes.width, sizes.interleaved)
    query = torch.eye(sizes.width, dtype=torch.float64).repeat(sizes.heads, 1, 1)
    for h in range(sizes.heads):
        for f, at in enumerate(theirs):
            _put(query[h], at, at, constants[h, f])
    return query


def _shift(sizes: HeadSizes, latent: Latent) -> Tensor | None:
    """[H M]: what the decoded values lack of their mean. A constant of the keys changes no softmax."""
    if latent.mean is None:
        return None
    lacking = (latent.mean - latent.decode @ (latent.encode @ latent.mean))[sizes.keys :]
    return lacking.unflatten(0, (sizes.groups, -1)).repeat_interleave(sizes.heads // sizes.groups, 0).flatten()


def full_plan(sizes: HeadSizes) -> LatentPlan:
    """Everything kept: every pair with RoPE as it is, the rest of the keys and the values as the latent. Exact, and no smaller."""
    mix = torch.eye(sizes.groups, dtype=torch.complex128).repeat(sizes.frequencies, 1, 1)
    kept = [(f, j) for j in range(sizes.groups) for f in range(sizes.frequencies)]
    rows = [g * sizes.width + at for g in range(sizes.groups) for at in range(sizes.rotary, sizes.width)]
    rows += range(sizes.keys, sizes.keys + sizes.values)
    encode = torch.eye(sizes.keys + sizes.values, dtype=torch.float64)[rows]
    return make_plan(sizes, mix, kept, torch.ones(sizes.heads, sizes.frequencies, dtype=torch.complex128), Latent(encode, encode.mT.contiguous()), exact=True)


def trial_plan(sizes: HeadSizes, seed: int, all_kept: bool) -> LatentPlan:
    """A plan that loses nothing, of random matrices: every pair kept, or some of them (then only as long as nothing is rotated)."""
    generator = torch.Generator().manual_seed(seed)

    def unitary(count: int, size: int, dtype: torch.dtype) -> Tensor:
        return torch.linalg.qr(torch.randn(count, size, size, generator=generator, dtype=dtype))[0]

    mix = unitary(max(sizes.frequencies, 1), sizes.groups, torch.complex128)[: sizes.frequencies]
    mix = mix * (0.5 + torch.rand(sizes.frequencies, 1, sizes.groups, generator=generator, dtype=torch.float64))
    kept = [(f, j) for j in range(sizes.groups) for f in range(sizes.frequencies)]
    order = torch.randperm(len(kept), generator=generator).tolist()
    kept = [kept[i] for i in (order if all_kept else order[: len(kept) // 2])]
    total = sizes.keys + sizes.values
    rows = list(range(total))
    if all_kept:
        rows = [g * sizes.width + at for g in range(sizes.groups) for at in range(sizes.rotary, sizes.width)] + rows[sizes.keys :]
    turn = unitary(1, len(rows), torch.float64)[0]
    encode = torch.zeros(len(rows), total, dtype=torch.float64)
    encode[:, rows] = turn
    ones = torch.ones(sizes.heads, sizes.frequencies, dtype=torch.complex128)
    return make_plan(sizes, mix, kept, ones, Latent(encode, encode.mT.contiguous()), exact=all_kept)
