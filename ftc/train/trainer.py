"""One training run, in the process that torchrun or `ftc.train.launch` started: prepare, train, measure, save."""

import json
import os
import socket
import time
import traceback
from pathlib import Path
from typing import Any

from ftc.errors import FtcError, FtcFailure
from ftc.files import MARKER, atomic_write, check_replaceable
from ftc.train.config import check_passes, check_values, dump_toml, read_toml

MODEL_FOLDER, PROGRAM_FOLDER = "model", "program"
STAGE_FILE, RESULT_FILE, ERROR_FILE, RESOLVED_FILE = "stage.txt", "result.json", "error.json", "resolved.toml"


def set_single_process_environment() -> None:
    """What torchrun would set for one process, on a free port, unless it already did."""
    if "RANK" not in os.environ:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def main(arguments: list[str]) -> int:
    """Train as the flags say (`--job.config_file run.toml` and torchtitan's own); returns the exit code.

    0: done; 1: the run failed; 2: the input is wrong. The reason stands on stderr and in error.json of the run's folder.
    """
    import sys

    folder: Path | None = None
    try:
        set_single_process_environment()
        job_config = load_config(arguments)
        folder = Path(job_config.job.dump_folder)
        run(job_config)
        return 0
    except (FtcError, FtcFailure) as error:
        message, code = str(error), 2 if isinstance(error, FtcError) else 1
    except Exception as error:  # torchtitan's or torch's: the log keeps the traceback, the user gets one paragraph
        traceback.print_exc()
        message, code = f"training failed with {type(error).__name__}: {error}", 1
    if folder is not None:
        atomic_write(folder / ERROR_FILE, json.dumps({"message": message, "exit_code": code}) + "\n")
    print(f"error: {message}", file=sys.stderr)
    return code


def load_config(arguments: list[str]) -> Any:
    """torchtitan's configuration, with the `[ftc]` section, from flags and the TOML file that they name.

    Raises FtcError for unknown sections and keys, values of the wrong type, and settings that one process cannot honour.
    """
    from ftc.train import device

    device.install()
    from torchtitan.config import ConfigManager

    arguments = [
        *arguments,
        "--job.custom_config_module=ftc.train.config",
        "--experimental.custom_import=ftc.train.adapter",
    ]
    manager = ConfigManager()
    path = _config_file(arguments)
    if path:
        values = read_toml(path)
        check_values(manager._maybe_add_custom_config(arguments, values), values)
        check_passes(values.get("ftc", {}).get("passes", []))
    try:
        job_config = manager.parse_args(arguments)
    except SystemExit as stop:
        if stop.code:
            raise FtcError("the flags are not valid (see above); python -m ftc.train --help lists them") from None
        raise
    if job_config.model.name == "ftc" and "ftc" not in job_config.model.converters:
        job_config.model.converters.insert(0, "ftc")  # it checks the tokenizer and applies what [ftc] asks for
    if job_config.validation.enable:
        raise FtcError("[validation] enable is not supported; [ftc] validate measures the held-out text at the end")
    return job_config


def _config_file(arguments: list[str]) -> str | None:
    for index, argument in enumerate(arguments):
        name, _, value = argument.partition("=")
        if name in ("--job.config_file", "--job.config-file"):
            return value or (arguments[index + 1] if index + 1 < len(arguments) else None)
    return None


def run(job_config: Any) -> dict[str, Any]:
    """Train, measure and save into `job.dump_folder`; returns what result.json holds.

    Continues from the newest checkpoint in the folder. Raises FtcError when the folder belongs to another configuration.
    """
    from ftc.rewrite.registry import parse_passes
    from ftc.train.objective import parse_objective

    folder = Path(job_config.job.dump_folder)
    parse_passes(job_config.ftc.passes)
    parse_objective(job_config.ftc.loss, job_config.ftc.passes)
    claim_folder(folder, job_config)
    _stage(folder, "preparing the data")
    import torchtitan.train as titan
    from torchtitan.tools.logging import init_logger

    from ftc.train import adapter

    init_logger()
    prepared = adapter.prepared_data(job_config)
    trainer = titan.Trainer(job_config)
    adapter.objective_of(job_config).progress = lambda: (trainer.step - 1) / job_config.training.steps
    try:
        started = time.perf_counter()
        _stage(folder, "training")
        trainer.train()
        result = {"steps": trainer.step, "tokens": trainer.ntokens_seen, "seconds": time.perf_counter() - started}
        body = trainer.model_parts[0].body
        _stage(folder, "saving")
        result |= save_model(body, folder, job_config, prepared)
        if job_config.ftc.validate and prepared.validation.num_bytes:
            _stage(folder, "measuring on the validation text")
            result["validation"] = validate(body, prepared, job_config)
    finally:
        trainer.close()
        import torch.distributed

        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    atomic_write(folder / RESULT_FILE, json.dumps(result, indent=2) + "\n")
    _stage(folder, "done")
    return result


def claim_folder(folder: Path, job_config: Any) -> None:
    """Mark the folder as this run's, with the resolved configuration. Raises FtcError when it holds another run or files."""
    check_replaceable(folder)
    resolved = dump_toml(job_config.to_dict())
    old = folder / RESOLVED_FILE
    if old.is_file():
        differing = _difference(read_toml(old), read_toml_text(resolved))
        if differing and (folder / job_config.checkpoint.folder).is_dir():
            raise FtcError(
                f"{folder} holds the checkpoints of a run with another {differing}; name another folder, or start afresh"
            )
    atomic_write(folder / MARKER, json.dumps({"kind": "train"}) + "\n")
    atomic_write(old, resolved)
    (folder / ERROR_FILE).unlink(missing_ok=True)


def read_toml_text(text: str) -> dict[str, Any]:
    import tomllib

    return tomllib.loads(text)


# Sections that do not change what is learned, so that a run may continue with others.
_FREE_SECTIONS = ("job", "profiling", "metrics", "comm", "checkpoint", "experimental", "memory_estimation")


def _difference(old: dict[str, Any], new: dict[str, Any]) -> str:
    """The first key, section.name, in which two configurations that must train the same model differ; empty if none."""
    for section in sorted(set(old) | set(new)):
        if section not in _FREE_SECTIONS:
            before, after = old.get(section, {}), new.get(section, {})
            for key in sorted(set(before) | set(after)):
                if before.get(key) != after.get(key):
                    return f"{section}.{key} ({before.get(key)!r}, now {after.get(key)!r})"
    return ""


def save_model(body: Any, folder: Path, job_config: Any, prepared: Any) -> dict[str, Any]:
    """Write the trained weights: model/ (Hugging Face) where the architecture has one, program/ for a rewritten model."""
    import ftc.models
    from ftc.rewrite_folder import copy_tokenizer, run_usual_shapes

    body.eval()
    written: dict[str, Any] = {}
    if hasattr(body, "original_state_dict"):
        run_usual_shapes(body)
        body.save(folder / PROGRAM_FOLDER)
        copy_tokenizer(prepared.tokenizer_folder, folder / PROGRAM_FOLDER)
        written["program_folder"] = PROGRAM_FOLDER
        original = _original(body, job_config, prepared)
        if original is None:
            return written
        body = original
    ftc.models.save(body, folder / MODEL_FOLDER, tokenizer=prepared.tokenizer_folder)
    return written | {"model_folder": MODEL_FOLDER}


def _original(program: Any, job_config: Any, prepared: Any) -> Any:
    """The unrewritten model with the trained weights, or None when a pass has no inverse."""
    from ftc.train.adapter import model_args

    try:
        weights = program.original_state_dict()
    except (FtcError, NotImplementedError):
        return None
    model = model_args(job_config).build()
    model.load_state_dict(weights)
    return model.eval()


def validate(body: Any, prepared: Any, job_config: Any) -> dict[str, float]:
    """Bits per byte on the held-out text: the model's, and those of a trigram model counted on the training tokens."""
    from ftc.data.ngram import Trigram
    from ftc.evaluate import evaluate_ids

    validation, tokenizer = prepared.validation, prepared.tokenizer
    context = job_config.training.seq_len
    measured = evaluate_ids(
        body, tokenizer, validation.documents(), validation.num_bytes, context=context, progress=False
    )
    boundary = tokenizer.eos_id if tokenizer.eos_id is not None else tokenizer.vocab_size
    trigram = Trigram(prepared.train.documents(), max(tokenizer.vocab_size, boundary + 1), boundary)
    return measured | {"trigram_bits_per_byte": trigram.bits_per_byte(validation.documents(), validation.num_bytes)}


def _stage(folder: Path, name: str) -> None:
    atomic_write(folder / STAGE_FILE, name)
