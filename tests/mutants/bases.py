"""Region graphs to mutate: attention, norms, rotary embedding and MLPs by themselves, whole blocks, and blocks of real families.

Every base says what raise has to recognise in it. Sizes: 3 sequences of 7 tokens (both dynamic; no other dimension is 3 or 7).
"""

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from helpers_export import clean, first_block, region_graph
from torch import Tensor, fx, nn

assert clean
B, T, D, H, G, K, HIDDEN = 3, 7, 20, 4, 2, 6, 10


@dataclass(frozen=True)
class Base:
    """A region graph, how often each canonical form stands in it after raise, and what its attention has to be: the number of
    key-value heads (0: no attention), and causal by `is_causal` alone or not."""

    name: str
    graph: fx.Graph
    attention: int = 0
    norm: int = 0
    rope: int = 0
    mlp: int = 0
    kv_heads: int = 0
    causal: bool = False


_MAKERS: dict[str, tuple[Callable[[], fx.Graph], dict[str, int]]] = {}


def base(**expected: int | bool):
    """Register a module class, or a function that returns a region graph, under its own name."""

    def decorate(made):
        _MAKERS[made.__name__] = (functools.partial(_export, made) if inspect.isclass(made) else made, expected)
        return made

    return decorate


@functools.cache
def get(name: str) -> Base:
    make, expected = _MAKERS[name]
    return Base(name, make(), **expected)


def names() -> list[str]:
    return list(_MAKERS)


def _export(module_class: type[nn.Module]) -> fx.Graph:
    torch.manual_seed(0)
    examples = {
        "hidden": torch.randn(B, T, D),
        "cos": torch.randn(B, T, K),
        "sin": torch.randn(B, T, K),
        "half_cos": torch.randn(T, K // 2),
        "half_sin": torch.randn(T, K // 2),
        "partial_cos": torch.randn(T, 4),
        "partial_sin": torch.randn(T, 4),
        "mask": torch.randn(B, 1, T, T),
        "heads": torch.randn(B, H, T, K),
        "heads_last": torch.randn(B, T, H, K),
        "freqs": torch.randn(T, K // 2, dtype=torch.complex64),
    }
    arguments = tuple(examples[name] for name in inspect.signature(module_class.forward).parameters if name != "self")
    with torch.no_grad():
        return region_graph(module_class().eval(), arguments, dynamic=(B, T))


def rotate_half(x: Tensor) -> Tensor:
    x1, x2 = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
    return torch.cat((-x2, x1), dim=-1)


def repeat_kv(x: Tensor, times: int) -> Tensor:
    batch, groups, length, width = x.shape
    return x[:, :, None, :, :].expand(batch, groups, times, length, width).reshape(batch, groups * times, length, width)


# ------------------------------------------------------------------------------------------------------------ norms


class RMSNorm(nn.Module):
    def __init__(self, width: int = D, eps: float = 1e-3, one_plus: bool = False):
        super().__init__()
        self.weight, self.eps, self.one_plus = nn.Parameter(torch.randn(width)), eps, one_plus

    def forward(self, x):
        normed = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)
        return normed * (1.0 + self.weight) if self.one_plus else self.weight * normed


@base(norm=1)
class rms_norm_alone(RMSNorm):
    def forward(self, hidden):
        return super().forward(hidden)


@base(norm=1)
class rms_norm_one_plus(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = RMSNorm(one_plus=True)

    def forward(self, hidden):
        return hidden + self.norm(hidden)


@base(norm=2)
class two_library_norms(nn.Module):
    def __init__(self):
        super().__init__()
        self.rms, self.layer = nn.RMSNorm(D, eps=1e-3), nn.LayerNorm(D, eps=1e-3)

    def forward(self, hidden):
        return self.layer(hidden) + self.rms(hidden * 2.0)


@base(norm=1)
class bfloat16_rms_norm(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(D).bfloat16())

    def forward(self, hidden):
        x = hidden.bfloat16()
        wide = x.to(torch.float32)
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-3)
        return self.weight * normed.to(x.dtype)


# ------------------------------------------------------------------------------------------------------------- MLPs


class GatedMLP(nn.Module):
    def __init__(self, act=F.silu):
        super().__init__()
        self.gate, self.up, self.down = (
            nn.Linear(D, HIDDEN, False),
            nn.Linear(D, HIDDEN, False),
            nn.Linear(HIDDEN, D, False),
        )
        self.act = act

    def forward(self, hidden):
        return self.down(self.act(self.gate(hidden)) * self.up(hidden))


@base(mlp=1)
class swiglu(GatedMLP):
    pass


@base(mlp=1)
class geglu_tanh(GatedMLP):
    def __init__(self):
        super().__init__(functools.partial(F.gelu, approximate="tanh"))


@base(mlp=1)
class fused_swiglu(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_up, self.down = nn.Linear(D, 2 * HIDDEN, bias=False), nn.Linear(HIDDEN, D, bias=False)

    def forward(self, hidden):
        gate, up = self.gate_up(hidden).chunk(2, dim=-1)
        return self.down(up * F.silu(gate))


@base(mlp=1)
class plain_gelu(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(D, HIDDEN), nn.Linear(HIDDEN, D)

    def forward(self, hidden):
        return self.down(F.gelu(self.up(hidden)))


# ------------------------------------------------------------------------------------------------------------ rotary


@base(rope=1)
class rope_half_split(nn.Module):
    def forward(self, heads, cos, sin):
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        return heads * cos + rotate_half(heads) * sin


@base(rope=1)
class rope_interleaved_stack(nn.Module):
    def forward(self, heads_last, half_cos, half_sin):
        cos, sin = half_cos[None, :, None, :], half_sin[None, :, None, :]
        even, odd = heads_last[..., 0::2], heads_last[..., 1::2]
        return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)


@base(rope=1)
class rope_complex(nn.Module):
    def forward(self, heads_last, freqs):
        pairs = torch.view_as_complex(heads_last.reshape(*heads_last.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * freqs[None, :, None, :]).flatten(3)


@base(rope=1)
class rope_partial(nn.Module):
    def forward(self, heads, partial_cos, partial_sin):
        turned, rest = heads[..., :4], heads[..., 4:]
        return torch.cat((turned * partial_cos + rotate_half(turned) * partial_sin, rest), dim=-1)


# --------------------------------------------------------------------------------------------------------- attention


class Projections(nn.Module):
    def __init__(self, bias: bool = False):
        super().__init__()
        self.q, self.k, self.v = nn.Linear(D, H * K, bias), nn.Linear(D, G * K, bias), nn.Linear(D, G * K, bias)
        self.o = nn.Linear(H * K, D, bias)

    def heads(self, hidden):
        batch, length, _ = hidden.shape
        split = lambda x: x.view(batch, length, -1, K).transpose(1, 2)  # noqa: E731
        return split(self.q(hidden)), split(self.k(hidden)), split(self.v(hidden))

    def out(self, x):
        return self.o(x.transpose(1, 2).contiguous().reshape(x.shape[0], x.shape[2], -1))


def rotated(q, k, cos, sin):
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin


@base(attention=1, rope=2, kv_heads=G, causal=True)
class gqa_half_split_sdpa(Projections):
    def forward(self, hidden, cos, sin):
        q, k, v = self.heads(hidden)
        q, k = rotated(q, k, cos, sin)
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True))


@base(attention=1, rope=2, kv_heads=G)
class eager_repeat_kv(Projections):
    def forward(self, hidden, cos, sin, mask):
        q, k, v = self.heads(hidden)
        q, k = rotated(q, k, cos, sin)
        k, v = repeat_kv(k, H // G), repeat_kv(v, H // G)
        scores = torch.matmul(q, k.transpose(2, 3)) * 0.4 + mask
        probabilities = F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
        return self.out(torch.matmul(probabilities, v))


@base(attention=1, kv_heads=G, causal=True)
class eager_causal_own_mask(Projections):
    def __init__(self):
        super().__init__(bias=True)

    def forward(self, hidden):
        q, k, v = self.heads(hidden)
        k, v = k.repeat_interleave(H // G, dim=1), v.repeat_interleave(H // G, dim=1)
        length = hidden.shape[1]
        mask = torch.full((length, length), float("-inf")).triu(1)
        scores = (q @ k.transpose(-2, -1)) / K**0.5 + mask
        return self.out(scores.softmax(-1) @ v)


@base(attention=1, kv_heads=G)
class softcapped(Projections):
    def forward(self, hidden, mask):
        q, k, v = self.heads(hidden)
        k, v = repeat_kv(k, H // G), repeat_kv(v, H // G)
        scores = torch.matmul(q, k.transpose(2, 3)) * K**-0.5
        scores = torch.tanh(scores / 5.0) * 5.0 + mask
        return self.out(torch.matmul(F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype), v))


@base(attention=1, kv_heads=G)
class masked_sdpa(Projections):
    def forward(self, hidden, mask):
        q, k, v = self.heads(hidden)
        k, v = repeat_kv(k, H // G), repeat_kv(v, H // G)
        return self.out(F.scaled_dot_product_attention(q, k, v, attn_mask=mask))


# ------------------------------------------------------------------------------------------------------------ blocks


@base(attention=1, norm=2, rope=2, mlp=1, kv_heads=G, causal=True)
class llama_like_block(Projections):
    def __init__(self):
        super().__init__()
        self.norm1, self.norm2, self.mlp = RMSNorm(), RMSNorm(), GatedMLP()

    def forward(self, hidden, cos, sin):
        q, k, v = self.heads(self.norm1(hidden))
        q, k = rotated(q, k, cos, sin)
        hidden = hidden + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True))
        return hidden + self.mlp(self.norm2(hidden))


@base(attention=1, norm=2, rope=2, mlp=1, kv_heads=G, causal=True)
class fused_block(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.o = nn.Linear(D, (H + 2 * G) * K, bias=False), nn.Linear(H * K, D, bias=False)
        self.norm1, self.norm2, self.mlp = RMSNorm(), RMSNorm(), fused_swiglu()

    def forward(self, hidden, cos, sin):
        batch, length, _ = hidden.shape
        q, k, v = self.qkv(self.norm1(hidden)).split([H * K, G * K, G * K], dim=-1)
        q, k, v = (x.reshape(batch, length, -1, K).transpose(1, 2) for x in (q, k, v))
        q, k = rotated(q, k, cos, sin)
        out = F.scaled_dot_product_attention(q, repeat_kv(k, H // G), repeat_kv(v, H // G), is_causal=True)
        hidden = hidden + self.o(out.transpose(1, 2).reshape(batch, length, -1))
        return hidden + self.mlp(self.norm2(hidden))


@base(attention=1, norm=2, mlp=1, kv_heads=H, causal=True)
class layer_norm_gelu_block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(D), nn.LayerNorm(D)
        self.qkv, self.o = nn.Linear(D, 3 * H * K), nn.Linear(H * K, D)
        self.up, self.down = nn.Linear(D, HIDDEN), nn.Linear(HIDDEN, D)

    def forward(self, hidden):
        batch, length, _ = hidden.shape
        q, k, v = self.qkv(self.norm1(hidden)).chunk(3, dim=-1)
        q, k, v = (x.view(batch, length, H, K).transpose(1, 2) for x in (q, k, v))
        allowed = torch.ones(length, length, dtype=torch.bool).tril()
        scores = torch.matmul(q, k.transpose(-1, -2)) / K**0.5
        weights = scores.masked_fill(~allowed, torch.finfo(scores.dtype).min).softmax(-1)
        hidden = hidden + self.o((weights @ v).transpose(1, 2).reshape(batch, length, -1))
        return hidden + self.down(F.gelu(self.up(self.norm2(hidden)), approximate="tanh"))


# ------------------------------------------------------------------------------------- blocks of real model families


def _family(model_type: str, attention: str, dtype: torch.dtype = torch.float32, **changes) -> fx.Graph:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    sizes = dict(vocab_size=32, hidden_size=D, intermediate_size=HIDDEN, num_hidden_layers=1, num_attention_heads=H)
    sizes |= dict(num_key_value_heads=G, head_dim=K, max_position_embeddings=64, use_cache=False)
    config = AutoConfig.for_model(model_type, **(sizes | changes))
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).to(dtype).eval()
    tokens = torch.randint(0, 32, (B, T))
    block, args, kwargs = first_block(model, lambda: model(input_ids=tokens, use_cache=False))
    kwargs = {k: v for k, v in kwargs.items() if k not in ("past_key_values", "past_key_value", "use_cache")}
    with torch.no_grad():
        return region_graph(block, args, kwargs, dynamic=(B, T))


@base(attention=1, norm=2, rope=2, mlp=1, kv_heads=G, causal=True)
def llama_sdpa():
    return _family("llama", "sdpa")


@base(attention=1, norm=2, rope=2, mlp=1, kv_heads=G)
def llama_eager_bfloat16():
    return _family("llama", "eager", torch.bfloat16)


@base(attention=1, norm=4, rope=2, mlp=1, kv_heads=G)
def gemma2_eager():
    return _family("gemma2", "eager", query_pre_attn_scalar=5)


@base(attention=1, norm=4, rope=2, mlp=1, kv_heads=G, causal=True)
def qwen3_sdpa():
    return _family("qwen3", "sdpa")
