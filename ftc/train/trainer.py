"""One training run, in the process that torchrun or `ftc.train.launch` started: prepare, train, measure, save."""

import contextlib
import json
import os
import socket
import time
import tomllib
import traceback
from pathlib import Path
from typing import Any

import torch

from ftc.errors import FtcError, FtcFailure
from ftc.files import MARKER, atomic_write, check_replaceable
from ftc.train.config import check_passes, check_values, differences, dump_toml, read_toml, sources_of
from ftc.train.hang import remove_accounts
from ftc.train.ranks import is_first_rank
from ftc.train.sections import check_loggers

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
    named = _value_of(arguments, "--job.dump_folder")
    if named and (code := _final_error(Path(named))) is not None:  # before the imports, which take seconds
        return code
    try:
        set_single_process_environment()
        job_config = load_config(arguments)
        folder = Path(job_config.job.dump_folder)
        if (code := _final_error(folder)) is not None:
            return code
        run(job_config)
        return 0
    except (FtcError, FtcFailure) as error:
        message, code, final = str(error), 2 if isinstance(error, FtcError) else 1, True
    except Exception as error:  # torchtitan's or torch's: the log keeps the traceback, the user gets one paragraph
        traceback.print_exc()
        message, code, final = f"training failed with {type(error).__name__}: {error}", 1, False
    if folder is not None and (final or not (folder / ERROR_FILE).is_file()):
        said = json.dumps({"message": message, "exit_code": code, "final": final})
        with contextlib.suppress(FtcFailure):  # a full disk has no room for its own error
            atomic_write(folder / ERROR_FILE, said + "\n")
    print(f"error: {message}", file=sys.stderr)
    return code


def _final_error(folder: Path) -> int | None:
    """The exit code of an error that starting again would only repeat, when the elastic launch has started this again."""
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        return None
    try:
        error = json.loads((folder / ERROR_FILE).read_text())
    except (OSError, ValueError):
        return None
    return error["exit_code"] if error.get("final") else None


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
    path, values = _value_of(arguments, "--job.config_file"), None
    if path:
        values = read_toml(path)
        check_values(manager._maybe_add_custom_config(arguments, values), values)
        check_passes(values.get("ftc", {}).get("passes", []))
        sources_of(values.get("ftc", {}))
    try:
        job_config = manager.parse_args(arguments)
    except SystemExit as stop:
        if stop.code:
            raise FtcError("the flags are not valid (see above); python -m ftc.train --help lists them") from None
        raise
    if not any(a.startswith("--model.name") for a in arguments) and "name" not in (values or {}).get("model", {}):
        job_config.model.name = "ftc"
    if job_config.model.name == "ftc" and "ftc" not in job_config.model.converters:
        job_config.model.converters.insert(0, "ftc")  # it checks the tokenizer and applies what [ftc] asks for
    check_loggers(vars(job_config.metrics))
    if job_config.validation.enable:
        raise FtcError("[validation] enable is not supported; [ftc] validate measures the held-out text at the end")
    return job_config


def _value_of(arguments: list[str], flag: str) -> str | None:
    """What a flag is given, written with underscores or dashes, and with or without an equals sign."""
    for index, argument in enumerate(arguments):
        name, _, value = argument.partition("=")
        if name.replace("-", "_") == flag.replace("-", "_"):
            return value or (arguments[index + 1] if index + 1 < len(arguments) else None)
    return None


def run(job_config: Any) -> dict[str, Any]:
    """Train, measure and save into `job.dump_folder`; returns what result.json holds.

    Continues from the newest checkpoint in the folder. Raises FtcError when the folder belongs to another configuration.
    """
    from ftc.rewrite.registry import parse_passes
    from ftc.train.objective import check_windows, parse_objective

    folder = Path(job_config.job.dump_folder)
    parse_passes(job_config.ftc.passes)
    section = job_config.ftc
    parsed = parse_objective(section.loss, section.passes)
    check_windows(*parsed, section.packing, section.document_mask, sources_of(vars(section)))

    def prepare() -> None:
        claim_folder(folder, job_config)
        _stage(folder, "preparing the data")

    from torchtitan.tools.logging import init_logger

    from ftc.train import adapter
    from ftc.train.loop import running
    from ftc.train.validation import count_trigram, validate

    init_logger()
    with running(job_config, prepare) as trainer:
        adapter.objective_of(job_config).progress = lambda: (trainer.step - 1) / job_config.training.steps
        started = time.perf_counter()
        _stage(folder, "training")
        trainer.train()
        result = {"steps": trainer.step, "tokens": trainer.num_tokens, "seconds": time.perf_counter() - started}
        if trainer.checkpointer.enable:
            result["saving_seconds"] = trainer.checkpointer.seconds
        result["data"] = trainer.tokens_by_source()
        _stage(folder, "saving")
        program = trainer.whole_program()
        if not is_first_rank():
            return result
        result |= save_model(program, folder, job_config, trainer.prepared)
        if job_config.ftc.validate and trainer.prepared.validation.num_bytes:
            _stage(folder, "measuring on the validation text")
            trigram = count_trigram(trainer.prepared)
            result["validation"] = validate(program, trainer.prepared, job_config.training.seq_len, trigram)
            result["validation"]["curve"] = trainer.validation_curve.baselines(trigram)
    atomic_write(folder / RESULT_FILE, json.dumps(result, indent=2) + "\n")
    _stage(folder, "done")
    return result


def claim_folder(folder: Path, job_config: Any) -> None:
    """Mark the folder as this run's, with the resolved configuration. Raises FtcError when it holds another run or files.

    A run that differs in its passes alone is the same run, rewritten: its newest checkpoint is carried over.
    """
    check_replaceable(folder, "train")
    resolved = dump_toml(job_config.to_dict())
    old = folder / RESOLVED_FILE
    checkpoints = folder / job_config.checkpoint.folder
    if old.is_file() and checkpoints.is_dir():
        before = read_toml(old)
        differing = differences(before, tomllib.loads(resolved), _FREE_SECTIONS, _FREE_KEYS)
        for name in REWRITTEN:
            differing.pop(name, None)
        if differing:
            raise FtcError(
                f"{folder} holds the checkpoints of a run with another {next(iter(differing.values()))}; name another "
                "folder, or start afresh"
            )
        if before["ftc"].get("passes", []) != job_config.ftc.passes:
            _carry_over(checkpoints, job_config, before["ftc"])
    atomic_write(folder / MARKER, json.dumps({"kind": "train"}) + "\n")
    atomic_write(old, resolved)
    (folder / ERROR_FILE).unlink(missing_ok=True)
    remove_accounts(folder)


def _carry_over(checkpoints: Path, job_config: Any, before: dict[str, Any]) -> None:
    """Carry the newest checkpoint over from the passes and the loss of the section `before` to those of today."""
    import dataclasses

    from ftc.train.carry_over import carry_over
    from ftc.train.model import TrainedModel, model_args
    from ftc.train.objective import Objective, parse_objective

    old = dataclasses.replace(job_config.ftc, **{key: before[key] for key in ("passes", "loss") if key in before})
    programs = []
    for section in (old, job_config.ftc):
        arguments = model_args(job_config)
        arguments.section = section
        arguments.objective = Objective(parse_objective(section.loss, section.passes)[0])  # its calls only, no teacher
        with torch.device("meta"):
            model = TrainedModel(arguments)
        model.capture()
        programs.append(model.body)
    step = carry_over(checkpoints, *programs)
    print(f"the checkpoint of step {step} was carried over to the passes {job_config.ftc.passes}", flush=True)


# Sections that do not change what is learned, so that a run may continue with others.
_FREE_SECTIONS = (
    "job", "profiling", "metrics", "comm", "checkpoint", "experimental", "memory_estimation", "parallelism",
)  # fmt: skip
_FREE_KEYS = ("ftc.validate", "ftc.validation_points", "ftc.hang_seconds", "ftc.pipeline_bounds")


# What a rewritten run may change: its checkpoint is carried over.
REWRITTEN = ("ftc.passes", "ftc.loss")


def save_model(body: Any, folder: Path, job_config: Any, prepared: Any) -> dict[str, Any]:
    """Write the trained weights: model/ (Hugging Face) where the architecture has one, program/ for a rewritten model."""
    import ftc.models
    from ftc.rewrite_folder import copy_tokenizer, run_usual_shapes

    body.eval()
    written: dict[str, Any] = {}
    from ftc.open_model import is_program

    rewritten = bool(job_config.ftc.model) and is_program(job_config.ftc.model)
    if job_config.ftc.passes or rewritten:
        if not rewritten:  # a saved program has the graphs that it has
            run_usual_shapes(body)
        body.save(folder / PROGRAM_FOLDER)
        copy_tokenizer(prepared.tokenizer_folder, folder / PROGRAM_FOLDER)
        written["program_folder"] = PROGRAM_FOLDER
    original = _original(body, job_config, prepared)
    if original is None:
        return written
    ftc.models.save(original, folder / MODEL_FOLDER, tokenizer=prepared.tokenizer_folder)
    return written | {"model_folder": MODEL_FOLDER}


def _original(program: Any, job_config: Any, prepared: Any) -> Any:
    """The unrewritten model with the trained weights, or None when a pass has no inverse."""
    from ftc.open_model import is_program
    from ftc.train.model import model_args

    if job_config.ftc.model and is_program(job_config.ftc.model):
        return None  # its original class is not here
    try:
        weights = program.original_state_dict()
    except (FtcError, NotImplementedError):
        return None
    model = model_args(job_config).blueprint()
    model.load_state_dict(weights, assign=True)
    if hasattr(model, "tie_weights"):
        model.tie_weights()
    return model.eval()


def _stage(folder: Path, name: str) -> None:
    if is_first_rank():
        atomic_write(folder / STAGE_FILE, name)
