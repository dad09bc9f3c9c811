"""Hugging Face folders of the families that our decoder represents exactly: read and written through a lens.

    config.json                       the architecture
    model.safetensors                 the weights, or model-0000i-of-0000n.safetensors and their index
    ftc.json                          marks a folder that we wrote and may replace

Hugging Face stores query and key rows in half-split order. A decoder with interleaved RoPE is written through a
permutation of these rows, and is the same function when read back as half-split.
"""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from ftc.models.checkpoints.safetensors_io import StoredTensor, read_index, write_file
from ftc.models.checkpoints.skeleton import meta_decoder
from ftc.models.decoder import Decoder, DecoderConfig
from ftc.models.rope import RopeConfig, half_split_rows

from ftc.errors import FtcError, nearest
from ftc.files import atomic_folder, atomic_write, check_replaceable
from ftc.rewrite.lens import Compose, Lens, Permute, Rename

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


@dataclass(frozen=True)
class Family:
    """One `model_type`: which biases it has, and the values that its config.json may leave out."""

    architecture: str
    biases: Callable[[dict], tuple[bool, bool, bool]]  # config -> (query key value, attention output, feed-forward)
    defaults: dict


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
}


class NotRepresentable(FtcError):
    """A config.json that is valid but describes something that our decoder is not."""


# --- config.json ------------------------------------------------------------------------------------------------


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
    family = FAMILIES.get(given.get("model_type"))
    if family is None:
        raise NotRepresentable(f"{where} has model_type {given.get('model_type')!r}; {nearest('', FAMILIES)}")
    config = {**family.defaults, **{key: value for key, value in given.items() if value is not None}}
    if given.get("sliding_window", 0) is None:
        config["sliding_window"] = None
    strange = {
        "hidden_act": config["hidden_act"] != "silu",
        "sliding_window": _slides(config),
        "quantization_config": "quantization_config" in config,
        "attention_dropout": bool(config.get("attention_dropout")),
        "partial_rotary_factor": _partial_rotary_factor(config) != 1,
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
        return DecoderConfig(
            **{key: config[key] for key in required},
            num_key_value_heads=config.get("num_key_value_heads", config["num_attention_heads"]),
            head_dim=config.get("head_dim", config["hidden_size"] // config["num_attention_heads"]),
            max_position_embeddings=config["max_position_embeddings"],
            rms_norm_eps=config["rms_norm_eps"],
            tie_word_embeddings=config["tie_word_embeddings"],
            attention_bias=qkv_bias,
            attention_output_bias=output_bias,
            mlp_bias=mlp_bias,
            rope=RopeConfig.from_huggingface(config),
            initializer_range=config["initializer_range"],
            bos_token_id=config.get("bos_token_id"),
            eos_token_ids=tuple(eos) if isinstance(eos, list | tuple) else (eos,),
        )
    except (ValueError, TypeError, ZeroDivisionError) as error:
        raise FtcError(f"{where} is not valid: {error}") from error


def _slides(config: dict) -> bool:
    """Whether some layer attends to a window only."""
    if config["model_type"] == "qwen2":
        layer_types = config.get("layer_types") or []
        return bool(config.get("use_sliding_window")) or any(kind != "full_attention" for kind in layer_types)
    return config.get("sliding_window") is not None


def _partial_rotary_factor(config: dict) -> float:
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    return rope.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1


def config_to_dict(config: DecoderConfig, dtype: torch.dtype = torch.float32) -> dict:
    """The dict of a config.json that describes the half-split form of this decoder.

    Raises FtcError for a combination of biases that no family has.
    """
    biases = (config.attention_bias, config.attention_output_bias, config.mlp_bias)
    for model_type in ("llama", "qwen2"):
        given = {"attention_bias": config.attention_bias, "mlp_bias": config.mlp_bias}
        if FAMILIES[model_type].biases(given) == biases:
            break
    else:
        raise FtcError(
            f"no Hugging Face family has attention_bias={biases[0]}, attention_output_bias={biases[1]} and "
            f"mlp_bias={biases[2]} together; make the first two equal"
        )
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
    if model_type == "llama":
        out |= {"attention_bias": config.attention_bias, "mlp_bias": config.mlp_bias}
    else:
        out |= {"use_sliding_window": False}
    return out


# --- the lens -----------------------------------------------------------------------------------------------------


def huggingface_lens(config: DecoderConfig) -> Compose:
    """From the decoder's parameter names to those of a Hugging Face file, one elementary lens a tensor."""
    names = meta_decoder(config).state_dict()
    steps: list[Lens] = []
    for name in names:
        if name == "lm_head.weight":
            if not config.tie_word_embeddings:
                steps.append(Rename(name, name))
            continue
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        projection = name.split(".")[-2]
        if config.rope_interleaved and projection in heads:
            rows = half_split_rows(heads[projection], config.head_dim)
            steps.append(Permute(name, f"model.{name}", rows))
        else:
            steps.append(Rename(name, f"model.{name}"))
    return Compose(tuple(steps))


# --- reading ------------------------------------------------------------------------------------------------------


def load_huggingface(path: str | Path, rope_interleaved: bool = False) -> Decoder:
    """A decoder in eval mode, in the file's dtype; memory peaks at the parameters and one tensor more.

    With `rope_interleaved` the query and key rows are put into interleaved order, and the decoder's RoPE with them.
    Raises NotRepresentable for another architecture, FtcError for a corrupt, missing, extra or misshapen tensor.
    """
    path = Path(path)
    config = read_config(path)
    if rope_interleaved:
        config = DecoderConfig(**{**vars(config), "rope_interleaved": True})
    stored = stored_tensors(path)
    lens = huggingface_lens(config)
    model = meta_decoder(config)
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    _check_names(path, set(lens.targets), stored, config)
    dtype = stored["model.embed_tokens.weight"].dtype
    if not dtype.is_floating_point or dtype.itemsize == 1:
        raise FtcError(f"{path} stores its weights as {dtype}; a float32, bfloat16, float16 or float64 copy is needed")
    for step in lens.steps():
        (source,), (target,) = step.sources, step.targets
        if stored[target].shape != shapes[source]:
            raise FtcError(
                f"tensor {target!r} in {stored[target].path} has shape {list(stored[target].shape)}; config.json asks "
                f"for {list(shapes[source])}: weights and config.json do not belong together"
            )
        value = step.backward({target: stored[target].read().to(dtype)})[source]
        module, _, leaf = source.rpartition(".")
        setattr(model.get_submodule(module), leaf, torch.nn.Parameter(value))
    model.tie_weights()
    return model.eval()


def stored_tensors(path: Path) -> dict[str, StoredTensor]:
    """All tensors of a folder by name, from one file or from shards. Raises FtcError when a shard is missing."""
    if (path / INDEX).is_file():
        weight_map = read_json(path / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise FtcError(f"{path / INDEX} has no weight_map; download or copy it again")
        files = sorted(set(weight_map.values()))
        if any(not isinstance(file, str) or Path(file).name != file for file in files):
            raise FtcError(f"{path / INDEX} names files outside its folder: {files}")
        stored = {}
        for file in files:
            stored |= {name: tensor for name, tensor in read_index(path / file).items() if weight_map.get(name) == file}
        missing = sorted(set(weight_map) - set(stored))
        if missing:
            raise FtcError(f"{path}: the index names tensors that no shard holds: {_some(missing)}; {_AGAIN}")
        return stored
    if (path / WEIGHTS).is_file():
        return read_index(path / WEIGHTS)
    pickled = sorted(file.name for file in path.glob("pytorch_model*.bin"))
    if pickled:
        raise FtcError(f"{path} holds {_some(pickled)} but no safetensors; convert it: ftc reads no pickled weights")
    raise FtcError(f"{path} holds neither {WEIGHTS} nor {INDEX}; download or copy the weights")


_AGAIN = "download or copy the folder again"


def _check_names(path: Path, expected: set[str], stored: dict[str, StoredTensor], config: DecoderConfig) -> None:
    # Old files carry the RoPE frequencies, which the config determines.
    extra = {name for name in stored if name not in expected and not name.endswith("rotary_emb.inv_freq")}
    if config.tie_word_embeddings and "lm_head.weight" in extra:
        head, embedding = stored["lm_head.weight"], stored.get("model.embed_tokens.weight")
        if embedding is not None and not torch.equal(head.read(), embedding.read()):
            raise FtcError(
                f"{path}: tie_word_embeddings is true, but lm_head.weight differs from the embedding; set it to false "
                "in config.json if the head is a matrix of its own"
            )
        extra.remove("lm_head.weight")
    missing = sorted(expected - set(stored))
    if missing:
        raise FtcError(
            f"{path} misses {len(missing)} tensors that its config.json asks for: {_some(missing)}; {_AGAIN}"
        )
    if extra:
        raise FtcError(
            f"{path} holds {len(extra)} tensors that its config.json does not account for: {_some(sorted(extra))}; "
            "check model_type, num_hidden_layers and the bias settings"
        )


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


# --- writing ------------------------------------------------------------------------------------------------------


def save_huggingface(
    model: Decoder, path: str | Path, max_shard_bytes: int = 5_000_000_000, tokenizer: str | Path | None = None
) -> None:
    """Write a folder that transformers loads as it is, in one step; memory stays at the model's plus one tensor.

    `tokenizer`: a tokenizer.json or tokenizer.bin to copy along. Replaces an earlier folder of ours, and no other.
    Raises FtcError when the folder is not ours or no Hugging Face family has these biases; FtcFailure on a full disk.
    """
    lens = huggingface_lens(model.config)
    state = model.state_dict()
    dtypes = {state[name].dtype for name in lens.sources}
    if len(dtypes) > 1:
        raise FtcError(f"the model's parameters mix {', '.join(sorted(map(str, dtypes)))}; cast it to one dtype first")
    config = config_to_dict(model.config, dtypes.pop())
    by_target = {step.targets[0]: step for step in lens.steps()}
    entries = [
        (name, state[step.sources[0]].dtype, tuple(state[step.sources[0]].shape)) for name, step in by_target.items()
    ]

    @torch.no_grad()
    def get(name: str) -> torch.Tensor:
        step = by_target[name]
        return step.forward({step.sources[0]: state[step.sources[0]]})[name]

    check_replaceable(path)
    with atomic_folder(path, "huggingface") as folder:
        atomic_write(folder / "config.json", json.dumps(config, indent=2) + "\n")
        shards = _shards(entries, max_shard_bytes)
        for file, shard in shards.items():
            write_file(folder / file, shard, get)
        if len(shards) > 1:
            total = sum(_num_bytes(entry) for entry in entries)
            weight_map = {name: file for file, shard in shards.items() for name, _, _ in shard}
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
            atomic_write(folder / INDEX, json.dumps(index, indent=2) + "\n")
        if tokenizer is not None:
            copy_tokenizer(tokenizer, folder)


def copy_tokenizer(source: str | Path, folder: Path) -> None:
    """Copy a tokenizer file, or all tokenizer files of a folder. Raises FtcError when there is none."""
    source = Path(source)
    pattern = re.compile(r"(tokenizer.*\.(json|bin|model)|special_tokens_map\.json|chat_template\.jinja)$")
    files = [source] if source.is_file() else sorted(file for file in source.glob("*") if pattern.match(file.name))
    if not files:
        raise FtcError(f"{source} holds no tokenizer (tokenizer.json or tokenizer.bin)")
    for file in files:
        shutil.copyfile(file, folder / file.name)


def _num_bytes(entry: tuple[str, torch.dtype, tuple[int, ...]]) -> int:
    return torch.Size(entry[2]).numel() * entry[1].itemsize


def _shards(entries: list, max_shard_bytes: int) -> dict[str, list]:
    """Files and their tensors, in order; a tensor larger than the limit gets a file of its own."""
    groups, size = [[]], 0
    for entry in entries:
        if groups[-1] and size + _num_bytes(entry) > max_shard_bytes:
            groups.append([])
            size = 0
        groups[-1].append(entry)
        size += _num_bytes(entry)
    if len(groups) == 1:
        return {WEIGHTS: groups[0]}
    return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": group for i, group in enumerate(groups, 1)}
