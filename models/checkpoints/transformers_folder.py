"""Hugging Face folders that only the transformers library can build: an optional road, without remote code."""

import contextlib
import logging
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from ftc.models.checkpoints.huggingface import copy_tokenizer, some, stored_tensors
from ftc.models.checkpoints.skeleton import parameters_on_meta

from ftc.errors import FtcError
from ftc.files import atomic_folder, check_replaceable, could_not_write


def load_transformers(path: str | Path, reason: str) -> torch.nn.Module:
    """The folder's model as transformers builds it, in eval mode and in the file's dtype.

    `reason` says why our own decoder cannot stand in. Raises FtcError when transformers is not installed, does not know
    the architecture, or finds tensors missing, extra or misshapen (it would only warn, and make weights up).
    """
    transformers = _library(reason)
    path = Path(path)
    stored_tensors(path)  # names a corrupt, truncated or missing file
    try:
        with _quiet(transformers):
            model, report = transformers.AutoModelForCausalLM.from_pretrained(
                path,
                trust_remote_code=False,
                local_files_only=True,
                dtype="auto",
                use_safetensors=True,
                ignore_mismatched_sizes=True,  # reported below, by name
                output_loading_info=True,
            )
    except Exception as error:  # whatever the library raises, it is about this folder
        first_line = str(error).strip().split("\n")[0]
        raise FtcError(f"transformers {transformers.__version__} cannot load {path}: {first_line}") from error
    for kind, text in _MISFITS.items():
        names = sorted(name if isinstance(name, str) else _shapes(*name) for name in report.get(kind) or ())
        if names:
            raise FtcError(f"{path} {text.format(some(names))}")
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


_MISFITS = {
    "missing_keys": "lacks tensors that its config.json asks for: {}; download or copy the folder again",
    "unexpected_keys": "holds tensors that its config.json does not account for: {}; check model_type and the sizes there",
    "mismatched_keys": "holds tensors of other shapes than its config.json asks for: {}; they do not belong together",
}


def _shapes(name: str, stored: Sequence[int], asked: Sequence[int]) -> str:
    return f"{name} {list(stored)} instead of {list(asked)}"


@contextlib.contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Keep to itself what the library would print: its report of misfits, which become errors here, and notes of others
    that it imports. Its progress bar stays where a person looks on."""
    loggers = [logging.getLogger(name) for name in ("torchao", "torch.utils._pytree")]
    levels = [logger.level for logger in loggers]
    settings = transformers.utils.logging
    verbosity, bar = settings.get_verbosity(), settings.is_progress_bar_enabled()
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        settings.set_verbosity_error()
        if not sys.stderr.isatty():
            settings.disable_progress_bar()
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        settings.set_verbosity(verbosity)
        if bar:
            settings.enable_progress_bar()


def save_transformers(
    model: torch.nn.Module, path: str | Path, max_shard_bytes: int, tokenizer: str | Path | None = None
) -> None:
    """Write a transformers model with its own `save_pretrained`, in one step. Raises as `save_huggingface` does."""
    import safetensors
    import transformers

    check_replaceable(path, "huggingface")
    with atomic_folder(path, "huggingface") as folder:
        try:
            with _quiet(transformers):
                model.save_pretrained(folder, max_shard_size=max_shard_bytes)
        except safetensors.SafetensorError as error:  # it wraps what the system says
            raise could_not_write(folder, OSError(str(error))) from error
        if tokenizer is not None:
            copy_tokenizer(tokenizer, folder)
