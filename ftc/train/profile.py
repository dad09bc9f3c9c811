"""`ftc profile`: a few steps of a run under torch's profiler, without touching the run's folder.

    profile("run.toml", out)                  starts the ranks, which each write trace.rankN.json (Chrome trace)
    profile.json                              the first rank's tables (ftc.train.profile_table)
"""

import functools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from ftc.errors import FtcError, FtcFailure
from ftc.files import MARKER, atomic_write, check_replaceable
from ftc.train.processes import end_process, rank_command, rank_environment
from ftc.train.profile_table import PHASE, REGION, Profile, Roof, operations

PROFILE_FILE, LOG_FILE = "profile.json", "profile.log"
KIND = "profile"
WARMUP = 2  # steps before the profiled ones: captures, compilation, the allocator's first blocks


def profile(
    config: str | Path | Mapping[str, Any],
    out: str | Path,
    overrides: Mapping[str, Any] | None = None,
    *,
    steps: int = 3,
    num_processes: int = 1,
) -> dict[str, Any]:
    """Profile `steps` steps of a run file (as for `ftc.train.launch.train`); returns what profile.json in `out` holds.

    Raises FtcError for what the run would refuse and for a folder that holds something else, FtcFailure when it fails.
    """
    from ftc.train.config import dump_toml
    from ftc.train.launch import check_run, resolve

    if steps < 1 or num_processes < 1:
        raise FtcError(f"{steps} steps on {num_processes} processes cannot be profiled; use 1 or more of each")
    out, values = Path(out), resolve(config, overrides)
    check_run(values)
    check_replaceable(out, KIND)
    out.mkdir(parents=True, exist_ok=True)
    atomic_write(out / MARKER, json.dumps({"kind": KIND}) + "\n")
    (out / PROFILE_FILE).unlink(missing_ok=True)
    values.setdefault("training", {})["steps"] = max(values.get("training", {}).get("steps", 0), steps + WARMUP)
    values.setdefault("checkpoint", {})["enable"] = False
    with tempfile.TemporaryDirectory() as folder:
        values.setdefault("job", {})["dump_folder"] = folder
        run_file = Path(folder) / "run.toml"
        run_file.write_text(dump_toml(values))
        arguments = [str(out.resolve()), str(steps), "--job.config_file", str(run_file)]
        command = rank_command("ftc.train.profile", arguments, num_processes)
        with (out / LOG_FILE).open("w") as log:
            environment = rank_environment(num_processes)
            code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env=environment).returncode
    if code or not (out / PROFILE_FILE).is_file():
        raise _failure(out / LOG_FILE, code)
    return json.loads((out / PROFILE_FILE).read_text())


def _failure(log: Path, code: int) -> Exception:
    said = [line.removeprefix("error: ") for line in log.read_text().splitlines() if line.startswith("error: ")]
    if said:
        return (FtcError if code == 2 else FtcFailure)(said[0])
    return FtcFailure(f"the profiled run ended with exit code {code}; see {log}")


def main(arguments: list[str]) -> int:
    """One rank: OUT STEPS and the flags of `ftc.train`."""
    from ftc.train.loop import running
    from ftc.train.trainer import load_config, set_single_process_environment

    out, steps, *flags = arguments
    try:
        set_single_process_environment()
        job_config = load_config(flags)
        job_config.metrics.enable_tensorboard = job_config.metrics.enable_wandb = False
        with running(job_config) as trainer:
            _profile_rank(trainer, Path(out), int(steps))
    except (FtcError, FtcFailure) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, FtcError) else 1
    return 0


def _profile_rank(trainer: Any, out: Path, steps: int) -> None:
    from torchtitan.config import TORCH_DTYPE_MAP

    from ftc.train.allocator import bytes_in_use, memory_events, peak_bytes
    from ftc.train.peak import measured_bandwidth, measured_flops
    from ftc.train.ranks import is_first_rank

    device = trainer.device.type
    dtype = TORCH_DTYPE_MAP[trainer.job_config.training.mixed_precision_param]
    roof = Roof(measured_flops(dtype, device), measured_bandwidth(device))  # on all ranks at once: one rank's part of the machine
    batches = _annotated(trainer)

    def step() -> None:
        trainer.step += 1
        trainer.train_step(batches)

    for _ in range(WARMUP):
        step()
    before = bytes_in_use() if device == "cpu" else 0
    with _profiler(device) as profiler:
        started = time.perf_counter()
        for _ in range(steps):
            step()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - started
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    profiler.export_chrome_trace(str(out / f"trace.rank{rank}.json"))
    if not is_first_rank():
        return
    peak = peak_bytes(memory_events(profiler), before) if device == "cpu" else torch.cuda.max_memory_allocated()
    found = operations(profiler.events(), dtype.itemsize)
    made = Profile(found, seconds, steps, roof, str(dtype).removeprefix("torch."), device, peak)
    atomic_write(out / PROFILE_FILE, json.dumps(made.as_dict(), indent=1) + "\n")


def _profiler(device: str) -> Any:
    kinds = torch.profiler.ProfilerActivity
    activities = [kinds.CPU, kinds.CUDA] if device == "cuda" else [kinds.CPU]
    return torch.profiler.profile(activities=activities, record_shapes=True, profile_memory=True)


def _annotated(trainer: Any) -> Iterator[Any]:
    """The trainer's batches; its phases and the regions of its model are named in what the profiler records from here on."""
    for region in (region for part in trainer.model_parts for region in part.body.regions):
        around, name = region.around or (lambda run, args, kwargs: run(*args, **kwargs)), REGION + region.name
        # A stage of a pipeline runs its regions in its own way, which is not given what is to be run.
        region.around = functools.partial(_run_named, around, name) if trainer.pipeline is None else _named(name, around)
    trainer.forward_backward_step = _named(PHASE + "forward", trainer.forward_backward_step)
    trainer.optimizers.step = _named(PHASE + "optimizer", trainer.optimizers.step)
    trainer.validation_curve.after_step = _named(PHASE + "validation", trainer.validation_curve.after_step)
    batches = trainer.batch_generator(trainer.dataloader)
    following = _named(PHASE + "data", lambda: next(batches))
    return iter(following, None)


def _run_named(around: Callable, name: str, run: Callable, args: Any, kwargs: Any) -> Any:
    """The region as `around` runs it, with the name where its operators run: also when they run once more in backward."""
    return around(_named(name, run), args, kwargs)


def _named(name: str, function: Callable) -> Callable:
    def named(*args: Any, **kwargs: Any) -> Any:
        with torch.profiler.record_function(name):
            return function(*args, **kwargs)

    return named


if __name__ == "__main__":
    end_process(main(sys.argv[1:]))
