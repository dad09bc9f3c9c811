"""ftc::rope, rotary position embedding (Su et al. 2021, RoFormer, equation 34)."""

import torch
from torch import Tensor

from ftc.dialect.library import composite


@composite("rope(Tensor x, Tensor cos, Tensor sin, bool interleaved=False) -> Tensor")
def rope(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """Rotate the first R = cos.shape[-1] elements of the last dimension of x; the rest passes through.

    x [..., K] of any real dtype; cos and sin [..., R], R <= K and even, broadcastable to x[..., :R], full width: element j of a table is
    the one that multiplies x[..., j]. Pairs are (j, j + R/2), or (2j, 2j + 1) when interleaved. Returns the promoted dtype; mutates nothing.
    """
    width = cos.shape[-1]
    rotated = x if width == x.shape[-1] else x[..., :width]
    if interleaved:
        turned = torch.stack((-rotated[..., 1::2], rotated[..., 0::2]), dim=-1).flatten(-2)
    else:
        turned = torch.cat((-rotated[..., width // 2 :], rotated[..., : width // 2]), dim=-1)
    out = rotated * cos + turned * sin
    return out if width == x.shape[-1] else torch.cat((out, x[..., width:]), dim=-1)
