"""From one model to this rank's share of it: its parts of divided weights, recomputation, compilation by region, FSDP2 and HSDP."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_common import FSDPMeshInfo, HSDPMeshInfo, ShardPlacementResult
from torchtitan.config import TORCH_DTYPE_MAP
from torchtitan.tools.utils import device_type

from ftc.float8.all_gather import gather_in_float8, wants_all_gather
from ftc.parallel.weights import bound_shards
from ftc.train.division import EXPERT, bind_ranks
from ftc.train.recompute import recompute_activations


def parallelize(model: nn.Module, parallel_dims: Any, job_config: Any) -> nn.Module:
    """Divide, recompute, compile and shard the regions of a captured model as the configuration says, in place; returns it."""
    bind_ranks(model.body, parallel_dims)
    regions = model.body.regions
    compiled = compiles_model(job_config)
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


def parallelize_stages(parts: Sequence[nn.Module], mesh: DeviceMesh | None, job_config: Any, experts: DeviceMesh | None = None) -> None:
    """The same for this rank's stages of a pipeline, bound already, in place, sharded over `stage_mesh`. Between microbatches they stay gathered,
    unless `fsdp_reshard_after_forward` is "always": a stage runs once for each."""
    compiled = compiles_model(job_config)
    for part in parts:
        recompute_activations(part.body.regions, job_config.activation_checkpoint, compiled)
        if compiled:
            part.body.compile(backend=job_config.compile.backend)
        if mesh is not None:
            _shard(part.body, mesh, job_config, experts, root=part)


def stage_mesh(parallel_dims: Any, job_config: Any) -> DeviceMesh | None:
    """The ranks that hold the same stages as this one, and share or repeat them; None where a rank holds its stages alone, as they are.

    Alone and in another dtype than they are stored in, stages are sharded over one rank: what casts them.
    """
    if parallel_dims.fsdp_enabled:
        return parallel_dims.get_mesh(["dp_replicate", "fsdp"] if parallel_dims.dp_replicate_enabled else ["fsdp"])
    training = job_config.training
    if not parallel_dims.dp_replicate_enabled and TORCH_DTYPE_MAP[training.mixed_precision_param] == TORCH_DTYPE_MAP[training.dtype]:
        return None
    names = ("pp", "dp_replicate", "fsdp", "tp")
    mesh = init_device_mesh(device_type, (parallel_dims.pp, parallel_dims.dp_replicate, 1, parallel_dims.tp), mesh_dim_names=names)
    return mesh[names[1:3]] if parallel_dims.dp_replicate_enabled else mesh["fsdp"]


def compiles_model(job_config: Any) -> bool:
    """Whether regions are compiled."""
    return job_config.compile.enable and "model" in job_config.compile.components


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


def _shard(body: nn.Module, mesh: Any, job_config: Any, experts: DeviceMesh | None = None, root: nn.Module | None = None) -> None:
    """fully_shard on every region, then on what is left (embedding, final norm, head); a rank's experts over the mesh `experts`.

    `root`: the stage of a pipeline around `body`, which is sharded in its place, as its schedule gathers it.
    """
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
    asked = job_config.parallelism.fsdp_reshard_after_forward
    reshard = asked == "always" if root is not None else asked != "never"
    for captured in (*body.regions, body):
        captured.compute_dtype = policy.param_dtype
    if wants_all_gather(body):
        gather_in_float8(body, reshard, recomputed=job_config.activation_checkpoint.mode != "none")
    for region in body.regions:
        fully_shard(region, **options, reshard_after_forward=reshard)
    whole = body if root is None else root
    if root is not None:  # what crosses from another stage is as that stage made it
        options["mp_policy"] = replace(policy, cast_forward_inputs=False)
    fully_shard(whole, **options, reshard_after_forward=asked == "always")
    for module in whole.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)  # the loss is divided by the tokens of all ranks already
            if mesh.device_type == "cpu":
                module.set_force_sum_reduction_for_comms(True)  # gloo has no scaled sum
