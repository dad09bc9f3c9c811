"""What ranks of the tests of split backward passes do: one step of a pipeline, and the gradients that it leaves."""

import csv as csv_files

import torch
import torch.distributed as dist
import torch.nn.functional as F
from ftc.models.decoder import Decoder
from ftc.models.presets import preset
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.utils.checkpoint import checkpoint

import ftc
from ftc.errors import FtcError, FtcFailure
from ftc.pipeline import TiedParameters, cut
from ftc.pipeline.runtime import PipelineStage, actions_from, schedule_from

VOCABULARY = 64


def logits_of(result) -> Tensor:
    """The logits, whether the model gives them alone or with others."""
    return result if isinstance(result, Tensor) else result.logits if hasattr(result, "logits") else result[0]


def tensors_of(result) -> tuple[Tensor, ...]:
    """The logits, and the tensors that passes added."""
    result, further = result if isinstance(result, tuple) and isinstance(result[1], dict) else (result, {})
    return logits_of(result), *(t for t in further.values() if t.is_floating_point())


def loss_of(result, labels_BT: Tensor) -> Tensor:
    """Cross-entropy, and something of each further tensor."""
    logits_BTV, *further = (result,) if isinstance(result, Tensor) else result
    return F.cross_entropy(logits_BTV.flatten(0, 1).float(), labels_BT.flatten()) + sum(t.float().square().mean() for t in further)


def model(name: str, layers: int, passes=(), seed: int = 0, **changes) -> ftc.Program:
    """A captured preset with weights by the seed."""
    torch.manual_seed(seed)
    decoder = Decoder(preset(name, vocab_size=VOCABULARY, num_hidden_layers=layers, **changes)).train()
    example = {"input_ids": torch.randint(VOCABULARY, (2, 12))}
    program = ftc.capture(decoder, example)
    return ftc.rewrite(program, list(passes), example=example, inplace=True, check=False) if passes else program


def batch(microbatches: int, seed: int = 0, size: int = 2, length: int = 10) -> tuple[Tensor, Tensor]:
    """Ids and labels of all microbatches, int64 [microbatches * size, length]."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(VOCABULARY, (microbatches * size, length + 1), generator=generator)
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def even(program, num_stages: int) -> list:
    regions = len(program.regions)
    return cut(program, [regions * stage // num_stages for stage in range(1, num_stages)])


class Whole(nn.Module):
    """A stage as a module of a run: its body is one of its children."""

    def __init__(self, stage, further: bool = False):
        super().__init__()
        self.further = further
        self.body = stage.body
        self.__dict__["stage"] = stage

    def forward(self, *crossing: Tensor, input_ids: Tensor):
        result = self.stage(*crossing, input_ids=input_ids, ftc_extras=self.further)
        return tensors_of(result) if self.stage.is_last else result


def alone(name: str, layers: int, microbatches: int, passes=(), **options) -> tuple[list[float], dict[str, Tensor]]:
    """Losses of each microbatch and gradients of their mean, in one process without stages."""
    program = model(name, layers, passes, **options)
    losses = []
    for ids, labels in zip(*(t.chunk(microbatches) for t in batch(microbatches)), strict=True):
        loss = loss_of(tensors_of(program(input_ids=ids, ftc_extras="add-mtp" in passes)), labels)
        (loss / microbatches).backward()
        losses.append(loss.item())
    return losses, {n: p.grad for n, p in program.named_parameters()}


def pipeline(schedule_name, name, layers, microbatches, passes=(), shards=1, compiled=None, interleave=True, csv=None, recompute=False, **options):
    """(schedule, this rank's modules, the mesh) of a pipeline over the ranks of the group, `shards` of which share a stage (FSDP2)."""
    program = model(name, layers, passes, **options)
    size, group, mesh = dist.get_world_size() // shards, None, None
    if shards > 1:
        mesh = init_device_mesh("cpu", (size, shards), mesh_dim_names=("pp", "dp"))
        group = mesh.get_group("pp")
    rank = dist.get_rank(group)
    if csv is not None and schedule_name is not None and rank == 0:
        write_csv(csv, schedule_name, size, microbatches)
    dist.barrier()
    _, placement = actions_from(csv or schedule_name, size, microbatches, 2)
    numbers = [placement.position(number) for number in placement.stages_of(rank)]
    parts = even(program, len(placement.chains[0]))
    if compiled:
        program.compile(**compiled)
    if recompute:
        for region in program.regions:
            region.around = recomputed
    modules = [Whole(parts[number], "add-mtp" in passes) for number in numbers]
    if shards > 1:
        modules = [sharded(module, mesh["dp"]) for module in modules]
    stages = [PipelineStage(module, n, len(parts), torch.device("cpu"), group=group) for n, module in zip(numbers, modules, strict=True)]
    return schedule_from(csv or schedule_name, stages, microbatches, loss_of, interleave=interleave), modules, mesh


def step(schedule_name, name, layers, microbatches, *args, steps=1, evaluate=False, **options) -> tuple[list[float], dict[str, Tensor]]:
    """Losses known on this rank after `steps` steps, and the gradients held here."""
    schedule, modules, mesh = pipeline(schedule_name, name, layers, microbatches, *args, **options)
    losses: list[Tensor] = []
    ids, labels = batch(microbatches)
    if mesh is not None:
        mine, shards = dist.get_rank(mesh.get_group("dp")), mesh.size(1)
        ids, labels = (torch.cat([m.chunk(shards)[mine] for m in t.chunk(microbatches)]) for t in (ids, labels))
    last = {"target": labels, "losses": losses} if any(stage.is_last for stage in schedule._stages) else {}
    for _ in range(steps):
        schedule.step(input_ids=ids, **last, return_outputs=False)
    trained = [loss.item() for loss in losses]
    TiedParameters([m.stage for m in modules], schedule._stages[0].group or dist.group.WORLD).reduce_gradients()
    if evaluate:
        with torch.no_grad():
            schedule.eval(input_ids=ids, **last)
        assert [loss.item() for loss in losses] == trained
    return trained, gradients_of(modules)


def gradients_of(modules) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for module in modules:
        for key, parameter in module.body.named_parameters():
            gradient = parameter.grad
            found.setdefault(key, gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient)
    return found


def step_of_torch(kind: str, name: str, layers: int, microbatches: int, together: bool) -> tuple[list[float], dict[str, Tensor]]:
    """As `step`, by torch's own runtime over our stages; `together`: with our function for pairs."""
    from torch.distributed.pipelining.schedules import get_schedule_class

    from ftc.pipeline.dualpipe import register

    program, rank, size = model(name, layers), dist.get_rank(), dist.get_world_size()
    parts = even(program, 2 * size)
    numbers = (rank, 2 * size - 1 - rank)
    modules = [Whole(parts[number]) for number in numbers]
    stages = [PipelineStage(module, n, len(parts), torch.device("cpu"), splits=True) for n, module in zip(numbers, modules, strict=True)]
    schedule = get_schedule_class(kind)(stages, microbatches, loss_fn=loss_of)
    if together:
        register(schedule)
    losses: list[Tensor] = []
    ids, labels = batch(microbatches)
    last = {"target": labels, "losses": losses} if rank == 0 else {}
    schedule.step(input_ids=ids, **last)
    return [loss.item() for loss in losses], gradients_of(modules)


def order_of_pairs(layers: int, microbatches: int, interleave: bool) -> list[list[str]]:
    """DualPipeV on one rank: for each pair the regions in the order in which forward ("F layers.0") and backward ("B layers.3") passes ran."""
    schedule, modules, _ = pipeline("DualPipeV", "tiny", layers, microbatches, interleave=interleave)
    seen: list[list[str]] = []
    watching = False
    for module in modules:
        for region in module.body.regions:

            def noted(run, args, kwargs, inner=region.around, name=region.name):
                if watching:
                    seen[-1].append(f"F {name}")
                result = inner(run, args, kwargs)
                tensor = result if isinstance(result, Tensor) else result[0]
                tensor.register_hook(lambda _: seen[-1].append(f"B {name}") if watching else None)
                return result

            region.around = noted
    perform = schedule._perform

    def watched(action):
        nonlocal watching
        watching = action.sub_actions is not None
        if watching:
            seen.append([])
        perform(action)
        watching = False

    schedule._perform = watched
    ids, labels = batch(microbatches)
    schedule.step(input_ids=ids, target=labels)
    return seen


def wrong_stages() -> str:
    """What is said of stages in another order than the schedule's."""
    parts = even(model("tiny", 4), 4)
    numbers = sorted((dist.get_rank(), 3 - dist.get_rank()), reverse=True)
    stages = [PipelineStage(Whole(parts[n]), n, 4, torch.device("cpu")) for n in numbers]
    try:
        schedule_from("DualPipeV", stages, 4, loss_of)
    except FtcError as error:
        return str(error)
    return ""


def forgotten_weights() -> str:
    """What is said of a stage whose weight gradients nobody asked for."""
    schedule, _, _ = pipeline("ZBVZeroBubble", "tiny", 4, 4)
    for stage in schedule._stages:
        stage.backward_weight_one_chunk = lambda chunk, **_: None
    ids, labels = batch(4)
    last = {"target": labels} if dist.get_rank() == 0 else {}
    try:
        schedule.step(input_ids=ids, **last)
    except FtcFailure as error:
        return str(error)
    return ""


def recomputed(run, args, kwargs):
    return checkpoint(run, *args, use_reentrant=False, **kwargs)


def sharded(module: nn.Module, mesh) -> nn.Module:
    for region in module.body.regions:
        fully_shard(region, mesh=mesh, reshard_after_forward=False)
    fully_shard(module, mesh=mesh, reshard_after_forward=False)
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.set_force_sum_reduction_for_comms(True)
    return module


def write_csv(path: str, name: str, ranks: int, microbatches: int) -> None:
    lists, _ = actions_from(name, ranks, microbatches)
    with open(path, "w", newline="") as file:
        writer = csv_files.writer(file)
        for rank in sorted(lists):
            writer.writerow(lists[rank])
