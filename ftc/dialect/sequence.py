"""Context parallelism: the sequence divided over ranks, and attention across the cut.

Every rank holds T/n of the T tokens. A causal query looks at all keys before it, so the last tokens cost the most: in the balanced order ("zigzag",
Brandon et al. 2023, arXiv:2311.09431; as in torchtitan) the sequence is cut into 2n chunks and rank r holds chunks r and 2n - 1 - r.

    gather_sequence     y_r = the whole sequence, in order    dx_r = sum_s dy_s[own tokens]
    sequence_attention  queries of the rank's own tokens, keys and values of the whole sequence, causal by the tokens' true positions
"""

from __future__ import annotations

import torch
from torch import Tensor

from ftc.dialect.collectives import DEFINITIONS, all_gather, reduce_scatter, standing
from ftc.dialect.library import composite
from ftc.dialect.ranks import Place, place_on
from ftc.errors import FtcError


def chunks_of(rank: int, degree: int, balanced: bool) -> list[int]:
    """Which chunks of the sequence a rank holds, in its own order."""
    return [rank, 2 * degree - 1 - rank] if balanced else [rank]


def num_chunks(degree: int, balanced: bool) -> int:
    """Into how many chunks the sequence is cut."""
    return 2 * degree if balanced else degree


def own_part(x: Tensor, dim: int, rank: int, degree: int, balanced: bool = True) -> Tensor:
    """The rank's tokens of a whole sequence along `dim`. Raises FtcError when the length cannot be divided."""
    count = num_chunks(degree, balanced)
    if x.shape[dim] % count:
        raise FtcError(f"a sequence of {x.shape[dim]} tokens cannot be cut into {count} equal chunks; pad it to a multiple of {count}")
    chunks = x.chunk(count, dim)
    return torch.cat([chunks[c] for c in chunks_of(rank, degree, balanced)], dim)


def in_order(parts: list[Tensor], dim: int, balanced: bool = True) -> Tensor:
    """The whole sequence from all ranks' parts; the inverse of `own_part`."""
    degree = len(parts)
    if not balanced:
        return torch.cat(parts, dim)
    halves = [part.chunk(2, dim) for part in parts]
    return torch.cat([first for first, _ in halves] + [second for _, second in reversed(halves)], dim) if degree > 1 else parts[0]


def _in_rank_order(x: Tensor, dim: int, degree: int, balanced: bool) -> Tensor:
    """The whole sequence with each rank's tokens together, rank after rank."""
    return torch.cat([own_part(x, dim, r, degree, balanced) for r in range(degree)], dim) if balanced else x


class _GatherSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, dim, balanced, place: Place):
        ctx.dim, ctx.balanced, ctx.place = dim, balanced, place
        return in_order(list(all_gather(x, place, dim).chunk(place.degree, dim)), dim, balanced)

    @staticmethod
    def backward(ctx, grad):
        ordered = _in_rank_order(grad, ctx.dim, ctx.place.degree, ctx.balanced)
        return reduce_scatter(ordered, ctx.place, ctx.dim), None, None, None


def _sequences(xs: list[Tensor], dim: int, balanced: bool) -> list[Tensor]:
    """gather_sequence of all ranks: all look at one sequence, so its gradients add up."""
    return [in_order(xs, dim, balanced) for _ in xs]


@composite("gather_sequence(Tensor x, int dim, bool balanced, str axis, int degree) -> Tensor")
def gather_sequence(x: Tensor, dim: int, balanced: bool, axis: str, degree: int) -> Tensor:
    """The whole sequence from all ranks' tokens; gradients are summed over the ranks that looked at them."""
    place = standing(x, axis, degree)
    if place.group is None:  # sizes only
        return all_gather(x, place, dim)
    return _GatherSequence.apply(x, dim, balanced, place)


DEFINITIONS["gather_sequence"] = _sequences


@composite("sequence_positions(SymInt length, bool balanced, str axis, int degree, *, Device? device=None) -> Tensor")
def sequence_positions(length: int, balanced: bool, axis: str, degree: int, *, device: torch.device | None = None) -> Tensor:
    """int64 [length]: the positions in the whole sequence of the rank's `length` tokens."""
    rank = place_on(axis, degree, sizes_only=not isinstance(length, int)).rank
    chunks = chunks_of(rank, degree, balanced)
    size = length // len(chunks)
    parts = [torch.arange(own, device=device) + c * size for c, own in zip(chunks, _sizes(length, len(chunks)), strict=True)]
    return torch.cat(parts)


def _sizes(length: int, count: int) -> list[int]:
    """Equal parts, the last as the rest, so that symbolic sizes add up to `length` again."""
    size = length // count
    return [size] * (count - 1) + [length - size * (count - 1)]


@composite(
    "sequence_attention(Tensor query, Tensor key, Tensor value, int? window=None, float dropout_p=0.0, *, float scale, float? softcap=None, "
    "bool enable_gqa=False, bool balanced=True, str axis, int degree) -> Tensor"
)
def sequence_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window: int | None = None,
    dropout_p: float = 0.0,
    *,
    scale: float,
    softcap: float | None = None,
    enable_gqa: bool = False,
    balanced: bool = True,
    axis: str,
    degree: int,
) -> Tensor:
    """Causal attention of the rank's tokens, query [B, H, T/n, K], to the whole sequence, key [B, G, T, K] and value [B, G, T, V].

    Token q attends to k <= q, and q - k < window where one is given. Each chunk of queries meets only the keys that its tokens may see, so the
    work of a chunk grows with its place, and the balanced order gives all ranks the same. Returns [B, H, T/n, V].
    """
    rank = standing(query, axis, degree).rank
    chunks = chunks_of(rank, degree, balanced)
    size = query.shape[2] // len(chunks)
    outputs = []
    for number, (chunk, own) in enumerate(zip(chunks, _sizes(query.shape[2], len(chunks)), strict=True)):
        first, last = chunk * size, (chunk + 1) * size
        start = 0 if window is None else max(0, first - window + 1)
        q = query.narrow(2, number * size, own)
        k, v = key.narrow(2, start, last - start), value.narrow(2, start, last - start)
        mask = None
        if chunk > 0 or window is not None:
            mask = _seen(first - start, own, last - start, window, query.device)
        causal = mask is None
        if softcap is None:
            out = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, dropout_p, causal, scale=scale, enable_gqa=enable_gqa)
        else:
            out = torch.ops.ftc.softcap_attention(q, k, v, mask, dropout_p, causal, scale=scale, softcap=softcap, enable_gqa=enable_gqa)
        outputs.append(out)
    return torch.cat(outputs, 2) if len(outputs) > 1 else outputs[0]


def _seen(offset: int, q_len: int, k_len: int, window: int | None, device: torch.device) -> Tensor:
    """bool [q_len, k_len]: query q stands at offset + q among the keys."""
    query = torch.arange(q_len, device=device)[:, None] + offset
    key = torch.arange(k_len, device=device)[None, :]
    mask = key <= query
    return mask if window is None else mask & (query - key < window)
