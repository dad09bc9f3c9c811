"""The FP8 form of a latent cache: one row of bytes a token (DeepSeek-V3.2's and FlashMLA's layout, 656 bytes for 512 + 64).

    [ L bytes: latent in e4m3 | 4 bytes for every 128 elements: float32 scale | 2 E bytes: rotated key in bfloat16 ]

The rotated part keeps 16 bits because its products with the query are read at every distance, and it is one tenth of the row.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

GROUP = 128  # latent elements that share a scale
LARGEST = 448.0  # largest finite e4m3 value


def row_bytes(latent: int, rope: int) -> int:
    """Bytes of one token with `latent` elements and a rotated key of `rope`."""
    return latent + 4 * num_groups(latent) + 2 * rope


def num_groups(latent: int) -> int:
    return -(-latent // GROUP)


def pack(latent: Tensor, k_pe: Tensor) -> Tensor:
    """latent [..., L] and k_pe [..., E] of any floating dtype as uint8 [..., row_bytes(L, E)]."""
    width = latent.shape[-1]
    groups = F.pad(latent.float(), (0, num_groups(width) * GROUP - width)).unflatten(-1, (-1, GROUP))
    scale = groups.abs().amax(-1).clamp_min(1e-12) / LARGEST
    values = (groups / scale[..., None]).flatten(-2)[..., :width].to(torch.float8_e4m3fn)
    parts = (values, scale, k_pe.to(torch.bfloat16))
    return torch.cat([_as(part, torch.uint8) for part in parts], -1)


def unpack(rows: Tensor, latent: int, rope: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The inverse of `pack`: (latent [..., L], k_pe [..., E]) in `dtype`."""
    values, scale, k_pe = rows.split([latent, 4 * num_groups(latent), 2 * rope], -1)
    scale = _as(scale, torch.float32).repeat_interleave(GROUP, -1)[..., :latent]
    return (_as(values, torch.float8_e4m3fn).float() * scale).to(dtype), _as(k_pe, torch.bfloat16).to(dtype)


def _as(part: Tensor, dtype: torch.dtype) -> Tensor:
    # A copy even of what is contiguous: a part's offset need not be a multiple of the element's size. Flat, for empty parts.
    flat = part.clone(memory_format=torch.contiguous_format).reshape(-1).view(dtype)
    return flat.view(*part.shape[:-1], part.shape[-1] * part.dtype.itemsize // dtype.itemsize)
