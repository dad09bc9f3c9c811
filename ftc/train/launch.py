"""Start a training run in a process of its own, show its progress, and collect what it made."""

import contextlib
import errno
import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftc.errors import FtcError, FtcFailure, Interrupted
from ftc.files import atomic_write, check_replaceable, emptied_if_wrong
from ftc.train.checkpoint_files import newest_step, remove_half_checkpoints
from ftc.train.config import Ftc, check_passes, check_values, dump_toml, read_toml, sources_of
from ftc.train.hang import hang_summary
from ftc.train.machines import ONE, Machines, wait_for_the_first
from ftc.train.metrics_file import METRICS_FILE
from ftc.train.processes import rank_command, rank_environment
from ftc.train.shipped import run_file

LOG_FILE, RUN_FILE, CHECKPOINTS = "train.log", "run.toml", "checkpoint"
RESULT_FILE, ERROR_FILE, STAGE_FILE = "result.json", "error.json", "stage.txt"
QUICKSTART = "quickstart"  # the preset where a run file names none
USER_ERROR = 2  # the child's exit code for wrong input
_FULL_BYTES = 1 << 16


@dataclass(frozen=True)
class TrainResult:
    """What a finished run left in `folder`."""

    folder: Path
    steps: int
    tokens: int
    seconds: float  # inside torchtitan's training loop, of the last start
    loss: float  # nats a token at the last logged step
    model_folder: Path | None  # Hugging Face folder with tokenizer, when the architecture has one
    program_folder: Path | None  # the rewritten model, when there were passes
    tokenizer_folder: Path
    validation: dict[str, Any] | None  # bits_per_byte, trigram_bits_per_byte, perplexity, ...; under "sources" those of each
    data: dict[str, dict[str, float]]  # of each source: tokens, share, epochs, skipped

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        values = dict(self.__dict__)
        return {key: str(value) if isinstance(value, Path) else value for key, value in values.items()}


def train(
    config: str | Path | Mapping[str, Any],
    out_folder: str | Path,
    overrides: Mapping[str, Any] | None = None,
    *,
    quiet: bool = False,
    restart: bool = False,
    num_processes: int = 1,
    max_restarts: int = 3,
    machines: Machines = ONE,
) -> TrainResult | None:
    """Run torchtitan's trainer on `config` in processes of its own and return what they made in `out_folder`.

    config: a TOML file, the name of a shipped one (ftc.train.shipped), or the same tables as a dict. overrides: {"training.steps": 10, ...}.
    The folder gets run.toml, resolved.toml, metrics.jsonl, train.log, tokenizer/, checkpoint/ and model/ (or program/).
    A run that was interrupted continues from its newest checkpoint; a finished one is returned as it is. `restart`
    begins anew. With several processes (`num_processes` on each of `machines`), all start again from the newest checkpoint when
    one dies, at most `max_restarts` times. Several machines share the folder; only the first of them begins, replaces or empties it,
    and the others return None where the result is not written yet. Raises FtcError for wrong input, and a new folder is gone then;
    FtcFailure when the run fails, and Interrupted on Ctrl-C.
    """
    if num_processes < 1:
        raise FtcError(f"{num_processes} processes cannot train; use 1 or more")
    folder = Path(out_folder).absolute()
    values = resolve(config, overrides)
    values["job"] = values.get("job", {}) | {"dump_folder": str(folder)}
    if machines.is_first:
        check_replaceable(folder, "train")
    check_run(values)
    machines.check_endpoint()
    if restart and machines.count > 1:
        raise FtcError(f"a restart is for one machine, as others may be in the folder already; remove {folder} first")
    if restart and folder.is_dir():
        shutil.rmtree(folder)
    text = dump_toml(values)
    finished = (folder / RESULT_FILE).is_file() and (folder / RUN_FILE).is_file()
    if finished and (folder / RUN_FILE).read_text() == text:
        return _result(folder)
    steps, launch = values.get("training", {}).get("steps"), _Launch(num_processes, max_restarts, machines)
    if not machines.is_first:
        wait_for_the_first(folder, folder / RUN_FILE, text, machines)
        _follow(folder, steps, quiet, launch)
        return _result(folder) if (folder / RESULT_FILE).is_file() else None
    with emptied_if_wrong(folder):
        (folder / RESULT_FILE).unlink(missing_ok=True)
        (folder / ERROR_FILE).unlink(missing_ok=True)
        atomic_write(folder / "ftc.json", json.dumps({"kind": "train"}) + "\n")
        atomic_write(folder / RUN_FILE, text)
        remove_half_checkpoints(folder / CHECKPOINTS)
        _follow(folder, steps, quiet, launch)
    return _result(folder)


def resolve(config: str | Path | Mapping[str, Any], overrides: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The run's tables: read, overridden by dotted keys, and the `[ftc]` section checked."""
    if isinstance(config, Mapping):
        values = json.loads(json.dumps(config))
    else:
        values = read_toml(run_file(config))
    for dotted, value in (overrides or {}).items():
        section, _, key = dotted.partition(".")
        if not key:
            raise FtcError(f"the override {dotted!r} names no key; write section.key, such as training.steps")
        table = values.setdefault(section, {})
        *tables, key = key.split(".")
        for name in tables:
            table = table.setdefault(name, {})
        table[key] = value
    check_values(Ftc, values.get("ftc", {}), "ftc")
    check_passes(values.get("ftc", {}).get("passes", []))
    sources_of(values.get("ftc", {}))
    _check_objective(values.get("ftc", {}))
    steps = values.get("training", {}).get("steps", 1)
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
        raise FtcError(f"training.steps = {steps!r} is not a number of steps; use a whole number of 1 or more")
    values.setdefault("model", {}).setdefault("name", "ftc")
    if values["model"]["name"] == "ftc":
        values["model"].setdefault("flavor", QUICKSTART)
    converters = values["model"].setdefault("converters", [])
    if "ftc" not in converters:
        converters.insert(0, "ftc")
    return values


def check_run(values: Mapping[str, Any], files: bool = True) -> None:
    """Raise FtcError for whatever can be seen to be wrong with resolved tables before anything is written: unknown sections
    and keys, passes and their options, the preset and its fields, another model's tokenizer, and with `files` those that are
    not there."""
    from ftc.data.checkpoint_tokenizer import checkpoint_tokenizer
    from ftc.data.source_table import check_names
    from ftc.rewrite.registry import parse_passes
    from ftc.train.sections import check_sections

    check_sections(values)
    section = values.get("ftc", {})
    parse_passes(section.get("passes", []))
    check_names(sources_of(section))
    if files:
        for said in missing_files(values):
            raise FtcError(said)
    if section.get("model") and not Path(section["model"]).exists():
        raise FtcError(f"ftc.model = {section['model']!r}: nothing is there")
    if section.get("model") and (files or not section.get("tokenizer") or Path(section["tokenizer"]).exists()):
        checkpoint_tokenizer(section["model"], section.get("tokenizer", ""))
    if values["model"]["name"] == "ftc" and not section.get("model"):
        from ftc.models.presets import preset

        preset(values["model"]["flavor"], **section.get("architecture", {}))


def missing_files(values: Mapping[str, Any]) -> list[str]:
    """A sentence for each data file and tokenizer of resolved tables that is not there."""
    from ftc.data.source_table import check_sources

    section, said = values.get("ftc", {}), []
    for source in sources_of(section):
        try:
            check_sources([source])
        except FtcError as error:
            said.append(str(error))
    if section.get("tokenizer") and not Path(section["tokenizer"]).exists():
        said.append(f"ftc.tokenizer = {section['tokenizer']!r}: nothing is there")
    return said


def _check_objective(section: Mapping[str, Any]) -> None:
    """The loss is checked before anything starts; one that goes by default is what it is."""
    if "loss" in section or section.get("passes"):
        from ftc.train.objective import AUTO, check_windows, parse_objective

        parsed = parse_objective(section.get("loss", AUTO), section.get("passes", []))
        packing, apart = (section.get(name, getattr(Ftc, name)) for name in ("packing", "document_mask"))
        check_windows(*parsed, packing, apart, sources_of(section))


@dataclass(frozen=True)
class _Launch:
    """How the ranks of this machine are started."""

    num_processes: int
    max_restarts: int
    machines: Machines

    @property
    def log_file(self) -> str:
        return LOG_FILE if self.machines.is_first else f"train-{self.machines.index}.log"


def _follow(folder: Path, total_steps: int | None, quiet: bool, launch: _Launch) -> None:
    """Run the child to its end under a progress bar. Raises what went wrong, as one paragraph."""
    environment = rank_environment(launch.num_processes) | {"FTC_LAUNCHED": "1", "PYTHONUNBUFFERED": "1"}
    arguments = ["--job.dump_folder", str(folder), "--job.config_file", str(folder / RUN_FILE)]
    command = rank_command("ftc.train", arguments, launch.num_processes, launch.max_restarts, launch.machines)
    with (folder / launch.log_file).open("ab") as log:
        child = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=log, stderr=log, env=environment, start_new_session=True
        )
        try:
            _show(child, folder, total_steps, quiet)
        except BaseException as error:
            child.send_signal(signal.SIGTERM)
            try:
                child.wait(10)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
            if isinstance(error, KeyboardInterrupt):
                raise Interrupted(_interrupted(folder)) from None
            raise
        finally:
            child.stdin.close()
    if child.returncode:
        try:
            _raise_failure(folder, child.returncode, folder / launch.log_file)
        finally:
            if launch.machines.is_first:
                remove_half_checkpoints(folder / CHECKPOINTS)


def _show(child: subprocess.Popen, folder: Path, total_steps: int | None, quiet: bool) -> None:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[detail]}"),
        TimeRemainingColumn(),
    )
    metrics = _Tail(folder / METRICS_FILE)
    with Progress(*columns, console=Console(stderr=True), disable=quiet) as bar:
        task = bar.add_task("starting", total=total_steps, detail="")
        while child.poll() is None:
            row = metrics.last()
            if row:
                detail = f"loss {row['loss']:.3f}, {row['tokens_per_second']:,.0f} tokens/s, MFU {row['mfu']:.1f}%"
                bar.update(task, completed=row["step"], detail=detail)
            stage = folder / STAGE_FILE
            if stage.is_file():
                bar.update(task, description=stage.read_text())
            time.sleep(0.1)
        if child.returncode == USER_ERROR:  # nothing was begun
            bar.update(task, visible=False)
            bar.disable = True


class _Tail:
    """The newest row of training in a growing metrics file, read only when it has grown."""

    def __init__(self, path: Path):
        self._path, self._size, self._row = path, -1, None

    def last(self) -> dict[str, Any] | None:
        try:
            size = self._path.stat().st_size
            if size != self._size:
                with self._path.open("rb") as file:
                    file.seek(max(0, size - 4096))
                    lines = file.read().split(b"\n")[:-1]
                rows = [json.loads(line) for line in lines[-2:]]  # one of the two may be of validation
                self._row = next((row for row in reversed(rows) if "loss" in row), self._row)
                self._size = size
        except (FileNotFoundError, json.JSONDecodeError):
            pass
        return self._row


def _result(folder: Path) -> TrainResult:
    stored = json.loads((folder / RESULT_FILE).read_text())
    row = _Tail(folder / METRICS_FILE).last() or {}
    paths = {name: folder / stored[name] if name in stored else None for name in ("model_folder", "program_folder")}
    return TrainResult(
        folder=folder,
        steps=stored["steps"],
        tokens=stored["tokens"],
        seconds=stored["seconds"],
        loss=row.get("loss", float("nan")),
        tokenizer_folder=folder / "tokenizer",
        validation=stored.get("validation"),
        data=stored["data"],
        **paths,
    )


def _interrupted(folder: Path) -> str:
    step = newest_step(folder / CHECKPOINTS)
    where = f"from the checkpoint of step {step}" if step else "from the beginning, as no checkpoint was written yet"
    return f"the training run in {folder} was interrupted; the same command continues it {where}"


def _raise_failure(folder: Path, code: int, log: Path) -> None:
    """Raise the child's own error, one that says that the disk is full, or one that quotes the end of its log."""
    error: dict[str, Any] = {}
    with contextlib.suppress(FileNotFoundError):
        error = json.loads((folder / ERROR_FILE).read_text())
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    said = error.get("message") or next((line for line in reversed(lines) if line.startswith("error: ")), "")
    said = said.removeprefix("error: ")
    if said and USER_ERROR in (code, error.get("exit_code")):  # torchrun has an exit code of its own
        raise FtcError(said)
    step = newest_step(folder / CHECKPOINTS)
    again = f"the same command continues from step {step}" if step else "the same command starts it again"
    if said.startswith("could not write"):
        raise FtcFailure(f"{said}; {again}")
    if _disk_is_full(folder, lines):
        raise FtcFailure(f"the disk is full: training in {folder} stopped; free space, then {again}")
    if error:
        raise FtcFailure(said)
    cause = f"signal {signal.Signals(-code).name}" if code < 0 else _cause(lines) or f"exit code {code}"
    waited = hang_summary(folder)
    raise FtcFailure(f"training in {folder} failed ({cause}); {waited}the log is {log}; {again}")


def _cause(lines: list[str]) -> str:
    """The last line of a log that names an error, else its last line."""
    named = [line for line in lines if re.match(r"(\[rank\d+\]:)?\s*[\w.]*(Error|Exception|Failure|Interrupt)\b", line)]
    return (named or lines or [""])[-1].strip()


def _disk_is_full(folder: Path, lines: list[str]) -> bool:
    """Whether the log says so; it may have found no room for that itself, so what is free counts too."""
    said = any(os.strerror(errno.ENOSPC) in line for line in lines[-200:])
    return said or shutil.disk_usage(folder).free < _FULL_BYTES
