"""Hugging Face folders that only the transformers library can build: an optional road, without remote code."""

from pathlib import Path

import torch
from ftc.models.checkpoints.huggingface import copy_tokenizer, stored_tensors
from ftc.models.checkpoints.skeleton import parameters_on_meta

from ftc.errors import FtcError
from ftc.files import atomic_folder, check_replaceable


def load_transformers(path: str | Path, reason: str) -> torch.nn.Module:
    """The folder's model as transformers builds it, in eval mode and in the file's dtype.

    `reason` says why our own decoder cannot stand in. Raises FtcError when transformers is not installed, does not know
    the architecture, or finds tensors missing, extra or misshapen (it would only warn, and make weights up).
    """
    transformers = _library(reason)
    path = Path(path)
    stored_tensors(path)  # names a corrupt, truncated or missing file
    try:
        model, report = transformers.AutoModelForCausalLM.from_pretrained(
            path,
            trust_remote_code=False,
            local_files_only=True,
            dtype="auto",
            use_safetensors=True,
            output_loading_info=True,
        )
    except Exception as error:  # whatever the library raises, it is about this folder
        first_line = str(error).strip().split("\n")[0]
        raise FtcError(f"transformers {transformers.__version__} cannot load {path}: {first_line}") from error
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        names = sorted(map(str, report.get(kind) or ()))
        if names:
            shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
            raise FtcError(f"{path} does not fit its config.json: {kind.replace('_', ' ')} {shown}")
    return model.eval()


def transformers_blueprint(path: str | Path, reason: str) -> torch.nn.Module:
    """The folder's model as transformers builds it, in eval mode, with parameters on the meta device and real buffers."""
    transformers = _library(reason)
    try:
        config = transformers.AutoConfig.from_pretrained(path, trust_remote_code=False, local_files_only=True)
        with parameters_on_meta():
            return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    except Exception as error:  # whatever the library raises, it is about this folder
        first_line = str(error).strip().split("\n")[0]
        raise FtcError(f"transformers {transformers.__version__} cannot build {path}: {first_line}") from error


def _library(reason: str):
    try:
        import transformers
    except ImportError as error:
        raise FtcError(f"{reason}; transformers may know it: pip install ftc[hf]") from error
    return transformers


def save_transformers(
    model: torch.nn.Module, path: str | Path, max_shard_bytes: int, tokenizer: str | Path | None = None
) -> None:
    """Write a transformers model with its own `save_pretrained`, in one step. Raises as `save_huggingface` does."""
    check_replaceable(path)
    with atomic_folder(path, "huggingface") as folder:
        model.save_pretrained(folder, max_shard_size=max_shard_bytes)
        if tokenizer is not None:
            copy_tokenizer(tokenizer, folder)
