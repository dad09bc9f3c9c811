"""ftc::softcap_attention, attention whose scores are bounded by a tanh before the mask."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ftc.dialect.library import composite


@composite(
    "softcap_attention(Tensor query, Tensor key, Tensor value, Tensor? attn_mask=None, float dropout_p=0.0, bool is_causal=False, *, "
    "float scale, float softcap, bool enable_gqa=False) -> Tensor"
)
def softcap_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float,
    softcap: float,
    enable_gqa: bool = False,
) -> Tensor:
    """softmax(softcap * tanh(scale * q k' / softcap) + mask) v, in the argument order of scaled_dot_product_attention.

    query [B, H, T, K], key [B, G, S, K], value [B, G, S, V], G divides H and differs from it only with enable_gqa; attn_mask boolean
    (True = may attend) or additive, broadcastable to [B, H, T, S]. The softmax runs in float32 at least. Returns [B, H, T, V] in the dtype of query.
    """
    if enable_gqa and key.shape[1] != query.shape[1]:
        key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
        value = value.repeat_interleave(query.shape[1] // value.shape[1], dim=1)
    scores = torch.matmul(query, key.transpose(-2, -1)) * scale
    scores = softcap * torch.tanh(scores / softcap)
    if is_causal:
        allowed = torch.ops.ftc.causal_mask.default(query.shape[2], key.shape[2], None, device=query.device)
        scores = scores.masked_fill(~allowed, float("-inf"))
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, float("-inf")) if attn_mask.dtype == torch.bool else scores + attn_mask
    wide = torch.promote_types(scores.dtype, torch.float32)
    probabilities = torch.softmax(scores, dim=-1, dtype=wide).to(query.dtype)
    return torch.matmul(F.dropout(probabilities, dropout_p, dropout_p > 0.0), value)
