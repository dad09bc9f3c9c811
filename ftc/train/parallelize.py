"""From one model to this rank's share of it: its parts of divided weights, recomputation, compilation by region, FSDP2 and HSDP."""

from typing import Any

from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torchtitan.config import TORCH_DTYPE_MAP
from torchtitan.tools.utils import device_type

from ftc.train.division import bind_ranks
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
        _shard(model.body, parallel_dims.get_mesh(names), job_config)
    elif parallel_dims.dp_replicate_enabled:
        # Replicas alone are HSDP with shards of one rank: DDP would divide by their number once more than the loss does.
        names = ("dp_replicate", "fsdp", "tp")
        mesh = init_device_mesh(device_type, (parallel_dims.dp_replicate, 1, parallel_dims.tp), mesh_dim_names=names)
        _shard(model.body, mesh[names[:2]], job_config)
    return model


def _shard(body: nn.Module, mesh: Any, job_config: Any) -> None:
    """fully_shard on every region, then on what is left (embedding, final norm, head)."""
    training = job_config.training
    policy = MixedPrecisionPolicy(
        param_dtype=TORCH_DTYPE_MAP[training.mixed_precision_param],
        reduce_dtype=TORCH_DTYPE_MAP[training.mixed_precision_reduce],
    )
    options: dict[str, Any] = {"mesh": mesh, "mp_policy": policy}
    if training.enable_cpu_offload:
        options["offload_policy"] = CPUOffloadPolicy()
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
