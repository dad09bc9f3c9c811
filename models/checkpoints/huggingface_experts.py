"""Experts in Hugging Face folders: how each family's config.json spells them, and what their tensors are called.

    mixtral                  block_sparse_moe.gate.weight, block_sparse_moe.experts.I.{w1, w3, w2}.weight      gate, up, down
    qwen3_moe, olmoe         mlp.gate.weight, mlp.experts.I.{gate_proj, up_proj, down_proj}.weight
    deepseek_v3              the same, and mlp.gate.e_score_correction_bias, mlp.shared_experts.{gate_proj, up_proj, down_proj}.weight

These are the names on disk, one tensor an expert and matrix, in released folders and in what transformers' `save_pretrained` writes; in memory transformers
5 keeps all experts of a layer in one tensor.
"""

import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from ftc.models.decoder import DecoderConfig
from ftc.models.moe import MoeConfig

from ftc.errors import FtcError


@dataclass(frozen=True)
class ExpertKeys:
    """How a family spells its experts in config.json: MoeConfig's fields that it fixes, keys of those that it lets vary, and what it may leave out."""

    count: str
    width: str
    defaults: dict
    fixed: dict = field(default_factory=dict)
    varies: dict = field(default_factory=dict)


_NORM = {"norm_topk_prob": "norm_topk_prob"}
EXPERTS = {
    "mixtral": ExpertKeys("num_local_experts", "intermediate_size", {"num_local_experts": 8, "num_experts_per_tok": 2}),
    "qwen3_moe": ExpertKeys(
        "num_experts",
        "moe_intermediate_size",
        {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768, "norm_topk_prob": False, "decoder_sparse_step": 1, "mlp_only_layers": []},
        varies=_NORM,
    ),
    "olmoe": ExpertKeys("num_experts", "intermediate_size", {"num_experts": 64, "num_experts_per_tok": 8, "norm_topk_prob": False}, varies=_NORM),
    "deepseek_v3": ExpertKeys(
        "n_routed_experts",
        "moe_intermediate_size",
        {"n_routed_experts": 256, "num_experts_per_tok": 8, "moe_intermediate_size": 2048, "n_shared_experts": 1, "norm_topk_prob": True}
        | {"routed_scaling_factor": 2.5, "n_group": 8, "topk_group": 4, "first_k_dense_replace": 3},
        fixed={"gate": "sigmoid", "selection_bias": True},
        varies=_NORM | {"routed_scaling_factor": "routed_scaling_factor", "groups": "n_group", "topk_groups": "topk_group"},
    ),
}
COUNTS = ("num_local_experts", "num_experts", "n_routed_experts")  # transformers 5 writes the first where released folders have the others
_MIXTRAL = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
_EXPERT = re.compile(r"model\.(layers\.\d+)\.(?:mlp|block_sparse_moe)\.experts\.(?:(\d+)\.|gate_up_proj)")


def with_usual_count(given: dict) -> dict:
    """The config.json with the number of experts under the key that released folders of its family have."""
    keys = EXPERTS.get(given["model_type"])
    found = [given[key] for key in COUNTS if given.get(key) is not None]
    return given if keys is None or not found else given | {keys.count: found[0]}


def strange_experts(config: dict) -> dict[str, bool]:
    """Keys of a config.json, defaults filled in, and whether they describe experts that our decoder does not have."""
    if config["model_type"] not in EXPERTS:
        return {}
    dense = config.get("mlp_only_layers") or []
    head_dim = config.get("head_dim")
    return {
        "head_dim": config["model_type"] == "olmoe" and head_dim is not None and head_dim * config["num_attention_heads"] != config["hidden_size"],
        "router_jitter_noise": bool(config.get("router_jitter_noise")),
        "clip_qkv": config.get("clip_qkv") is not None,
        "decoder_sparse_step": config.get("decoder_sparse_step", 1) != 1,
        "moe_layer_freq": config.get("moe_layer_freq", 1) != 1,
        "mlp_only_layers": sorted(dense) != list(range(len(dense))),
        "scoring_func": config.get("scoring_func", "sigmoid") != "sigmoid",
        "topk_method": config.get("topk_method", "noaux_tc") != "noaux_tc",
    }


def experts_of_config(config: dict) -> tuple[MoeConfig | None, int]:
    """The experts of a config.json, defaults filled in, and how many dense layers come before them; (None, 0) where all layers are dense."""
    keys = EXPERTS.get(config["model_type"])
    if keys is None:
        return None, 0
    dense = config.get("first_k_dense_replace", len(config.get("mlp_only_layers") or ()))
    if dense >= config["num_hidden_layers"]:
        return None, 0
    width = config[keys.width]
    moe = MoeConfig(
        num_experts=config[keys.count],
        top_k=config["num_experts_per_tok"],
        intermediate_size=width,
        shared_intermediate_size=config.get("n_shared_experts", 0) * width,
        **keys.fixed,
        **{name: config[key] for name, key in keys.varies.items()},
    )
    return moe, dense


def config_of_experts(given: dict, config: DecoderConfig) -> dict:
    """`given`, the config.json of all else, with the decoder's experts. Raises FtcError for experts that the family does not have."""
    model_type, moe = given["model_type"], config.moe
    keys = EXPERTS[model_type]
    if model_type == "olmoe" and config.head_dim * config.num_attention_heads != config.hidden_size:  # its norms are over hidden_size
        raise FtcError(f"a Hugging Face folder of this attention (olmoe) cannot hold head_dim {config.head_dim}, only hidden_size / num_attention_heads")
    out = given | {keys.count: moe.num_experts, "num_experts_per_tok": moe.top_k, keys.width: moe.intermediate_size}
    out |= {key: getattr(moe, name) for name, key in keys.varies.items()}
    if model_type == "qwen3_moe":
        out |= {"mlp_only_layers": list(range(config.first_dense_layers)), "decoder_sparse_step": 1}
    if model_type == "deepseek_v3":
        shared = max(1, moe.shared_intermediate_size // moe.intermediate_size)
        out |= {"first_k_dense_replace": config.first_dense_layers, "n_shared_experts": shared}
    meant, dense = experts_of_config(out)
    found = asdict(moe) | {"first_dense_layers": config.first_dense_layers}
    for name, value in (asdict(meant) | {"first_dense_layers": dense}).items():
        if found[name] != value:
            raise FtcError(f"a Hugging Face folder of this attention ({model_type}) cannot hold {name} {found[name]!r}, only {value!r}")
    return out


def stored_name(name: str, config: DecoderConfig) -> str:
    """A parameter's name in the family's files, without its prefix `model.`."""
    if config.moe is None or config.latent is not None or config.qk_norm is not None or ".mlp." not in name:
        return name
    name = name.replace(".mlp.", ".block_sparse_moe.")
    return re.sub(r"gate_proj|up_proj|down_proj", lambda match: _MIXTRAL[match[0]], name)


def check_expert_counts(path: Path, config: DecoderConfig, stored: Iterable[str]) -> None:
    """FtcError that names the layer and both numbers where a folder's tensors are of more or fewer experts than its config.json says."""
    found: dict[str, set[str]] = {}
    for match in filter(None, map(_EXPERT.match, stored)):
        layer, expert = match.groups()
        if expert is None:
            raise FtcError(f"{path}: {layer} has all experts in one tensor; save it with transformers' default, save_original_format=True")
        found.setdefault(layer, set()).add(expert)
    for layer, experts in found.items():
        if config.moe is not None and len(experts) != config.moe.num_experts:
            raise FtcError(
                f"{path}: {layer} has the tensors of {len(experts)} experts, but config.json says {config.moe.num_experts}; they do not belong together"
            )
