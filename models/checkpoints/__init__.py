"""Checkpoint formats: which reader or writer a path or a model needs."""

from pathlib import Path

from ftc.models.checkpoints.huggingface import load_huggingface, save_huggingface
from ftc.models.checkpoints.huggingface_config import NotRepresentable, read_config
from ftc.models.checkpoints.llama2c import load_llama2c, read_header
from ftc.models.checkpoints.skeleton import meta_decoder
from ftc.models.checkpoints.transformers_folder import load_transformers, save_transformers, transformers_blueprint
from ftc.models.decoder import Decoder
from torch import nn

from ftc.errors import FtcError


def load(path: str | Path) -> nn.Module:
    """A model in eval mode, in the dtype of its file, from a Hugging Face folder or a llama2.c file.

    A folder may also hold a llama2.c file named checkpoint.bin. Folders of architectures that our decoder represents
    exactly give a `Decoder`; others are built by transformers if it is installed (never with remote code).
    Raises FtcError when there is nothing to read at `path`, or what is there is corrupt, incomplete or unknown.
    """
    path = _checkpoint(path)
    if path.is_file():
        return load_llama2c(path)
    try:
        return load_huggingface(path)
    except NotRepresentable as reason:
        return load_transformers(path, str(reason))


def blueprint(path: str | Path) -> nn.Module:
    """The module tree that `load(path)` gives, in eval mode, without reading weights: parameters on the meta device, float32.

    Raises FtcError as `load` does, except for what only the weights can tell.
    """
    path = _checkpoint(path)
    if path.is_file():
        return meta_decoder(read_header(path)).eval()
    try:
        return meta_decoder(read_config(path)).eval()
    except NotRepresentable as reason:
        return transformers_blueprint(path, str(reason))


def _checkpoint(path: str | Path) -> Path:
    """The llama2.c file or the Hugging Face folder that `path` means; FtcError when it is neither."""
    path = Path(path)
    if not path.exists():
        raise FtcError(f"{path} does not exist; name a Hugging Face folder or a llama2.c .bin file")
    if path.is_file():
        if path.suffix in (".safetensors", ".json"):
            raise FtcError(f"{path} is one file of a model; name its folder, {path.parent}")
        return path
    if (path / "config.json").is_file():
        return path
    if (path / "checkpoint.bin").is_file():
        return path / "checkpoint.bin"
    raise FtcError(
        f"{path} holds no model: neither config.json (Hugging Face) nor checkpoint.bin (llama2.c); "
        "a saved Program is read by ftc.load"
    )


def save(
    model: nn.Module, path: str | Path, max_shard_bytes: int = 5_000_000_000, tokenizer: str | Path | None = None
) -> None:
    """Write a `Decoder` or a transformers model as a Hugging Face folder, in one step.

    `tokenizer`: a tokenizer file, or a folder that holds one, to copy along. Replaces an earlier folder of ours only.
    Raises FtcError for another kind of model or a folder that is not ours, FtcFailure when the disk is full.
    """
    if isinstance(model, Decoder):
        save_huggingface(model, path, max_shard_bytes, tokenizer)
    elif hasattr(model, "save_pretrained"):
        save_transformers(model, path, max_shard_bytes, tokenizer)
    else:
        raise FtcError(
            f"a {type(model).__name__} cannot be written as a Hugging Face folder, only ftc's Decoder and transformers "
            "models can; a Program has program.save(folder)"
        )
