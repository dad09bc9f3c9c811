"""Rotary position embedding: the frequencies of all six Hugging Face RoPE types, cos and sin, and the rotation.

RoPE (Su et al., 2021, eq. 34) turns pair i of a query or key at position t by the angle t * inv_freq[i], with
inv_freq[i] = theta^(-2i/R). The other types stretch inv_freq so that longer texts stay within the angles seen in
training; some also scale cos and sin by an attention factor, which sharpens the softmax.

    default   as above
    linear    inv_freq / factor                                              (Chen et al., 2023)
    dynamic   theta grows with the text's length past the trained one        (NTK-aware, "dynamic NTK")
    yarn      fast pairs kept, slow pairs divided, a ramp between            (Peng et al., 2023, sections 3.2 to 3.4)
    longrope  one searched divisor a pair, short and long texts apart        (Ding et al., 2024)
    llama3    as yarn, but the ramp runs over wavelengths                    (Llama 3.1 model card)

Shapes: B batch, T tokens, H heads, K head dim, R rotated dims (R <= K).
"""

import math
from dataclasses import dataclass, fields

import torch

ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")
_REQUIRED = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("original_max_position_embeddings",),
    "longrope": ("original_max_position_embeddings", "short_factor", "long_factor"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


@dataclass(frozen=True)
class RopeConfig:
    """How positions become angles. Field names are those of Hugging Face's `rope_parameters`.

    Raises ValueError when `rope_type` is unknown or a field that it needs is missing.
    """

    rope_type: str = "default"
    rope_theta: float = 10000.0
    factor: float | None = None
    original_max_position_embeddings: int | None = None
    attention_factor: float | None = None
    partial_rotary_factor: float = 1.0
    beta_fast: float | None = None
    beta_slow: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    short_factor: tuple[float, ...] | None = None
    long_factor: tuple[float, ...] | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None

    def __post_init__(self):
        for name in ("short_factor", "long_factor"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, tuple(getattr(self, name)))
        if self.rope_type not in ROPE_TYPES:
            raise ValueError(f"unknown rope_type {self.rope_type!r}; valid: {', '.join(ROPE_TYPES)}")
        missing = [name for name in _REQUIRED.get(self.rope_type, ()) if getattr(self, name) is None]
        if missing:
            raise ValueError(f"rope_type {self.rope_type!r} needs {', '.join(missing)} in rope_parameters")
        if not self.rope_theta > 0:
            raise ValueError(f"rope_theta is {self.rope_theta}; it must be positive")

    @property
    def depends_on_length(self) -> bool:
        """Whether the frequencies change with the length of the text."""
        return self.rope_type in ("dynamic", "longrope")

    @classmethod
    def from_huggingface(cls, config: dict) -> "RopeConfig":
        """From the dict of a config.json, in either spelling: `rope_parameters`, or `rope_scaling` and `rope_theta`.

        Raises ValueError for an unknown type, a missing or unknown field, and settings that differ between layers.
        """
        given = dict(config.get("rope_scaling") or config.get("rope_parameters") or {})
        if any(isinstance(value, dict) for value in given.values()):
            raise ValueError(f"rope_parameters differ between layer types ({', '.join(given)}); one set is supported")
        old_type = given.pop("type", None)
        given.setdefault("rope_type", old_type or "default")
        for name in ("rope_theta", "partial_rotary_factor"):
            if config.get(name) is not None:
                given.setdefault(name, config[name])
        if given["rope_type"] in ("llama3", "yarn", "longrope"):
            # A length beside rope_parameters wins, as in transformers; without any, the model was not stretched.
            outer = config.get("original_max_position_embeddings")
            if outer is not None:
                given["original_max_position_embeddings"] = outer
            else:
                given.setdefault("original_max_position_embeddings", config.get("max_position_embeddings"))
        unknown = set(given) - {field.name for field in fields(cls)}
        if unknown:
            raise ValueError(f"rope_parameters has unknown keys: {', '.join(sorted(unknown))}")
        return cls(**{name: value for name, value in given.items() if value is not None})

    def as_huggingface(self) -> dict:
        """The `rope_parameters` dict of a config.json; fields at their defaults are left out."""
        given = {"rope_type": self.rope_type, "rope_theta": self.rope_theta}
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name not in given and value != field.default:
                given[field.name] = list(value) if isinstance(value, tuple) else value
        return given


def inverse_frequencies(
    rope: RopeConfig,
    head_dim: int,
    max_position_embeddings: int,
    seq_len: int | torch.Tensor | None = None,
    device: torch.device | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[torch.Tensor, float]:
    """inv_freq [R/2] in `dtype` (radians a token) and the attention factor that scales cos and sin.

    Models compute in float32, whose rounding is part of what they are; float64 is for measuring it. `seq_len` is the
    length of the text in tokens, an int or a 0-dim integer tensor; only `dynamic` and `longrope` look at it, and None
    means a text no longer than the trained length.
    """
    dim = int(head_dim * rope.partial_rotary_factor)
    theta = (
        _dynamic_theta(rope, dim, max_position_embeddings, seq_len) if rope.rope_type == "dynamic" else rope.rope_theta
    )
    exponents = torch.arange(0, dim, 2, dtype=torch.int64, device=device).to(dtype) / dim
    if rope.rope_type == "yarn":
        return _yarn(rope, theta**exponents, dim, max_position_embeddings)
    if rope.rope_type == "longrope":
        return _longrope(rope, theta**exponents, max_position_embeddings, seq_len)
    inv_freq = 1.0 / theta**exponents
    if rope.rope_type == "linear":
        inv_freq = inv_freq / rope.factor
    if rope.rope_type == "llama3":
        inv_freq = _llama3(rope, inv_freq)
    return inv_freq, 1.0


def _dynamic_theta(rope: RopeConfig, dim: int, max_position_embeddings: int, seq_len):
    """theta * (s L / L0 - (s - 1))^(R / (R - 2)), L the text's length but at least the trained length L0."""
    if seq_len is None:
        length = max_position_embeddings
    elif isinstance(seq_len, torch.Tensor):
        length = seq_len.double().clamp(min=max_position_embeddings)  # float64: s L / L0 and s - 1 nearly cancel
    else:
        length = max(seq_len, max_position_embeddings)
    stretch = rope.factor * length / max_position_embeddings - (rope.factor - 1)
    return rope.rope_theta * stretch ** (dim / (dim - 2))


def yarn_mscale(factor: float, weight: float = 1.0) -> float:
    """By how much YaRN scales cos and sin, or the root of the softmax's scale (Peng et al., 2023, equation 22)."""
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0


def _yarn(rope: RopeConfig, wave: torch.Tensor, dim: int, max_position_embeddings: int) -> tuple[torch.Tensor, float]:
    """Pairs that turn more than beta_fast times in the trained length stay, those below beta_slow are divided."""
    original = rope.original_max_position_embeddings
    factor = rope.factor if rope.factor is not None else max_position_embeddings / original

    def pair_that_turns(times: float) -> float:
        return dim * math.log(original / (times * 2 * math.pi)) / (2 * math.log(rope.rope_theta))

    low, high = pair_that_turns(rope.beta_fast or 32), pair_that_turns(rope.beta_slow or 1)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    width = high - low if high != low else 0.001
    kept = 1 - ((torch.arange(dim // 2, dtype=wave.dtype, device=wave.device) - low) / width).clamp(0, 1)
    inv_freq = 1.0 / (factor * wave) * (1 - kept) + 1.0 / wave * kept
    if rope.attention_factor is not None:
        return inv_freq, rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return inv_freq, yarn_mscale(factor, rope.mscale) / yarn_mscale(factor, rope.mscale_all_dim)
    return inv_freq, yarn_mscale(factor)


def _longrope(
    rope: RopeConfig, wave: torch.Tensor, max_position_embeddings: int, seq_len
) -> tuple[torch.Tensor, float]:
    """Each pair has its own divisor, one set for texts within the trained length and one for longer texts."""
    original = rope.original_max_position_embeddings
    factor = rope.factor if rope.factor is not None else max_position_embeddings / original
    short = torch.tensor(rope.short_factor, dtype=wave.dtype, device=wave.device)
    long = torch.tensor(rope.long_factor, dtype=wave.dtype, device=wave.device)
    if isinstance(seq_len, torch.Tensor):
        divisors = torch.where(seq_len > original, long, short)
    else:
        divisors = long if seq_len is not None and seq_len > original else short
    attention_factor = rope.attention_factor
    if attention_factor is None:
        attention_factor = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    return 1.0 / (divisors * wave), attention_factor


def _llama3(rope: RopeConfig, inv_freq: torch.Tensor) -> torch.Tensor:
    """Wavelengths below L0/high stay, those above L0/low are divided by the factor, those between are blended."""
    original = rope.original_max_position_embeddings
    wavelength = 2 * math.pi / inv_freq
    blend = (original / wavelength - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blended = (1 - blend) * inv_freq / rope.factor + blend * inv_freq
    slow = torch.where(wavelength > original / rope.low_freq_factor, inv_freq / rope.factor, blended)
    return torch.where(wavelength < original / rope.high_freq_factor, inv_freq, slow)


def rope_cos_sin(
    rope: RopeConfig,
    head_dim: int,
    max_position_embeddings: int,
    positions_BT: torch.Tensor,
    interleaved: bool,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin [B, T, R] in `dtype`, computed in float32; each frequency stands at both members of its pair."""
    seq_len = positions_BT.max() + 1 if rope.depends_on_length else None
    inv_freq, attention_factor = inverse_frequencies(
        rope, head_dim, max_position_embeddings, seq_len, positions_BT.device
    )
    angles = positions_BT[..., None].float() * inv_freq
    angles_BTR = angles.repeat_interleave(2, dim=-1) if interleaved else torch.cat((angles, angles), dim=-1)
    return (angles_BTR.cos() * attention_factor).to(dtype), (angles_BTR.sin() * attention_factor).to(dtype)


def apply_rope(x_BHTK: torch.Tensor, cos_BTK: torch.Tensor, sin_BTK: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """Turn the pairs of x: (i, i + K/2) when half-split, (2i, 2i + 1) when interleaved."""
    if interleaved:
        turned = torch.stack((-x_BHTK[..., 1::2], x_BHTK[..., 0::2]), dim=-1).flatten(-2)
    else:
        first, second = x_BHTK.chunk(2, dim=-1)
        turned = torch.cat((-second, first), dim=-1)
    return x_BHTK * cos_BTK[:, None] + turned * sin_BTK[:, None]


def half_split_rows(num_heads: int, head_dim: int) -> torch.Tensor:
    """The rows of an interleaved query or key projection in half-split order: in each head the even rows come first.

    A model is unchanged when q and k rows are both permuted so and its RoPE switches from interleaved to half-split,
    because q.k sums over pairs and does not care where in the head a pair stands.
    """
    within_head = torch.cat((torch.arange(0, head_dim, 2), torch.arange(1, head_dim, 2)))
    return (torch.arange(num_heads)[:, None] * head_dim + within_head).flatten()
