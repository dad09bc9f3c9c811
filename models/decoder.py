"""A plain decoder language model: RMSNorm, grouped-query or latent attention with RoPE, SwiGLU or experts, tied or untied head.

Shapes: B batch, T tokens, D model (hidden), H query heads, G key-value heads, K head dim, F feed-forward, V vocabulary.
"""

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from ftc.models.feed_forward import FeedForward
from ftc.models.mla import LatentAttention, LatentConfig
from ftc.models.moe import MixtureOfExperts, MoeConfig, Router
from ftc.models.rope import RopeConfig, apply_rope, rope_cos_sin
from torch import nn


@dataclass(frozen=True)
class DecoderConfig:
    """The architecture; names follow Hugging Face's config.json. Raises ValueError when sizes do not fit each other.

    With `latent` attention is latent: head_dim is then the part of a head that RoPE turns, as in DeepSeek's config.json, every query
    head has a key-value head, and attention_bias and attention_output_bias are one. With `moe` the layers from first_dense_layers on have
    experts of moe.intermediate_size; intermediate_size is then that of the dense ones.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float = 1e-5
    tie_word_embeddings: bool = False
    attention_bias: bool = False  # on the query, key and value projections
    attention_output_bias: bool = False
    mlp_bias: bool = False
    rope: RopeConfig = field(default_factory=RopeConfig)
    rope_interleaved: bool = False  # which elements form a pair: (2i, 2i + 1), or half-split (i, i + K/2)
    latent: LatentConfig | None = None
    qk_norm: str | None = None  # RMSNorm of queries and keys before RoPE: over each "head", or over the whole "projection"
    moe: MoeConfig | None = None  # experts for the feed-forward layers,
    first_dense_layers: int = 0  # but for these
    initializer_range: float = 0.02
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self):
        object.__setattr__(self, "eos_token_ids", tuple(self.eos_token_ids))
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "max_position_embeddings",
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} is {value!r}; it must be a positive whole number")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of num_key_value_heads "
                f"{self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim is {self.head_dim}; RoPE turns pairs, so it must be even")
        if self.rope.partial_rotary_factor != 1.0:
            raise ValueError(
                f"partial_rotary_factor is {self.rope.partial_rotary_factor}; this decoder rotates all of K"
            )
        if self.rope.rope_type == "dynamic" and self.head_dim < 4:
            raise ValueError(f"head_dim is {self.head_dim}; rope_type 'dynamic' needs at least 4")
        self._check_latent()
        self._check_moe()
        for name in ("short_factor", "long_factor"):
            factors = getattr(self.rope, name)
            if factors is not None and len(factors) != self.head_dim // 2:
                raise ValueError(
                    f"{name} has {len(factors)} entries; head_dim {self.head_dim} needs {self.head_dim // 2}"
                )

    def _check_latent(self):
        if self.latent is None:
            return
        if self.head_dim != self.latent.qk_rope_head_dim:
            raise ValueError(f"head_dim is {self.head_dim}, but RoPE turns qk_rope_head_dim {self.latent.qk_rope_head_dim}; make them equal")
        if self.num_key_value_heads != self.num_attention_heads:
            raise ValueError(
                f"num_key_value_heads is {self.num_key_value_heads}; latent attention has one for each of the {self.num_attention_heads} heads"
            )
        if self.attention_bias != self.attention_output_bias:
            raise ValueError("attention_bias and attention_output_bias differ; latent attention has both or none")
        if self.qk_norm is not None:
            raise ValueError(f"qk_norm is {self.qk_norm!r}; latent attention has norms of its own, so it must be None")

    def _check_moe(self):
        if self.qk_norm not in (None, "head", "projection"):
            raise ValueError(f"qk_norm is {self.qk_norm!r}; valid: None, 'head', 'projection'")
        dense, layers = self.first_dense_layers, self.num_hidden_layers
        if isinstance(dense, bool) or not isinstance(dense, int) or not 0 <= dense < layers:
            raise ValueError(f"first_dense_layers is {dense!r}; it must be 0 to {layers - 1}, fewer than num_hidden_layers")
        if self.moe is None:
            if dense:
                raise ValueError(f"first_dense_layers is {dense}, but without moe all layers are dense; make it 0")
            return
        if self.mlp_bias:
            raise ValueError("mlp_bias is True; experts have no biases, so it must be False with moe")
        self.moe.check(f"layers.{dense}.mlp")


class Attention(nn.Module):
    """Causal grouped-query attention (Ainslie et al., 2023)."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.head_dim = config.head_dim
        self.rope_interleaved = config.rope_interleaved
        self.enable_gqa = config.num_attention_heads != config.num_key_value_heads
        query_size = config.num_attention_heads * config.head_dim
        kv_size = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, query_size, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=config.attention_bias)
        self.o_proj = nn.Linear(query_size, config.hidden_size, bias=config.attention_output_bias)
        self.qk_norm, self.q_norm, self.k_norm = config.qk_norm, None, None
        if config.qk_norm is not None:
            sizes = (config.head_dim, config.head_dim) if config.qk_norm == "head" else (query_size, kv_size)
            self.q_norm, self.k_norm = (nn.RMSNorm(size, eps=config.rms_norm_eps) for size in sizes)

    def forward(self, x_BTD, cos_BTK, sin_BTK, mask_B1TT=None):
        q_BHTK = self.heads(self.q_proj(x_BTD), self.q_norm)
        k_BGTK = self.heads(self.k_proj(x_BTD), self.k_norm)
        v_BGTK = self.heads(self.v_proj(x_BTD))
        q_BHTK = apply_rope(q_BHTK, cos_BTK, sin_BTK, self.rope_interleaved)
        k_BGTK = apply_rope(k_BGTK, cos_BTK, sin_BTK, self.rope_interleaved)
        o_BHTK = F.scaled_dot_product_attention(
            q_BHTK, k_BGTK, v_BGTK, attn_mask=mask_B1TT, is_causal=mask_B1TT is None, enable_gqa=self.enable_gqa
        )
        return self.o_proj(o_BHTK.transpose(1, 2).flatten(-2))

    def heads(self, x_BTE, norm: nn.RMSNorm | None = None):
        """[B, T, H K] to [B, H, T, K], normed over H K (OLMoE: Muennighoff et al., 2024) or over each K (Qwen3)."""
        if self.qk_norm == "projection" and norm is not None:
            x_BTE = norm(x_BTE)
        x_BTHK = x_BTE.unflatten(-1, (-1, self.head_dim))
        if self.qk_norm == "head" and norm is not None:
            x_BTHK = norm(x_BTHK)
        return x_BTHK.transpose(1, 2)


class Block(nn.Module):
    """One pre-norm layer: attention and feed-forward, each added to the residual stream."""

    def __init__(self, config: DecoderConfig, layer: int = 0):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        if config.latent is None:
            self.self_attn = Attention(config)
        else:
            sizes = config.hidden_size, config.num_attention_heads, config.latent
            self.self_attn = LatentAttention(*sizes, config.rope, config.rope_interleaved, config.attention_bias)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        if config.moe is None or layer < config.first_dense_layers:
            self.mlp = FeedForward(config.hidden_size, config.intermediate_size, config.mlp_bias)
        else:
            self.mlp = MixtureOfExperts(config.hidden_size, config.moe, f"layers.{layer}.mlp")

    def forward(self, x_BTD, cos_BTK, sin_BTK, mask_B1TT=None):
        x_BTD = x_BTD + self.self_attn(self.input_layernorm(x_BTD), cos_BTK, sin_BTK, mask_B1TT)
        return x_BTD + self.mlp(self.post_attention_layernorm(x_BTD))


class Decoder(nn.Module):
    """Token ids in, logits out; with labels, their mean cross-entropy."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.init_weights()

    def forward(self, input_ids, labels=None, position_ids=None, attention_mask=None):
        """Logits [B, T, V]; with labels, the mean cross-entropy over the labels that are not -100 (scalar, nats).

        labels: int64, already shifted: labels[b, t] is the token that follows input_ids[b, t].
        position_ids: int64 [B, T] or [1, T], 0..T-1 by default. They feed RoPE only: positions that restart do not
            keep packed documents apart; a [B, 1, T, T] attention mask does.
        attention_mask: bool or int [B, T], nonzero where there is a token rather than padding; or a bool
            [B, 1, T, T] mask that is complete in itself (True: may attend). Causal attention by default.
        """
        x_BTD, context = self.embed_tokens(input_ids), self.context(input_ids, position_ids, attention_mask)
        for block in self.layers:
            x_BTD = block(x_BTD, *context)
        logits_BTV = self.lm_head(self.norm(x_BTD))
        if labels is None:
            return logits_BTV
        return mean_cross_entropy(logits_BTV, labels)

    def context(self, input_ids, position_ids=None, attention_mask=None):
        """What every block is given beside the hidden states: cos and sin [1 or B, T, K], and the mask or None."""
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
        cos_BTK, sin_BTK = rope_cos_sin(
            self.config.rope,
            self.config.head_dim,
            self.config.max_position_embeddings,
            position_ids,
            self.config.rope_interleaved,
            self.embed_tokens.weight.dtype,
        )
        mask_B1TT = None if attention_mask is None else causal_mask(attention_mask, input_ids.shape[1])
        return cos_BTK, sin_BTK, mask_B1TT

    def init_weights(self) -> None:
        """Draw all weights anew, in place: normal(0, initializer_range), the layers' outputs smaller by sqrt(2 layers).

        The smaller outputs keep the residual stream's variance at depth (Radford et al., 2019, section 2.3). Ties the
        head again where the config asks for it, since moving off the meta device separates tied parameters.
        """
        std = self.config.initializer_range
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                is_output = name.endswith(("o_proj", "down_proj"))
                nn.init.normal_(module.weight, std=std / math.sqrt(2 * len(self.layers)) if is_output else std)
                if getattr(module, "bias", None) is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.RMSNorm):
                nn.init.ones_(module.weight)
            elif isinstance(module, Router):
                nn.init.normal_(module.weight, std=std)
                if module.config.selection_bias:
                    nn.init.zeros_(module.e_score_correction_bias)
        self.tie_weights()

    def tie_weights(self) -> None:
        """Make the head share the embedding's parameter where the config asks for it."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight


def causal_mask(mask: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """Bool [B, 1, T, T], True where a query may attend to a key, from a [B, T] padding mask; 4-dim masks pass through.

    A padding position attends to itself, so that no row of the softmax is empty.
    """
    if mask.ndim == 4:
        return mask
    if mask.ndim != 2:
        raise ValueError(f"attention_mask has shape {list(mask.shape)}; it must be [B, T] or [B, 1, T, T]")
    causal_TT = torch.ones(num_tokens, num_tokens, dtype=torch.bool, device=mask.device).tril()
    self_TT = torch.eye(num_tokens, dtype=torch.bool, device=mask.device)
    return causal_TT & (mask.bool()[:, None, None, :] | self_TT)


def mean_cross_entropy(logits_BTV: torch.Tensor, labels_BT: torch.Tensor) -> torch.Tensor:
    """Mean of -log softmax(logits)[label] over the labels that are not -100, in float32 or better."""
    logits = logits_BTV.flatten(0, 1)
    return F.cross_entropy(
        logits.to(torch.promote_types(logits.dtype, torch.float32)), labels_BT.flatten(), ignore_index=-100
    )
