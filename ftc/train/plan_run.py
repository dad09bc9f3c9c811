"""What a pipeline of a run would cost, before the run: its program captured without memory, each part measured or modelled."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ftc.errors import FtcError
from ftc.plan.parts import RunCosts
from ftc.plan.roofline import Machine
from ftc.train.dry_run import _num_ranks, _quiet_config, _quietly, _stand_in
from ftc.train.launch import check_run, resolve

_ADAM_BYTES = 16  # of a trained parameter: itself, its gradient, two moments, in float32


@dataclass(frozen=True)
class PlannedRun:
    """The costs of a run's parts for one microbatch, and what its file asks for."""

    costs: RunCosts
    ranks: int  # of the pipeline
    shards: int  # ranks that share the weights of a stage
    microbatches: int  # of a step, as the file has it
    microbatch_size: int  # sequences
    schedule: str  # that the file names
    bytes_per_parameter: float


def run_costs(
    config: str | Path | Mapping[str, Any], overrides: Mapping[str, Any] | None = None, *, ranks: int | None = None, device: str = "cpu",
    machine: Machine | None = None, rounds: int = 5, tell: Callable[[str], None] = lambda said: None,
) -> PlannedRun:  # fmt: skip
    """The costs of a run file's parts. ranks: of the pipeline; None: pipeline_parallel_degree.

    Data and tokenizer may be missing. Raises FtcError for what the run would refuse, and where no pipeline is asked for.
    """
    values = resolve(config, overrides)
    check_run(values, files=False)
    parallelism = values.setdefault("parallelism", {})
    degree = ranks or parallelism.get("pipeline_parallel_degree", 1)
    if degree < 2:
        raise FtcError(f"a pipeline of {degree} ranks has nothing to plan; set [parallelism] pipeline_parallel_degree, or --ranks, to 2 or more")
    parallelism["pipeline_parallel_degree"] = 1  # one rank's view of the whole program; the plan divides it
    shards = max(parallelism.get("data_parallel_shard_degree", 1), 1)
    schedule = parallelism.get("pipeline_parallel_schedule", "1F1B")
    parallelism |= {"pipeline_parallel_schedule": "1F1B", "data_parallel_shard_degree": 1, "data_parallel_replicate_degree": 1}
    with tempfile.TemporaryDirectory() as folder, _quietly():
        job_config = _quiet_config(values, Path(folder))
        found = _measured(job_config, _stand_in(job_config, _num_ranks(parallelism, 1)), device, machine, rounds, tell)
    size, training = job_config.parallelism.pipeline_parallel_microbatch_size, job_config.training
    if training.local_batch_size % size:
        raise FtcError(f"training.local_batch_size {training.local_batch_size} is not a multiple of pipeline_parallel_microbatch_size {size}")
    return PlannedRun(found, degree, shards, training.local_batch_size // size, size, schedule, _ADAM_BYTES / shards)


def _measured(job_config: Any, prepared: Any, device: str, machine: Machine | None, rounds: int, tell: Callable[[str], None]) -> RunCosts:
    from ftc.train import adapter  # first: it readies a machine without an accelerator

    from torchtitan.config import TORCH_DTYPE_MAP  # isort: skip
    from ftc.train.model import TrainedModel, model_args
    from ftc.train.pipeline import region_costs

    with adapter.standing_in(prepared):
        tell("capturing the program")
        arguments = model_args(job_config)
        with torch.device("meta"):
            model = TrainedModel(arguments)
        model.capture(prove=False)
        dtype = TORCH_DTYPE_MAP[job_config.training.mixed_precision_param]
        if device != "cpu" or machine is not None:  # FSDP casts there; a CPU run of one rank computes in what it stores
            for captured in (*model.body.regions, model.body):
                captured.compute_dtype = dtype
        return region_costs(model, job_config, torch.device(device), machine=machine, rounds=rounds, tell=tell)
