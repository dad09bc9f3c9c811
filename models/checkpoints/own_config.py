"""A config.json of our own, for experts that no Hugging Face family has: the decoder's fields as they are, `model_type` ftc_decoder.

Capacity, expert choice, weights on the input, shared experts without latent attention: what a run can train must be written at its end. Weights lie beside
it as in the families' folders. transformers refuses such a folder by its `model_type`; ours reads it as any other.
"""

from dataclasses import asdict, fields, replace

import torch
from ftc.models.decoder import DecoderConfig
from ftc.models.mla import LatentConfig
from ftc.models.moe import MoeConfig
from ftc.models.rope import RopeConfig

from ftc.errors import FtcError, nearest

MODEL_TYPE = "ftc_decoder"
_BESIDE = {"model_type", "architectures", "dtype", "rope_parameters"}


def own_config_to_dict(config: DecoderConfig, dtype: torch.dtype) -> dict:
    """The dict of a config.json that describes the half-split form of this decoder (with latent attention: the order that it has)."""
    config = config if config.latent is not None else replace(config, rope_interleaved=False)
    out = asdict(config) | {"rope_parameters": config.rope.as_huggingface(), "eos_token_ids": list(config.eos_token_ids)}
    del out["rope"]
    return {"architectures": ["Decoder"], "model_type": MODEL_TYPE, **out, "dtype": str(dtype).removeprefix("torch.")}


def own_config_from_dict(given: dict, where: str) -> DecoderConfig:
    """The decoder that `own_config_to_dict` wrote. Raises FtcError for unknown, missing and impossible fields."""
    valid = {field.name for field in fields(DecoderConfig)} - {"rope"}
    unknown = sorted(set(given) - valid - _BESIDE)
    if unknown:
        raise FtcError(f"{where}: unknown field {unknown[0]!r} of a decoder; {nearest(unknown[0], valid)}")
    values = {name: given[name] for name in valid & set(given)}
    try:
        for name, kind in (("latent", LatentConfig), ("moe", MoeConfig)):
            if values.get(name) is not None:
                values[name] = kind(**values[name])
        return DecoderConfig(**values, rope=RopeConfig.from_huggingface(given))
    except (ValueError, TypeError, AttributeError) as error:
        raise FtcError(f"{where} is not valid: {error}") from error
