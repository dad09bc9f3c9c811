"""torchtitan's pipelining function: the captured and rewritten program cut into stages, this rank's made ready, and their schedule.

    whole program (meta)  ->  cut  ->  this rank's stages: recompute, compile, shard  ->  schedule  ->  memory, weights

Stages are cut by cost: the first rank measures each distinct region, the embedding and the head once, on the run's device, and the
partition with the least busy rank is everyone's. `[ftc] pipeline_bounds` says where to cut instead; with
`pipeline_parallel_layers_per_stage`, or other weights of embedding and head than 1, layers are counted, as torchtitan does.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torchtitan.config import TORCH_DTYPE_MAP
from torchtitan.tools.logging import logger

from ftc import pipeline as stages
from ftc.errors import FtcError
from ftc.pipeline.runtime_schedule import Schedule
from ftc.pipeline.runtime_stage import PipelineStage
from ftc.plan.measure import measure
from ftc.plan.parts import RunCosts
from ftc.plan.roofline import Machine
from ftc.train.division import bind_ranks
from ftc.train.documents_apart import packed_inputs
from ftc.train.losses import next_token
from ftc.train.parallelize import expert_mesh, parallelize_stages, stage_mesh
from ftc.train.pipeline_part import Cut, StagePart
from ftc.train.pipeline_settings import USUAL_LESS_LAYERS, Pipeline, resolve_pipeline
from ftc.train.ranks import first_rank_finds


def pipelining(
    model: Any,
    parallel_dims: Any,
    job_config: Any,
    device: torch.device,
    model_args: Any,
    parallelize_fn: Callable,
    loss_fn: Callable,
) -> tuple[Any, list[StagePart], bool, bool]:
    """(schedule, this rank's stages, whether the first is among them, whether the last is). All ranks must call it.

    model: a TrainedModel, captured, on the meta device. `parallelize_fn` and `loss_fn` are not used: stages are sharded together, and
    the last computes the loss. Raises FtcError for a schedule that does not fit the ranks, the regions or the microbatches.
    """
    cut = build_cut(model, parallel_dims, job_config, device, lambda pipeline: first_rank_finds(lambda: divide_by(model, pipeline, job_config, device)))
    schedule = build_schedule(cut, device, parallel_dims.get_mesh("pp").get_group())
    held = [part.index for part in cut.parts]
    if cut.pipeline.num_stages - 1 not in held:
        model.objective.teacher = None  # it runs beside the last stage
    logger.info(f"{cut.pipeline.in_words()}; regions begin at {[0, *cut.bounds]}; this rank has stages {held}")
    return schedule, cut.parts, 0 in held, cut.pipeline.num_stages - 1 in held


def build_cut(model: Any, parallel_dims: Any, job_config: Any, device: torch.device, by_cost: Callable[[Pipeline], tuple[int, ...]]) -> Cut:
    """The model cut into stages, and this rank's made ready for a schedule; `by_cost` says where to cut if the run file does not."""
    pipeline = resolve_pipeline(job_config, len(model.body.regions))
    shards = stage_mesh(parallel_dims, job_config)
    if shards is not None:  # what it casts weights to, known before anything is run
        set_compute_dtype(model.body, TORCH_DTYPE_MAP[job_config.training.mixed_precision_param])
    bounds = choose_bounds(model, pipeline, job_config, by_cost)
    bind_ranks(model.body, parallel_dims)
    cut = Cut(model, pipeline, stages.cut(model.body, bounds), bounds)
    check_trained(cut)
    cut.shapes = crossing_shapes(cut, job_config)
    cut.parts = [StagePart(cut, index) for index in pipeline.stages_of(parallel_dims.get_mesh("pp").get_local_rank())]
    cut.waiting = len(cut.parts)
    parallelize_stages(cut.parts, shards, job_config, expert_mesh(parallel_dims))
    return cut


def check_trained(cut: Cut) -> None:
    """FtcError for a stage without a weight to train: its rank's optimizer would have nothing to do, and no gradient passes it."""
    for index, stage in enumerate(cut.stages):
        if not any(parameter.requires_grad for parameter in stage.body.parameters()):
            raise FtcError(
                f"[ftc] trainable leaves nothing to train in stage {index} of the pipeline ({', '.join(r.name for r in stage.body.regions)}); "
                "train with pipeline_parallel_degree = 1, or something in each stage"
            )


def choose_bounds(model: Any, pipeline: Pipeline, job_config: Any, by_cost: Callable[[Pipeline], tuple[int, ...]]) -> tuple[int, ...]:
    """The first region of each stage but the first, the same on all ranks."""
    wanted, given = job_config.parallelism, job_config.ftc.pipeline_bounds
    if given:
        if len(given) != pipeline.num_stages - 1:
            raise FtcError(f"ftc.pipeline_bounds is {given}, {len(given)} bounds, and {pipeline.name} has {pipeline.num_stages} stages: give {pipeline.num_stages - 1}")
        return tuple(given)
    first, last = wanted.pipeline_parallel_first_stage_less_layers, wanted.pipeline_parallel_last_stage_less_layers
    if wanted.pipeline_parallel_layers_per_stage is not None or (first, last) != (USUAL_LESS_LAYERS, USUAL_LESS_LAYERS):
        return divide([1.0] * len(model.body.regions), first, last, pipeline)
    return by_cost(pipeline)


def divide_by(model: Any, pipeline: Pipeline, job_config: Any, device: torch.device, machine: Machine | None = None) -> tuple[int, ...]:
    """Bounds by the seconds of each part of the program in one microbatch, measured on the device with random weights, or modelled."""
    costs = region_costs(model, job_config, device, machine=machine)
    return divide([part.seconds for part in costs.regions], costs.first.seconds, costs.last.seconds, pipeline)


def region_costs(model: Any, job_config: Any, device: torch.device, **options: Any) -> RunCosts:
    """What each part of the program costs in one microbatch; whole, where ranks are to share it. options: of `ftc.plan.measure.measure`."""
    program = model.copy if model.body.axes else model.body
    size, length = job_config.parallelism.pipeline_parallel_microbatch_size, job_config.training.seq_len

    def step(where: torch.device) -> Tensor:
        ids = torch.randint(model.vocab_size, (size, length + 1), device=where)
        places = torch.arange(length, device=where).expand(size, length)
        apart = packed_inputs(places, model.apart_names) if job_config.ftc.document_mask else {}
        tokens, labels, objective = ids[:, :-1], ids[:, 1:], model.objective
        if objective.stored is not None:  # it knows the run's own text alone
            return next_token(program(**objective.call(tokens, apart=apart)), labels)
        return objective(objective.outputs(program, tokens, labels if objective.with_labels else None, None, apart), labels)

    before, dtype = program.compute_dtype, model.body.compute_dtype
    set_compute_dtype(program, dtype)
    try:
        with torch.random.fork_rng():
            return measure(program, step, torch.device("cpu") if device.type == "cpu" else device, **options)
    finally:
        set_compute_dtype(program, before)


def set_compute_dtype(program: Any, dtype: torch.dtype | None) -> None:
    """Of a program and its regions: what their graphs are captured for."""
    for captured in (*program.regions, program):
        captured.compute_dtype = dtype


def divide(costs: Sequence[float], first: float, last: float, pipeline: Pipeline) -> tuple[int, ...]:
    """Bounds with the least busy rank, embedding and head counted; a rank of a V or of a mirrored pipeline bears two stages."""
    folded = pipeline.is_mirrored or (pipeline.placement.style == "v" and pipeline.num_stages == 2 * pipeline.degree)
    return tuple(stages.partition(costs, pipeline.num_stages, first=first, last=last, placement="v" if folded else "loop"))


def crossing_shapes(cut: Cut, job_config: Any) -> list[tuple[Tensor, ...]]:
    """Tensors on the meta device like those that each stage gives the next for a microbatch; for the last, like its loss."""
    shape = job_config.parallelism.pipeline_parallel_microbatch_size, job_config.training.seq_len
    tokens = torch.zeros(shape, dtype=torch.int64)
    places = torch.arange(shape[1]).expand(shape) if job_config.ftc.document_mask else None
    found: list[tuple[Tensor, ...]] = []
    for index, stage in enumerate(cut.stages[:-1]):
        part = StagePart(cut, index)
        _, gives = stage.examples(part.inputs(tokens, tokens, places), extras=part.has_extras)
        found.append(tuple(t.contiguous() for t in gives))
    return [*found, (torch.empty((), device="meta").requires_grad_(),)]


def build_schedule(cut: Cut, device: torch.device, group: dist.ProcessGroup) -> Schedule:
    """The schedule over this rank's stages; its `step` runs one batch of all microbatches, forward and backward."""
    pipeline, made = cut.pipeline, []
    for part in cut.parts:
        given = cut.shapes[part.index - 1] if part.index else ()
        made.append(PipelineStage(part, part.index, pipeline.num_stages, device, input_args=given, output_args=cut.shapes[part.index], group=group))
    return Schedule(
        made, pipeline.num_microbatches, pipeline.actions, pipeline.placement, lambda loss, labels: loss, scale_grads=False, name=pipeline.name
    )
