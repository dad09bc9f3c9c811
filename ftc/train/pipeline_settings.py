"""What `[parallelism]` says about pipelines: the schedule, its stages on ranks, and its microbatches, checked before anything is built.

    pipeline_parallel_degree = 4
    pipeline_parallel_schedule = "DualPipeV"        # a name of ftc.plan.known, or the path of a CSV that ftc plan wrote
    pipeline_parallel_microbatch_size = 1           # sequences; the batch of a rank holds local_batch_size of them
    pipeline_parallel_layers_per_stage = 4          # or nothing: as many stages as the schedule has
"""

import math
from dataclasses import dataclass
from typing import Any

from ftc.errors import FtcError, nearest
from ftc.plan.actions import Placement, Schedule, every_part, placement_of
from ftc.plan.known import LOOPS, NAMES, ONE_STAGE, fits, known
from ftc.plan.prove import prove
from ftc.plan.table import read

MIRRORED = "bidirectional"
USUAL_LESS_LAYERS = 1  # torchtitan's: the embedding, and the head, count as one layer each


@dataclass(frozen=True)
class Pipeline:
    """One pipeline: `degree` ranks, what each computes (`actions`), and where stages lie. A stage is named by its place in the model;
    a mirrored placement has each on two ranks."""

    name: str  # of the schedule, or the path of its CSV
    degree: int
    num_microbatches: int  # that a batch of one rank is cut into
    microbatch_size: int  # sequences
    actions: Schedule
    placement: Placement

    @property
    def num_stages(self) -> int:
        """That the model is cut into."""
        return len(self.placement.chains[0])

    @property
    def ranks(self) -> tuple[int, ...]:
        """The rank of each stage; of a mirrored pipeline, in its first direction."""
        return self.placement.ranks[: self.num_stages]

    @property
    def is_mirrored(self) -> bool:
        return self.placement.style == MIRRORED

    def stages_of(self, rank: int) -> tuple[int, ...]:
        """The stages that a rank holds, in the order in which its schedule wants them."""
        return tuple(self.placement.position(number) for number in self.placement.stages_of(rank))

    def in_words(self) -> str:
        return f"{self.name}: {self.num_stages} stages on {self.degree} ranks, {self.num_microbatches} microbatches of {self.microbatch_size}"


def check_pipeline(job_config: Any) -> None:
    """Raise FtcError for what can be seen to be wrong before there is a model: degree, combinations, schedule, microbatches."""
    wanted = job_config.parallelism
    degree = wanted.pipeline_parallel_degree
    if degree == 1:
        if job_config.ftc.pipeline_bounds:
            raise FtcError(f"ftc.pipeline_bounds is {job_config.ftc.pipeline_bounds}, but parallelism.pipeline_parallel_degree is 1: there is no pipeline to cut")
        return
    if wanted.context_parallel_degree > 1:
        raise FtcError(
            f"parallelism.pipeline_parallel_degree is {degree} beside context_parallel_degree = {wanted.context_parallel_degree}: stages take the "
            "labels of whole sequences; set one of the two to 1"
        )
    if wanted.module_fqns_per_model_part is not None:
        raise FtcError("parallelism.module_fqns_per_model_part is not read; say where stages begin with [ftc] pipeline_bounds")
    if job_config.training.enable_cpu_offload:
        raise FtcError("training.enable_cpu_offload does not go with pipelines, whose stages stay gathered; leave it out")
    num_microbatches(job_config)
    if schedule_path(job_config) or (wanted.pipeline_parallel_layers_per_stage is None and not job_config.ftc.pipeline_bounds):
        _schedule(job_config, None)


def schedule_path(job_config: Any) -> str:
    """The CSV that the run file names, in either way; empty where it names a schedule."""
    name = job_config.parallelism.pipeline_parallel_schedule
    return job_config.parallelism.pipeline_parallel_schedule_csv or (name if name.lower().endswith(".csv") else "")


def num_microbatches(job_config: Any) -> int:
    """Microbatches of a rank's batch. FtcError where it cannot be cut into equal ones."""
    batch, size = job_config.training.local_batch_size, job_config.parallelism.pipeline_parallel_microbatch_size
    if size < 1 or batch % size:
        good = ", ".join(str(n) for n in range(1, batch + 1) if batch % n == 0)
        raise FtcError(f"parallelism.pipeline_parallel_microbatch_size is {size}, and training.local_batch_size {batch} is no multiple of it; use one of {good}")
    return batch // size


def resolve_pipeline(job_config: Any, num_regions: int) -> Pipeline:
    """The run's pipeline, for a model of `num_regions` regions. FtcError, with what would fit, where they cannot be cut so."""
    wanted, section = job_config.parallelism, job_config.ftc
    stages = None
    if not schedule_path(job_config):
        if section.pipeline_bounds:
            stages = len(section.pipeline_bounds) + 1
        elif wanted.pipeline_parallel_layers_per_stage is not None:
            stages = _stages_of_layers(wanted, num_regions)
    name, actions, placement = _schedule(job_config, stages)
    found = Pipeline(name, wanted.pipeline_parallel_degree, num_microbatches(job_config), wanted.pipeline_parallel_microbatch_size, actions, placement)
    if found.num_stages > num_regions:
        raise FtcError(
            f"{name} cuts the model into {found.num_stages} stages, and it has {num_regions} regions, of which each stage needs one: use fewer "
            "ranks, fewer stages a rank, or a model of more layers"
        )
    return found


def _schedule(job_config: Any, stages: int | None) -> tuple[str, Schedule, Placement]:
    """The schedule by name, its actions and its placement; `stages` that the model is to be cut into, or as many as it has."""
    degree, path = job_config.parallelism.pipeline_parallel_degree, schedule_path(job_config)
    if path:
        return path, *_of_table(job_config, path)
    name, microbatches = _name(job_config), num_microbatches(job_config)
    a_rank = None
    if stages is not None:
        a_rank = _stages_a_rank(name, stages, degree, job_config)
    try:
        return name, *known(name, degree, microbatches, a_rank)
    except FtcError as error:
        size = job_config.parallelism.pipeline_parallel_microbatch_size
        more = next((n for n in range(microbatches, microbatches + 4 * degree + 1) if fits(name, degree, n, a_rank)), None)
        advice = f"; training.local_batch_size = {more * size} would do" if more is not None else ""
        raise FtcError(f"{error}. The batch of {job_config.training.local_batch_size} has {microbatches} microbatches of {size}{advice}") from None


def _name(job_config: Any) -> str:
    """The schedule's name as it is spelled here; torch does not mind case."""
    given = job_config.parallelism.pipeline_parallel_schedule
    names = {name.lower(): name for name in NAMES}
    if given.lower() not in names:
        raise FtcError(f"parallelism.pipeline_parallel_schedule is {given!r}; {nearest(given, NAMES)}, or name a file that ends in .csv")
    return names[given.lower()]


def _stages_a_rank(name: str, stages: int, degree: int, job_config: Any) -> int:
    """Stages a rank as `known` counts them: of a mirrored pipeline the copies too. FtcError where the schedule does not have so many."""
    copies = 2 if name == "DualPipe" else 1
    usual = 1 if name in ONE_STAGE else 2
    a_rank, rest = divmod(stages * copies, degree)
    if rest or (a_rank != usual and name not in LOOPS) or a_rank < 1:
        good = f"a multiple of {degree}" if name in LOOPS else str(usual * degree // copies)
        what = "ftc.pipeline_bounds" if job_config.ftc.pipeline_bounds else "parallelism.pipeline_parallel_layers_per_stage"
        raise FtcError(f"{name} on {degree} ranks cannot have {stages} stages; it takes {good}: change {what}")
    return a_rank


def _stages_of_layers(wanted: Any, num_regions: int) -> int:
    """As torchtitan counts: regions, with the embedding and the head as so many layers, over the layers of a stage."""
    layers = wanted.pipeline_parallel_layers_per_stage
    if layers < 1:
        raise FtcError(f"parallelism.pipeline_parallel_layers_per_stage is {layers}; it must be 1 or more")
    weights = wanted.pipeline_parallel_first_stage_less_layers + wanted.pipeline_parallel_last_stage_less_layers
    return math.ceil((num_regions + weights) / layers)


def _of_table(job_config: Any, path: str) -> tuple[Schedule, Placement]:
    """The actions of a CSV, proved to be whole and free of deadlock, and where they place stages."""
    degree, microbatches = job_config.parallelism.pipeline_parallel_degree, num_microbatches(job_config)
    actions = read(path)
    if len(actions) != degree:
        raise FtcError(f"{path} is a schedule for {len(actions)} ranks, and parallelism.pipeline_parallel_degree is {degree}; set it to {len(actions)}")
    numbers = {action.microbatch_index for _, _, action in every_part(actions)}
    if max(numbers) + 1 != microbatches:
        batch, size = job_config.training.local_batch_size, job_config.parallelism.pipeline_parallel_microbatch_size
        raise FtcError(
            f"{path} is a schedule for {max(numbers) + 1} microbatches, and training.local_batch_size = {batch} makes {microbatches} of {size}; "
            f"set it to {(max(numbers) + 1) * size}"
        )
    first = {action.microbatch_index for _, _, action in every_part(actions) if action.stage_index == 0}
    try:
        placement = placement_of(actions, MIRRORED if first and first < numbers and len(first) * 2 == len(numbers) else None)
        prove(actions, placement, microbatches)
    except FtcError as error:
        raise FtcError(f"{path}: {error}") from None
    return actions, placement
