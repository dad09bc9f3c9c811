"""Hugging Face folders of the families that our decoder represents exactly: read and written through a lens.

    config.json                       the architecture
    model.safetensors                 the weights, or model-0000i-of-0000n.safetensors and their index
    ftc.json                          marks a folder that we wrote and may replace

Hugging Face stores query and key rows in half-split order. A decoder with interleaved RoPE is written through a
permutation of these rows, and of the norms over them, and is the same function when read back as half-split. With latent
attention (DeepSeek) the order is a setting of the folder, and stays. Experts: huggingface_experts.py.
"""

import json
import re
import shutil
from pathlib import Path

import torch
from ftc.models.checkpoints.huggingface_config import config_to_dict, read_config, read_json
from ftc.models.checkpoints.huggingface_experts import check_expert_counts, stored_name
from ftc.models.checkpoints.safetensors_io import StoredTensor, read_index, write_file
from ftc.models.checkpoints.skeleton import meta_decoder
from ftc.models.decoder import Decoder, DecoderConfig
from ftc.models.rope import half_split_rows

from ftc.errors import FtcError
from ftc.files import atomic_folder, atomic_write, check_replaceable
from ftc.rewrite.lens import Compose, Lens, Permute, Rename

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


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
        target, heads = f"model.{stored_name(name, config)}", _rotated_heads(name, config)
        if heads and config.rope_interleaved and config.latent is None:
            steps.append(Permute(name, target, half_split_rows(heads, config.head_dim)))
        else:
            steps.append(Rename(name, target))
    return Compose(tuple(steps))


def _rotated_heads(name: str, config: DecoderConfig) -> int:
    """How many heads' elements, which RoPE turns, stand in the first dim of a parameter; 0 for all but queries and keys."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    heads |= {"q_norm": 1, "k_norm": 1} if config.qk_norm == "head" else {"q_norm": heads["q_proj"], "k_norm": heads["k_proj"]}
    return heads.get(name.split(".")[-2], 0)


# --- reading ------------------------------------------------------------------------------------------------------


def load_huggingface(path: str | Path, rope_interleaved: bool = False) -> Decoder:
    """A decoder in eval mode, in the file's dtype; memory peaks at the parameters and one tensor more.

    With `rope_interleaved` the query and key rows are put into interleaved order, and the decoder's RoPE with them.
    Raises NotRepresentable for another architecture, FtcError for a corrupt, missing, extra or misshapen tensor.
    """
    path = Path(path)
    config = read_config(path)
    if rope_interleaved and config.latent is None:
        config = DecoderConfig(**{**vars(config), "rope_interleaved": True})
    stored = stored_tensors(path)
    lens = huggingface_lens(config)
    model = meta_decoder(config)
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    check_expert_counts(path, config, stored)
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
        (module, _, leaf), value = source.rpartition("."), stored[target].read()
        module = model.get_submodule(module)
        if leaf not in module._buffers:  # a selection bias keeps its own dtype: it moves by steps that bfloat16 would lose
            value = torch.nn.Parameter(step.backward({target: value.to(dtype)})[source])
        setattr(module, leaf, value)
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
            # A tensor that the index does not name counts too: it is reported as extra.
            stored |= {
                name: tensor for name, tensor in read_index(path / file).items() if weight_map.get(name, file) == file
            }
        missing = sorted(set(weight_map) - set(stored))
        if missing:
            raise FtcError(f"{path}: the index names tensors that no shard holds: {some(missing)}; {_AGAIN}")
        return stored
    if (path / WEIGHTS).is_file():
        return read_index(path / WEIGHTS)
    pickled = sorted(file.name for file in path.glob("pytorch_model*.bin"))
    if pickled:
        raise FtcError(f"{path} holds {some(pickled)} but no safetensors; convert it: ftc reads no pickled weights")
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
            f"{path} lacks {len(missing)} of the tensors that its config.json asks for: {some(missing)}; {_AGAIN}"
        )
    if extra:
        raise FtcError(
            f"{path} holds tensors that its config.json does not account for: {some(sorted(extra))}; "
            "check model_type, num_hidden_layers and the bias settings"
        )


def some(names: list[str]) -> str:
    """The first four names, and how many more there are."""
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


# --- writing ------------------------------------------------------------------------------------------------------


def save_huggingface(
    model: Decoder, path: str | Path, max_shard_bytes: int = 5_000_000_000, tokenizer: str | Path | None = None
) -> None:
    """Write a folder that transformers loads as it is, in one step; memory stays at the model's plus one tensor.

    Experts that no Hugging Face family has are written in a form of ours, which transformers does not know (own_config.py).
    `tokenizer`: a tokenizer.json or tokenizer.bin to copy along. Replaces an earlier folder of ours, and no other.
    Raises FtcError when the folder is not ours or no Hugging Face family has these biases; FtcFailure on a full disk.
    """
    lens = huggingface_lens(model.config)
    state = model.state_dict()
    buffers = {name for name, _ in model.named_buffers()}
    dtypes = {state[name].dtype for name in lens.sources if name not in buffers}
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

    check_replaceable(path, "huggingface")
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
