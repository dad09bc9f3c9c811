"""What test_pipeline_schedules.py runs on each rank: torch's own schedules over stages of a program, and the same in one process."""

import pipeline_cases as cases
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import PipelineScheduleMulti, get_schedule_class

from ftc.parallel import bind
from ftc.parallel.weights import full, whole_tensors
from ftc.pipeline import TiedParameters, cut, stage_ranks

BATCH, MICROBATCHES = 8, 8
V_SHAPED = ("ZBVZeroBubble", "DualPipeV")


class WithLoss(nn.Module):
    """A stage, of which the last gives the loss alone: torch's schedules merge tensors only."""

    def __init__(self, stage: nn.Module):
        super().__init__()
        self.stage = stage

    def forward(self, *crossing, **inputs):
        result = self.stage(*crossing, **inputs)
        return cases.loss_of(result) if self.stage.is_last else result


def share(given: dict) -> float:
    """What a microbatch counts: its counted labels over those of the batch."""
    return float((given["labels"] != -100).sum() / (cases.batch(BATCH)["labels"] != -100).sum())


def alone(name: str, passes: list, layers: int) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and every gradient of the program in one process, one microbatch after another."""
    program, total = cases.program_of(name, passes, layers), 0.0
    for number in range(MICROBATCHES):
        given = {n: x.chunk(MICROBATCHES)[number] for n, x in cases.batch(BATCH).items()}
        loss = cases.loss_of(program(**given)) * share(given)
        loss.backward()
        total += loss.item()
    return total, cases.gradients(program)


def stages_here(program, schedule: str, num_stages: int, group) -> list:
    """This rank's stages of the program, cut evenly."""
    count, rank = len(program.regions), dist.get_rank(group)
    bounds = [round(stage * count / num_stages) for stage in range(1, num_stages)]
    where = stage_ranks(num_stages, dist.get_world_size(group), "v" if schedule in V_SHAPED else "loop")
    return [stage for stage, owner in zip(cut(program, bounds), where, strict=True) if owner == rank]


def train_step(stages: list, schedule: str, given: dict, microbatches: int, group, static: bool = True, kind: type = PipelineStage) -> list[torch.Tensor]:
    """Forward and backward of a batch on this rank's stages, each in a `kind`; losses of the microbatches on the rank of the last stage."""
    pipeline = []
    for stage in stages:
        takes = gives = None
        if static:
            takes, gives = stage.examples({n: x.chunk(microbatches)[0] for n, x in given.items()})
        gives = cases.loss_of(gives) if static and stage.is_last else gives
        module = stage if isinstance(stage, FSDPModule) else WithLoss(stage)
        device = torch.device("cpu")
        pipeline.append(kind(module, stage.index, stage.num_stages, device, input_args=takes, output_args=gives, group=group))
    total = (cases.batch(BATCH)["labels"] != -100).sum()
    losses: list[torch.Tensor] = []
    loss = lambda loss, labels: loss * ((labels != -100).sum() / total)  # noqa: E731
    if kind is PipelineStage:
        order = get_schedule_class(schedule)
        mine = pipeline if issubclass(order, PipelineScheduleMulti) else pipeline[0]
        runner = order(mine, microbatches, loss_fn=loss, scale_grads=False)
    else:
        from ftc.pipeline.runtime import schedule_from

        runner = schedule_from(schedule, pipeline, microbatches, loss, scale_grads=False, interleave=False)
    last = any(stage.is_last for stage in stages)
    runner.step(**given, return_outputs=False, **({"target": given["labels"], "losses": losses} if last else {}))
    return losses


def kind_of(torchs: bool) -> type:
    """torch's PipelineStage, or the one that splits backward passes by their graphs (and comes with a schedule of its own)."""
    from ftc.pipeline.runtime_stage import PipelineStage as Ours

    return PipelineStage if torchs else Ours


def result_of(stages: list, tied: TiedParameters, losses: list):
    """(summed loss or None, gradients by stage and name, counted names by stage) of this rank."""
    found = {stage.index: {n: full(p.grad) for n, p in stage.body.named_parameters()} for stage in stages}
    return (torch.stack(losses).sum().item() if losses else None), found, dict(zip(found, tied.counted(), strict=True))


def scheduled(name: str, passes: list, layers: int, schedules: list, static: bool = True, reduce: bool = True) -> list:
    """`result_of` each of `schedules`, (name, number of stages)."""
    program, group, results = cases.program_of(name, passes, layers), dist.group.WORLD, []
    for schedule, num_stages in schedules:
        program.zero_grad()
        stages = stages_here(program, schedule, num_stages, group)
        tied = TiedParameters(stages, group)
        losses = train_step(stages, schedule, cases.batch(BATCH), MICROBATCHES, group, static)
        if reduce:
            tied.reduce_gradients()
        results.append(result_of(stages, tied, losses))
    return results


def sharded(name: str, passes: list, layers: int, schedule: str, num_stages: int, torchs: bool = True):
    """Two ranks of pipeline, each of two ranks of data with FSDP2: (summed loss, gradients, counted names, norm of all counted)."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "dp"))
    group, data = mesh["pp"].get_group(), mesh["dp"].get_local_rank()
    stages = stages_here(cases.program_of(name, passes, layers), schedule, num_stages, group)
    for stage in stages:
        for module in (*stage.body.regions, stage):
            fully_shard(module, mesh=mesh["dp"])
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo has no premultiplied sum
    tied = TiedParameters(stages, group)
    own = {n: x.chunk(2)[data] for n, x in cases.batch(BATCH).items()}
    losses = train_step(stages, schedule, own, MICROBATCHES // 2, group, kind=kind_of(torchs))
    tied.reduce_gradients()
    if losses:
        losses = [torch.stack(losses).sum().detach()]
        dist.all_reduce(losses[0], group=mesh["dp"].get_group())
    squares = torch.stack([full(p.grad).square().sum() for p in tied.counted_parameters()]).sum()
    dist.all_reduce(squares, group=group)
    return *result_of(stages, tied, losses), squares.sqrt().item()


def divided(name: str, layers: int, schedule: str, num_stages: int):
    """Two ranks of pipeline, each of two ranks that divide heads, features and vocabulary: as `scheduled`, with whole gradients."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "tp"))
    program = bind(cases.program_of(name, [("tensor-parallel", {"degree": 2})], layers), mesh["tp"])
    group = mesh["pp"].get_group()
    stages = stages_here(program, schedule, num_stages, group)
    tied = TiedParameters(stages, group)
    losses = train_step(stages, schedule, cases.batch(BATCH), MICROBATCHES, group)
    tied.reduce_gradients()
    found = {s.index: dict(whole_tensors(s.body, {n: p.grad for n, p in s.body.named_parameters()})) for s in stages}
    return (torch.stack(losses).sum().item() if losses else None), found, dict(zip(found, tied.counted(), strict=True))
