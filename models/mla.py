"""Multi-head latent attention (DeepSeek-V2 report, 2024, section 2.1, equations 9 to 19), plainly: what training and prefill compute.

    c     = RMSNorm(W_DKV x)                            the latent, L numbers a token: what a cache keeps, with r
    r     = RoPE(W_KR x)                                one key part for all heads, E numbers a token
    k_h   = [W_UK,h c; r],  v_h = W_UV,h c              K' = N + E and M numbers a head
    q_h   = [W_UQ,h c_q; RoPE(W_QR,h c_q)],  c_q = RMSNorm(W_DQ x), or x itself without a query latent
    o     = W_O [softmax(q_h k_h / sqrt(N + E)) v_h, ...]

Names and layouts of the weights are those of Hugging Face's DeepSeek-V3: `kv_a_proj_with_mqa` = [W_DKV; W_KR], `kv_b_proj` = [W_UK,h; W_UV,h]
head by head, `q_b_proj` = [W_UQ,h; W_QR,h] head by head.

Shapes: B batch, T tokens, D model, H heads, L latent, N part of a head without RoPE, E part with RoPE, M value, K' = N + E.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from ftc.models.rope import RopeConfig, apply_rope, yarn_mscale
from torch import nn

LATENT_EPS = 1e-6  # of the latents' norms, in DeepSeek's models whatever rms_norm_eps is


@dataclass(frozen=True)
class LatentConfig:
    """Sizes of latent attention; names follow DeepSeek's config.json. Raises ValueError for sizes that cannot be."""

    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    q_lora_rank: int | None = None  # None: queries straight from the hidden states

    def __post_init__(self):
        for name in ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "q_lora_rank"):
            value = getattr(self, name)
            if value is None and name == "q_lora_rank":
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} is {value!r}; it must be a positive whole number")
        if self.qk_rope_head_dim % 2:
            raise ValueError(f"qk_rope_head_dim is {self.qk_rope_head_dim}; RoPE turns pairs, so it must be even")

    @property
    def qk_head_dim(self) -> int:
        """K', of queries and keys."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def cache_elements(self) -> int:
        """Numbers that a cache keeps for a token and layer: the latent and the shared key part."""
        return self.kv_lora_rank + self.qk_rope_head_dim


LATENT_SIZES = {
    "deepseek-v2-lite": LatentConfig(512, 128, 64, 128),
    "deepseek-v2": LatentConfig(512, 128, 64, 128, q_lora_rank=1536),
    "deepseek-v3": LatentConfig(512, 128, 64, 128, q_lora_rank=1536),
}


def softmax_scale(latent: LatentConfig, rope: RopeConfig) -> float:
    """1 / sqrt(K'), times YaRN's mscale squared where the model was stretched with `mscale_all_dim` (DeepSeek-V2, section 3.1.4)."""
    scale = latent.qk_head_dim**-0.5
    if rope.rope_type != "default" and rope.mscale_all_dim:
        scale *= yarn_mscale(rope.factor or 1.0, rope.mscale_all_dim) ** 2
    return scale


class LatentAttention(nn.Module):
    """Causal multi-head latent attention with decoupled RoPE; `bias`: on the two down-projections and the output, as in DeepSeek."""

    def __init__(self, hidden_size: int, num_heads: int, latent: LatentConfig, rope: RopeConfig, rope_interleaved: bool, bias: bool):
        super().__init__()
        self.latent, self.rope_interleaved, self.scale = latent, rope_interleaved, softmax_scale(latent, rope)
        if latent.q_lora_rank is None:
            self.q_proj = nn.Linear(hidden_size, num_heads * latent.qk_head_dim, bias=False)
        else:
            self.q_a_proj = nn.Linear(hidden_size, latent.q_lora_rank, bias=bias)
            self.q_a_layernorm = nn.RMSNorm(latent.q_lora_rank, eps=LATENT_EPS)
            self.q_b_proj = nn.Linear(latent.q_lora_rank, num_heads * latent.qk_head_dim, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(hidden_size, latent.kv_lora_rank + latent.qk_rope_head_dim, bias=bias)
        self.kv_a_layernorm = nn.RMSNorm(latent.kv_lora_rank, eps=LATENT_EPS)
        self.kv_b_proj = nn.Linear(latent.kv_lora_rank, num_heads * (latent.qk_nope_head_dim + latent.v_head_dim), bias=False)
        self.o_proj = nn.Linear(num_heads * latent.v_head_dim, hidden_size, bias=bias)

    def forward(self, x_BTD, cos_BTE, sin_BTE, mask_B1TT=None):
        sizes = self.latent
        q_BHTK = self.queries(x_BTD).unflatten(-1, (-1, sizes.qk_head_dim)).transpose(1, 2)
        q_BHTN, q_BHTE = q_BHTK.split([sizes.qk_nope_head_dim, sizes.qk_rope_head_dim], -1)
        c_BTL, r_BTE = self.kv_a_proj_with_mqa(x_BTD).split([sizes.kv_lora_rank, sizes.qk_rope_head_dim], -1)
        kv_BHTF = self.kv_b_proj(self.kv_a_layernorm(c_BTL)).unflatten(-1, (-1, sizes.qk_nope_head_dim + sizes.v_head_dim)).transpose(1, 2)
        k_BHTN, v_BHTM = kv_BHTF.split([sizes.qk_nope_head_dim, sizes.v_head_dim], -1)
        q_BHTE = apply_rope(q_BHTE, cos_BTE, sin_BTE, self.rope_interleaved)
        r_B1TE = apply_rope(r_BTE[:, None], cos_BTE, sin_BTE, self.rope_interleaved)
        q_BHTK = torch.cat([q_BHTN, q_BHTE], -1)
        k_BHTK = torch.cat([k_BHTN, r_B1TE.expand(-1, k_BHTN.shape[1], -1, -1)], -1)
        o_BHTM = F.scaled_dot_product_attention(
            q_BHTK, k_BHTK, v_BHTM, attn_mask=mask_B1TT, is_causal=mask_B1TT is None, scale=self.scale
        )
        return self.o_proj(o_BHTM.transpose(1, 2).flatten(-2))

    def queries(self, x_BTD):
        """[B, T, H K'], before RoPE."""
        if self.latent.q_lora_rank is None:
            return self.q_proj(x_BTD)
        return self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x_BTD)))
