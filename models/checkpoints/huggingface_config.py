"""A Hugging Face config.json and our decoder's architecture: which of them say the same thing."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from ftc.models.checkpoints.huggingface_experts import (
    EXPERTS,
    config_of_experts,
    experts_of_config,
    strange_experts,
    with_usual_count,
)
from ftc.models.checkpoints.own_config import MODEL_TYPE, own_config_from_dict, own_config_to_dict
from ftc.models.decoder import DecoderConfig
from ftc.models.mla import LatentConfig
from ftc.models.rope import RopeConfig

from ftc.errors import FtcError, nearest


@dataclass(frozen=True)
class Family:
    """One `model_type`: which biases it has, and the values that its config.json may leave out."""

    architecture: str
    biases: Callable[[dict], tuple[bool, bool, bool]]  # config -> (query key value, attention output, feed-forward)
    defaults: dict
    qk_norm: str | None = None


_COMMON = {"hidden_act": "silu", "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "initializer_range": 0.02}
FAMILIES = {
    "llama": Family(
        "LlamaForCausalLM",
        lambda config: (*[bool(config.get("attention_bias"))] * 2, bool(config.get("mlp_bias"))),
        {**_COMMON, "max_position_embeddings": 2048},
    ),
    "mistral": Family(
        "MistralForCausalLM",
        lambda config: (False, False, False),
        {**_COMMON, "max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096},
    ),
    "qwen2": Family(
        "Qwen2ForCausalLM",
        lambda config: (True, False, False),
        {**_COMMON, "max_position_embeddings": 32768, "num_key_value_heads": 32},
    ),
    "deepseek_v3": Family(
        "DeepseekV3ForCausalLM",
        lambda config: (*[bool(config.get("attention_bias"))] * 2, False),
        {**_COMMON, "max_position_embeddings": 4096, "kv_lora_rank": 512, "q_lora_rank": 1536, "qk_rope_head_dim": 64}
        | {"v_head_dim": 128, "qk_nope_head_dim": 128, "rope_interleave": True, **EXPERTS["deepseek_v3"].defaults},
    ),
    "mixtral": Family(
        "MixtralForCausalLM",
        lambda config: (False, False, False),
        {**_COMMON, "rms_norm_eps": 1e-5, "max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": None}
        | EXPERTS["mixtral"].defaults,
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        lambda config: (*[bool(config.get("attention_bias"))] * 2, False),
        {**_COMMON, "max_position_embeddings": 32768, "num_key_value_heads": 32, "head_dim": 128},
        qk_norm="head",
    ),
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM",
        lambda config: (*[bool(config.get("attention_bias"))] * 2, False),
        {**_COMMON, "max_position_embeddings": 32768, "num_key_value_heads": 4, **EXPERTS["qwen3_moe"].defaults},
        qk_norm="head",
    ),
    "olmoe": Family(
        "OlmoeForCausalLM",
        lambda config: (*[bool(config.get("attention_bias"))] * 2, False),
        {**_COMMON, "rms_norm_eps": 1e-5, "max_position_embeddings": 4096, "num_key_value_heads": 16, **EXPERTS["olmoe"].defaults},
        qk_norm="projection",
    ),
}


class NotRepresentable(FtcError):
    """A config.json that is valid but describes something that our decoder is not."""


def read_config(path: str | Path) -> DecoderConfig:
    """The architecture in a folder's config.json.

    Raises NotRepresentable when it is another architecture than our decoder's, FtcError when it is missing or broken.
    """
    return config_from_dict(read_json(Path(path) / "config.json"), str(Path(path) / "config.json"))


def read_json(path: Path) -> dict:
    """A JSON object. Raises FtcError when the file is missing or is not one."""
    if not path.is_file():
        raise FtcError(f"{path} does not exist; a Hugging Face folder holds config.json and *.safetensors")
    try:
        value = json.loads(path.read_text())
    except ValueError as error:
        raise FtcError(f"{path} is not valid JSON ({error}); download or copy it again") from error
    if not isinstance(value, dict):
        raise FtcError(f"{path} holds a {type(value).__name__}, not an object; download or copy it again")
    return value


def config_from_dict(given: dict, where: str = "config.json") -> DecoderConfig:
    """From the dict of a config.json; raises as `read_config` does."""
    if given.get("model_type") == MODEL_TYPE:
        return own_config_from_dict(given, where)
    family = FAMILIES.get(given.get("model_type"))
    if family is None:
        raise NotRepresentable(f"{where} has model_type {given.get('model_type')!r}; {nearest('', FAMILIES)}")
    given = with_usual_count(given)
    config = {**family.defaults, **{key: value for key, value in given.items() if value is not None}}
    for key in ("sliding_window", "q_lora_rank"):  # where null says something
        if given.get(key, 0) is None:
            config[key] = None
    latent = _latent(config)
    strange = {
        "hidden_act": config["hidden_act"] != "silu",
        "sliding_window": _slides(config),
        "quantization_config": "quantization_config" in config,
        "attention_dropout": bool(config.get("attention_dropout")),
        "partial_rotary_factor": _partial_rotary_factor(config) != 1,
        **strange_experts(config),
        "architectures": given.get("architectures", [family.architecture]) not in (None, [family.architecture]),
    }
    for key, is_strange in strange.items():
        if is_strange:
            raise NotRepresentable(f"{where}: {key} {config.get(key)!r} is not a part of our decoder")
    required = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    missing = [key for key in required if key not in config]
    if missing:
        raise FtcError(f"{where} lacks {', '.join(missing)}; download or copy it again")
    eos = config.get("eos_token_id", ())
    qkv_bias, output_bias, mlp_bias = family.biases(config)
    try:
        moe, first_dense_layers = experts_of_config(config)
        return DecoderConfig(
            **{key: config[key] for key in required},
            num_key_value_heads=config["num_attention_heads"] if latent else config.get("num_key_value_heads", config["num_attention_heads"]),
            head_dim=latent["qk_rope_head_dim"] if latent else config.get("head_dim", config["hidden_size"] // config["num_attention_heads"]),
            max_position_embeddings=config["max_position_embeddings"],
            rms_norm_eps=config["rms_norm_eps"],
            tie_word_embeddings=config["tie_word_embeddings"],
            attention_bias=qkv_bias,
            attention_output_bias=output_bias,
            mlp_bias=mlp_bias,
            rope=RopeConfig.from_huggingface(config),
            rope_interleaved=bool(latent and config["rope_interleave"]),
            latent=LatentConfig(**latent) if latent else None,
            qk_norm=family.qk_norm,
            moe=moe,
            first_dense_layers=first_dense_layers,
            initializer_range=config["initializer_range"],
            bos_token_id=config.get("bos_token_id"),
            eos_token_ids=tuple(eos) if isinstance(eos, list | tuple) else (eos,),
        )
    except (ValueError, TypeError, ZeroDivisionError) as error:
        raise FtcError(f"{where} is not valid: {error}") from error


def _latent(config: dict) -> dict | None:
    """The sizes of latent attention in a config.json that has it."""
    if config["model_type"] != "deepseek_v3":
        return None
    return {field.name: config[field.name] for field in fields(LatentConfig)}


def _slides(config: dict) -> bool:
    """Whether some layer attends to a window only."""
    if config["model_type"] in ("qwen2", "qwen3", "qwen3_moe"):
        layer_types = config.get("layer_types") or []
        return bool(config.get("use_sliding_window")) or any(kind != "full_attention" for kind in layer_types)
    return config.get("sliding_window") is not None


def _partial_rotary_factor(config: dict) -> float:
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    return rope.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1


def config_to_dict(config: DecoderConfig, dtype: torch.dtype = torch.float32) -> dict:
    """The dict of a config.json that describes the half-split form of this decoder, of our own `model_type` for experts that no family has.

    Raises FtcError for a combination of biases and norms that no family has without experts.
    """
    try:
        return family_config_to_dict(config, dtype)
    except FtcError:
        if config.moe is None:
            raise
        return own_config_to_dict(config, dtype)


def family_config_to_dict(config: DecoderConfig, dtype: torch.dtype = torch.float32) -> dict:
    """The dict of a config.json that transformers reads. Raises FtcError for what no family has, with its name and value."""
    model_type = family_of(config)
    eos = list(config.eos_token_ids)
    out = {
        "architectures": [FAMILIES[model_type].architecture],
        "model_type": model_type,
        **{
            key: getattr(config, key)
            for key in (
                "vocab_size",
                "hidden_size",
                "intermediate_size",
                "num_hidden_layers",
                "num_attention_heads",
                "num_key_value_heads",
                "head_dim",
                "max_position_embeddings",
                "rms_norm_eps",
                "tie_word_embeddings",
                "initializer_range",
                "bos_token_id",
            )
        },
        "eos_token_id": eos[0] if len(eos) == 1 else (eos or None),
        "hidden_act": "silu",
        "rope_parameters": config.rope.as_huggingface(),
        "dtype": str(dtype).removeprefix("torch."),
    }
    if config.latent is not None:
        dense = {"first_k_dense_replace": config.num_hidden_layers, "num_nextn_predict_layers": 0}
        out |= asdict(config.latent) | dense | {"attention_bias": config.attention_bias, "rope_interleave": config.rope_interleaved}
    elif model_type == "llama":
        out |= {"attention_bias": config.attention_bias, "mlp_bias": config.mlp_bias}
    elif model_type == "mixtral":
        out |= {"sliding_window": None}
    elif model_type == "olmoe":
        out |= {"attention_bias": config.attention_bias}
    else:
        out |= {"use_sliding_window": False} | ({} if model_type == "qwen2" else {"attention_bias": config.attention_bias})
    return out if config.moe is None else config_of_experts(out, config)


def family_of(config: DecoderConfig) -> str:
    """The `model_type` that has this decoder's attention, norms and biases. Raises FtcError when none has."""
    if config.latent is not None:
        candidates = ("deepseek_v3",)
    elif config.qk_norm is not None:
        candidates = {("head", False): ("qwen3",), ("head", True): ("qwen3_moe",), ("projection", True): ("olmoe",)}.get(
            (config.qk_norm, config.moe is not None), ()
        )
    else:
        candidates = ("llama", "qwen2") if config.moe is None else ("mixtral",)
    if not candidates:
        raise FtcError(f"no Hugging Face family has qk_norm {config.qk_norm!r} without experts; it goes with moe (OLMoE)")
    given = {"attention_bias": config.attention_bias, "mlp_bias": config.mlp_bias}
    biases = (config.attention_bias, config.attention_output_bias, config.mlp_bias)
    for model_type in candidates:
        if FAMILIES[model_type].biases(given) == biases:
            return model_type
    advice = "experts and no norms of queries and keys go without biases (Mixtral)" if candidates == ("mixtral",) else "make the first two equal"
    raise FtcError(
        f"no Hugging Face family has attention_bias={biases[0]}, attention_output_bias={biases[1]} and mlp_bias={biases[2]} together; {advice}"
    )
