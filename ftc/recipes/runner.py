"""Run a recipe: each stage in its own folder, finished ones skipped, interrupted ones continued, a report at the end."""

import contextlib
import dataclasses
import errno
import fcntl
import json
import platform
import shutil
import time
import uuid
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ftc
from ftc.commands.output import plain, say, seconds_text
from ftc.errors import FtcError, FtcFailure, nearest
from ftc.files import MARKER, atomic_folder, atomic_write, check_replaceable, emptied_if_wrong, remove_leftovers
from ftc.recipes.fingerprint import stage_fingerprint
from ftc.recipes.recipe import Recipe
from ftc.recipes.stage import REFERENCE, Context, Result, Stage, is_word, places, split_reference

STAGE_FILE, STARTED_FILE, RECIPE_FILE, REPORT_FILE, LOCK_FILE = (
    "stage.json", "started.json", "recipe.toml", "report.html", ".lock",
)  # fmt: skip


@dataclass(frozen=True)
class Step:
    """What `ftc run` will do with a stage, and why."""

    stage: Stage
    action: str  # "run", "skip", "continue" or "stop before"
    reason: str

    def as_dict(self) -> dict[str, str]:
        return {"name": self.stage.name, "kind": self.stage.kind, "action": self.action, "reason": self.reason}


def plan(recipe: Recipe, out: str | Path, *, until: str | None = None, force: Collection[str] = ()) -> list[Step]:
    """What a run would do with each stage now. Changes nothing. Raises FtcError for unknown stage names."""
    out = Path(out)
    _check_names(recipe, until, force)
    check_replaceable(out, "run")
    steps: list[Step] = []
    made_by: dict[str, str] = {}
    past_the_end = False
    for stage in recipe.stages:
        if past_the_end:
            step = Step(stage, "stop before", f"--until {until}")
        else:
            step = _plan_stage(stage, recipe, out / stage.name, made_by, stage.name in force)
        steps.append(step)
        past_the_end = past_the_end or stage.name == until
    return steps


def run_recipe(
    recipe: Recipe, out: str | Path, *, until: str | None = None, force: Collection[str] = (), quiet: bool = False
) -> dict[str, Any]:
    """Run the stages of `recipe` in `out` and write report.html; returns {"folder", "report", "stages": [...]}.

    A stage is skipped when it is finished and nothing it depends on has changed. When a stage fails or is interrupted,
    what is finished stays and the same call continues. `force` names stages to run again, `until` the last one to run.
    Raises FtcError when `out` holds something else or another run is using it; FtcFailure when a stage fails.
    """
    out = Path(out).absolute()
    _check_names(recipe, until, force)
    check_replaceable(out, "run")
    results: list[dict[str, Any]] = []
    with emptied_if_wrong(out, unless=lambda: bool(results)):
        atomic_write(out / MARKER, json.dumps({"kind": "run", "recipe": recipe.name}) + "\n")
        with _lock(out):
            atomic_write(out / RECIPE_FILE, recipe.text)
            _run_stages(recipe, out, until, force, quiet, results)
            report = write_report(recipe, out, results)
    stages = [{key: row[key] for key in ("name", "kind", "seconds", "skipped", "outputs")} for row in results]
    return {"recipe": recipe.name, "folder": str(out), "report": str(report), "stages": stages}


def _run_stages(
    recipe: Recipe, out: Path, until: str | None, force: Collection[str], quiet: bool, results: list[dict[str, Any]]
) -> None:
    """Run or skip the stages in order; each finished one is added to `results`."""
    tell = (lambda text: None) if quiet else say
    made_by: dict[str, str] = {}
    for number, stage in enumerate(recipe.stages, 1):
        step = _plan_stage(stage, recipe, out / stage.name, made_by, stage.name in force)
        heading = f"[bold]\\[{number}/{len(recipe.stages)}] {stage.name}[/bold] ({stage.kind})"
        if step.action == "skip":
            stored = read_stage(out / stage.name)
            tell(f"{heading}: finished before, unchanged")
        else:
            tell(f"{heading}: {step.reason}")
            stored = _run_stage(stage, recipe, out, made_by, quiet, keep=step.action == "continue")
            tell(f"{heading}: done in {seconds_text(stored['seconds'])}")
        made_by[stage.name] = stored["id"]
        results.append(stored | {"skipped": step.action == "skip"})
        if stage.name == until:
            break


def write_report(recipe: Recipe, out: Path, results: list[dict[str, Any]]) -> Path:
    """Write `out`/report.html from the finished stages; returns its path."""
    import torch

    from ftc.report_html import render

    versions = {"ftc": ftc.__version__, "torch": torch.__version__, "Python": platform.python_version()}
    page = render(
        title=recipe.title,
        description=recipe.description,
        recipe_text=recipe.text,
        stages=results,
        versions=versions,
        machine=machine(),
    )
    atomic_write(out / REPORT_FILE, page)
    return out / REPORT_FILE


def machine() -> str:
    """One line about this machine: processor, cores, accelerator."""
    import os

    import torch

    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    parts = [name, f"{os.cpu_count()} cores", platform.system()]
    if torch.cuda.is_available():
        parts.append(torch.cuda.get_device_name())
    return ", ".join(parts)


def read_stage(folder: Path) -> dict[str, Any] | None:
    """What a finished stage wrote about itself, or None when `folder` holds no finished stage."""
    try:
        stored = json.loads((folder / STAGE_FILE).read_text())
    except (OSError, ValueError):
        return None
    complete = all((folder / path).exists() for path in stored.get("outputs", {}).values())
    return stored if complete else None


def _plan_stage(stage: Stage, recipe: Recipe, folder: Path, made_by: dict[str, str], forced: bool) -> Step:
    """Decide on one stage; puts the id of a finished one into `made_by`."""
    waits_for = next((name for name in _inputs(stage) if name not in made_by), None)
    if waits_for:
        return Step(stage, "run", f"{waits_for} runs first")
    fingerprint = stage_fingerprint(stage, recipe.base, made_by)
    stored = read_stage(folder)
    if forced:
        return Step(stage, "run", "forced")
    if stored is not None and stored["fingerprint"] == fingerprint:
        made_by[stage.name] = stored["id"]
        return Step(stage, "skip", "finished, unchanged")
    if stored is not None:
        return Step(stage, "run", "something it depends on has changed")
    if stage.resumable and _started(folder) == fingerprint:
        return Step(stage, "continue", "continues where it stopped")
    return Step(stage, "run", "not run yet")


def _run_stage(
    stage: Stage, recipe: Recipe, out: Path, made_by: dict[str, str], quiet: bool, keep: bool
) -> dict[str, Any]:
    fingerprint = stage_fingerprint(stage, recipe.base, made_by)
    resolved = _resolve(stage, recipe.base, out)
    started = time.time()
    try:
        with _stage_folder(stage, out / stage.name, fingerprint, keep) as folder:
            result = resolved.run(Context(folder, recipe.base, quiet))
            stored = {
                "name": stage.name,
                "kind": stage.kind,
                "fingerprint": fingerprint,
                "id": f"{fingerprint[:16]}-{uuid.uuid4().hex[:8]}",
                "started": started,
                "seconds": time.time() - started,
                "ftc": ftc.__version__,
                **dataclasses.asdict(_checked(result, stage, folder)),
            }
            atomic_write(folder / STAGE_FILE, json.dumps(plain(stored), indent=2, default=str) + "\n")
        return json.loads((out / stage.name / STAGE_FILE).read_text())
    except FtcError as error:
        raise FtcError(f"stage {stage.name!r}: {error}") from error
    except FtcFailure as error:
        raise type(error)(f"stage {stage.name!r}: {error}") from error
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise FtcFailure(
            f"stage {stage.name!r}: the disk is full; free space, and the same command continues here"
        ) from error


@contextlib.contextmanager
def _stage_folder(stage: Stage, folder: Path, fingerprint: str, keep: bool) -> Iterator[Path]:
    """A folder to work in: a temporary one renamed on success, or for a resumable stage its own."""
    if not stage.resumable:
        remove_leftovers(folder)
        with atomic_folder(folder, "stage", replaces_any=True) as temporary:
            yield temporary
        return
    check_replaceable(folder)
    if folder.is_dir() and not keep:
        shutil.rmtree(folder)
    atomic_write(folder / MARKER, json.dumps({"kind": stage.kind}) + "\n")
    atomic_write(folder / STARTED_FILE, json.dumps({"fingerprint": fingerprint}) + "\n")
    try:
        yield folder
    except FtcError:  # wrong input leaves nothing to continue from
        if not keep:
            shutil.rmtree(folder, ignore_errors=True)
        raise


def _checked(result: Result, stage: Stage, folder: Path) -> Result:
    missing = [name for name in result.outputs if not (folder / result.outputs[name]).exists()]
    assert not missing, f"the stage {stage.name} says that it made {missing}, but has not"
    return result


def _resolve(stage: Stage, base: Path, out: Path) -> Stage:
    """The stage with every place as an absolute path."""
    changes: dict[str, Any] = {}
    for key, (values, option) in places(stage).items():
        resolved = []
        for value in values:
            if value.startswith(REFERENCE):
                name, output = split_reference(value, option)
                made = read_stage(out / name)
                if made is None or output not in made["outputs"]:
                    raise FtcError(
                        f"stage {stage.name!r}: {name!r} has made no {output!r} this time (see {out / name})"
                    )
                resolved.append(str(out / name / made["outputs"][output]))
            else:
                resolved.append(value if is_word(value, option) else str((base / Path(value).expanduser()).resolve()))
        changes[key] = resolved if isinstance(getattr(stage, key), list | tuple) else resolved[0]
    return dataclasses.replace(stage, **changes)


def _inputs(stage: Stage) -> list[str]:
    """The names of the stages that `stage` refers to."""
    return [
        split_reference(value, option)[0]
        for values, option in places(stage).values()
        for value in values
        if value.startswith(REFERENCE)
    ]


def _check_names(recipe: Recipe, until: str | None, force: Collection[str]) -> None:
    names = [stage.name for stage in recipe.stages]
    for option, name in [("--until", until), *(("--force", name) for name in force)]:
        if name is not None and name not in names:
            raise FtcError(f"{option} {name}: the recipe has no such stage; {nearest(name, names)}")


def _started(folder: Path) -> str | None:
    try:
        return json.loads((folder / STARTED_FILE).read_text())["fingerprint"]
    except (OSError, ValueError, KeyError):
        return None


@contextlib.contextmanager
def _lock(out: Path) -> Iterator[None]:
    """Keep a second run out of the folder; the system releases the lock even when this process is killed."""
    with (out / LOCK_FILE).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise FtcError(
                f"another ftc run is working in {out}; wait for it, or name another folder with --out"
            ) from None
        yield
