"""Decoder architectures by name."""

import dataclasses

from ftc.models.decoder import DecoderConfig
from ftc.models.mla import LATENT_SIZES, LatentConfig
from ftc.models.moe import MoeConfig
from ftc.models.rope import RopeConfig

from ftc.errors import FtcError, nearest

PRESETS: dict[str, DecoderConfig] = {
    # For tests: runs in milliseconds.
    "tiny": DecoderConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=176,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=256,
    ),
    # For `make quickstart`: about three minutes of training on two CPU cores.
    "quickstart": DecoderConfig(
        vocab_size=4096,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        tie_word_embeddings=True,
    ),
    # The shape of llama2.c's stories260K checkpoint.
    "stories260k": DecoderConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=172,
        num_hidden_layers=5,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=8,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        rope_interleaved=True,
        bos_token_id=1,
        eos_token_ids=(2,),
    ),
    # Llama 3.2 1B.
    "llama-1b": DecoderConfig(
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        max_position_embeddings=131072,
        tie_word_embeddings=True,
        rope=RopeConfig(
            rope_type="llama3",
            rope_theta=500000.0,
            factor=32.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=8192,
        ),
        bos_token_id=128000,
        eos_token_ids=(128001,),
    ),
    # Llama 3 8B.
    "llama-3-8b": DecoderConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=8192,
        rope=RopeConfig(rope_theta=500000.0),
        bos_token_id=128000,
        eos_token_ids=(128001,),
    ),
    # OLMoE 1B-7B (Muennighoff et al. 2024, arXiv:2409.02060): 6.9e9 parameters, 1.3e9 a token.
    "olmoe-1b-7b": DecoderConfig(
        vocab_size=50304,
        hidden_size=2048,
        intermediate_size=1024,
        num_hidden_layers=16,
        num_attention_heads=16,
        num_key_value_heads=16,
        head_dim=128,
        max_position_embeddings=4096,
        qk_norm="projection",
        moe=MoeConfig(num_experts=64, top_k=8, intermediate_size=1024, norm_topk_prob=False),
        eos_token_ids=(50279,),
    ),
}


def preset(name: str, **changes) -> DecoderConfig:
    """The preset with some fields changed: `preset("tiny", num_hidden_layers=4)`.

    `latent` may be a LatentConfig, its fields as a dict, or the name of a published one (LATENT_SIZES); what must follow from it
    (head_dim, num_key_value_heads) does, unless it is given. `moe` may be a MoeConfig or its fields as a dict, and what the dict
    leaves out stays as in a preset that has experts. Raises FtcError for an unknown name or field, with the nearest valid one, and
    for values that do not fit.
    """
    if name not in PRESETS:
        raise FtcError(f"unknown preset {name!r}; {nearest(name, PRESETS)}")
    valid = {field.name for field in dataclasses.fields(DecoderConfig)}
    for key in changes:
        if key not in valid:
            raise FtcError(f"unknown field {key!r} of a decoder; {nearest(key, valid)}")
    try:
        if changes.get("latent") is not None:
            changes = _with_latent(name, changes)
        if isinstance(changes.get("moe"), dict):
            changes = changes | {"moe": _from_fields("moe", MoeConfig, changes["moe"], PRESETS[name].moe)}
        return dataclasses.replace(PRESETS[name], **changes)
    except ValueError as error:
        raise FtcError(f"preset {name!r} with {changes}: {error}") from error


def _with_latent(name: str, changes: dict) -> dict:
    latent = changes["latent"]
    if isinstance(latent, str):
        if latent not in LATENT_SIZES:
            raise FtcError(f"unknown latent sizes {latent!r}; {nearest(latent, LATENT_SIZES)}")
        latent = LATENT_SIZES[latent]
    if isinstance(latent, dict):
        latent = _from_fields("latent", LatentConfig, latent)
    heads = changes.get("num_attention_heads", PRESETS[name].num_attention_heads)
    follows = {"head_dim": latent.qk_rope_head_dim, "num_key_value_heads": heads, "rope_interleaved": True}
    return follows | changes | {"latent": latent}


def _from_fields(what: str, kind: type, given: dict, base=None):
    """An object of the dataclass `kind` with these fields, the others as in `base` or by default. Raises FtcError for unknown and missing ones."""
    fields = dataclasses.fields(kind)
    valid = {field.name for field in fields}
    for key in given:
        if key not in valid:
            raise FtcError(f"unknown field {key!r} of {what}; {nearest(key, valid)}")
    if base is not None:
        return dataclasses.replace(base, **given)
    missing = [field.name for field in fields if field.default is dataclasses.MISSING and field.name not in given]
    if missing:
        raise FtcError(f"{what} lacks {', '.join(missing)}")
    return kind(**given)


# "tiny" with latent attention: 24 numbers a token and layer in a cache, where "tiny" has 64.
_TINY_LATENT = LatentConfig(kv_lora_rank=16, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16, q_lora_rank=32)
PRESETS["tiny-mla"] = preset("tiny", latent=_TINY_LATENT)

# Two of eight experts a token, on a CPU, and the dense model that computes as much: beside the embedding both multiply by 656,512 parameters a
# token, the first by the routers' 4,096 more. It has 1,905,792 in all, the dense one 722,048.
PRESETS["tiny-moe"] = preset(
    "tiny", hidden_size=128, intermediate_size=128, num_hidden_layers=4, head_dim=32,
    moe=MoeConfig(num_experts=8, top_k=2, intermediate_size=128),
)  # fmt: skip
PRESETS["tiny-moe-dense"] = preset("tiny-moe", moe=None, intermediate_size=256)
