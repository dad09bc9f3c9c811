"""From one model to this rank's share of it: its parts of divided weights, recomputation, compilation by region, FSDP2 and HSDP."""

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_common import FSDPMeshInfo, HSDPMeshInfo, ShardPlacementResult
from torchtitan.config import TORCH_DTYPE_MAP
from torchtitan.tools.utils import device_type

from ftc.parallel.weights import bound_shards
from ftc.train.division import EXPERT, bind_ranks
from ftc.train.recompute import recompute_activations


def parallelize(model: nn.Module, parallel_dims: Any, job_config: Any) -> nn.Module:
    """Divide, recompute, compile and shard the regions of a captured model as the configuration says, in place; returns it."""
    bind_ranks(model.body, parallel_dims)
    regions = model.body.regions
    compiled = job_config.compile.enable and "model" in job_config.compile.components
    recompute_activations(regions, job_config.activation_checkpoint, compiled)
    if compiled:
        model.body.compile(backend=job_config.compile.backend)
    if parallel_dims.fsdp_enabled:
        names = ["dp_replicate", "fsdp"] if parallel_dims.dp_replicate_enabled else ["fsdp"]
        _shard(model.body, parallel_dims.get_mesh(names), job_config, expert_mesh(parallel_dims))
    elif parallel_dims.dp_replicate_enabled:
        # Replicas alone are HSDP with shards of one rank: DDP would divide by their number once more than the loss does.
        names = ("dp_replicate", "fsdp", "tp")
        mesh = init_device_mesh(device_type, (parallel_dims.dp_replicate, 1, parallel_dims.tp), mesh_dim_names=names)
        _shard(model.body, mesh[names[:2]], job_config)
    return model


def expert_mesh(parallel_dims: Any) -> DeviceMesh | None:
    """The ranks that hold the same experts as this one, of data alone; None without expert parallelism.

    Its last dimension is called "ep", as torchtitan tells by that name which gradients stand on another mesh than all others.
    """
    if not parallel_dims.ep_enabled:
        return None
    names = ["dp_replicate", "efsdp"] if parallel_dims.dp_replicate_enabled else ["efsdp"]
    mesh = parallel_dims.get_mesh(names)
    groups = [mesh.get_group(name) for name in names]
    return DeviceMesh.from_group(groups if len(groups) > 1 else groups[0], mesh.device_type, mesh.mesh, mesh_dim_names=(*names[:-1], "ep"))


def _by_experts(body: nn.Module, mesh: DeviceMesh) -> Callable[[nn.Parameter], ShardPlacementResult | None]:
    """FSDP's mesh for each parameter: a rank's own experts are sharded over the ranks that hold the same ones."""
    shards, own = bound_shards(body), HSDPMeshInfo(mesh, 1, 0) if mesh.ndim == 2 else FSDPMeshInfo(mesh, shard_mesh_dim=0)
    experts = {id(p) for name, p in body.named_parameters() if name in shards and shards[name].axis == EXPERT}
    return lambda parameter: ShardPlacementResult(None, own) if id(parameter) in experts else None


def _shard(body: nn.Module, mesh: Any, job_config: Any, experts: DeviceMesh | None = None) -> None:
    """fully_shard on every region, then on what is left (embedding, final norm, head); a rank's experts over the mesh `experts`."""
    training = job_config.training
    policy = MixedPrecisionPolicy(
        param_dtype=TORCH_DTYPE_MAP[training.mixed_precision_param],
        reduce_dtype=TORCH_DTYPE_MAP[training.mixed_precision_reduce],
    )
    options: dict[str, Any] = {"mesh": mesh, "mp_policy": policy}
    if training.enable_cpu_offload:
        options["offload_policy"] = CPUOffloadPolicy()
    if experts is not None:
        options["shard_placement_fn"] = _by_experts(body, experts)
    reshard = job_config.parallelism.fsdp_reshard_after_forward != "never"
    for captured in (*body.regions, body):
        captured.compute_dtype = policy.param_dtype
    for region in body.regions:
        fully_shard(region, **options, reshard_after_forward=reshard)
    fully_shard(body, **options, reshard_after_forward=job_config.parallelism.fsdp_reshard_after_forward == "always")
    for module in body.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)  # the loss is divided by the tokens of all ranks already
            if mesh.device_type == "cpu":
                module.set_force_sum_reduction_for_comms(True)  # gloo has no scaled sum
