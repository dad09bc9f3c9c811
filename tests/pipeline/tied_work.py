"""Work for the ranks of test_pipeline_tied.py: modules that hold parameters of the same names, with gradients drawn from a seed."""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from ftc.errors import FtcError
from ftc.parallel.weights import full
from ftc.pipeline import TiedParameters, tied

SIZES = {"a": (3, 5), "b": (7,), "c": (), "d": (4, 2)}


class Holder(nn.Module):
    """A stage that holds `names`, each as everywhere at first."""

    def __init__(self, index: int, names: str, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.index = index
        for name in names:
            generator = torch.Generator().manual_seed(ord(name))
            self.register_parameter(name, nn.Parameter(torch.randn(SIZES[name], generator=generator, dtype=dtype)))

    def draw_gradients(self, seed: int, missing: str = "") -> None:
        """A gradient for each parameter, but for `missing`."""
        generator = torch.Generator().manual_seed(1000 * seed + self.index)
        for name, parameter in self.named_parameters():
            grad = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            parameter.grad = None if name in missing else grad


def reduced(holders: list[list[tuple[int, str]]], seed: int, missing: str = "", bucket_bytes: int | None = None, dtype: torch.dtype = torch.float32):
    """This rank's gradients before and after, by stage and name, and the names that it counts. `holders`: by rank (index, names) of its stages."""
    group = dist.group.WORLD if dist.is_initialized() else None
    stages = [Holder(index, names, dtype) for index, names in holders[dist.get_rank() if group else 0]]
    for stage in stages:
        stage.draw_gradients(seed, missing if stage.index == 0 else "")
    before = {s.index: {n: p.grad for n, p in s.named_parameters() if p.grad is not None} for s in stages}
    before = {index: {n: g.clone() for n, g in grads.items()} for index, grads in before.items()}
    kept = tied.BUCKET_BYTES
    tied.BUCKET_BYTES = bucket_bytes or kept
    try:
        parameters = TiedParameters(stages, group)
        parameters.reduce_gradients()
    finally:
        tied.BUCKET_BYTES = kept
    after = {s.index: {n: p.grad for n, p in s.named_parameters()} for s in stages}
    return before, after, dict(zip(after, parameters.counted(), strict=True)), [p.shape for p in parameters.counted_parameters()]


def on_shards(seed: int):
    """The same with FSDP2: two ranks of pipeline, the stages 0 and 2 on the first and 1 on the second, each sharded over two ranks of data."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "dp"))
    stages = [Holder(index, names) for index, names in ([(0, "ab"), (2, "ad")], [(1, "bd")])[mesh["pp"].get_local_rank()]]
    for stage in stages:
        stage.draw_gradients(seed)
    before = {s.index: {n: p.grad.clone() for n, p in s.named_parameters()} for s in stages}
    for stage in stages:
        fully_shard(stage, mesh=mesh["dp"])
        for name, parameter in stage.named_parameters():
            parameter.grad = torch.distributed.tensor.distribute_tensor(before[stage.index][name], mesh["dp"], parameter.placements)
    parameters = TiedParameters(stages, mesh["pp"].get_group())
    parameters.reduce_gradients()
    after = {s.index: {n: full(p.grad) for n, p in s.named_parameters()} for s in stages}
    return before, after, dict(zip(after, parameters.counted(), strict=True)), []


def refused(how: str) -> str:
    """What is said where holders differ on the last rank."""
    last = dist.get_rank() == dist.get_world_size() - 1
    stage = Holder(dist.get_rank(), "ab")
    with torch.no_grad():
        if last and how == "values":
            stage.b[2] = torch.nextafter(stage.b[2], torch.tensor(9.0))
        if last and how == "trained":
            stage.b.requires_grad_(False)
        if last and how == "sizes":
            stage.b = nn.Parameter(torch.zeros(8))
        if last and how == "dtype":
            stage.b = nn.Parameter(stage.b.double())
        if how == "meta":
            stage = stage.to("meta")
    try:
        tied_parameters = TiedParameters([stage], dist.group.WORLD)
        if how == "meta":
            tied_parameters.reduce_gradients()
        return "nothing"
    except (FtcError, RuntimeError) as error:
        return str(error)
