"""FSDP2 that gathers weights in float8: the cast stands before the gather, so that half the bytes travel.

A sharded weight is cast on every rank to the dtype that it would be gathered in, then to float8 with the scale that the whole weight would get: the largest
magnitudes are maximised over the ranks, which is exact, so that products have the bits of a gather in high precision.

    scaling of the recipe       travels                                        beside it
    a scale a weight            1 byte a number                                one number a weight, all of them in one all-reduce after each step (`scales_ahead`)
    a scale a row (y = x W^T)   1 byte a number                                the scales, 4 bytes a row
    a scale a column (dx)       1 byte a number                                an all-reduce of 4 bytes a column

A recipe that scales W for dx in another way than for y (rowwise, rowwise_with_gw_hp) needs one gather for each: the forward pass gathers one, the backward
pass the other. So it needs weights that are resharded after the forward pass, and no forward pass within a backward pass (activation checkpointing).
"""

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ftc.errors import FtcError
from ftc.float8.cast import Scaled, amax_of, scale_of, with_scale
from ftc.float8.place import LINEAR, LINEARS, is_float8
from ftc.float8.recipes import FINE, Cast, recipe_of
from ftc.rewrite.edit import is_parameter

aten = torch.ops.aten
_KEEP = {
    aten.empty_like.default, aten.new_zeros.default, aten.slice.Tensor, aten.copy_.default, aten.view.default, aten.as_strided.default,
    aten._to_copy.default, aten._pin_memory.default, aten.split.Tensor, aten.clone.default, aten.detach.default,
}  # fmt: skip


class GatheredWeight(Tensor):
    """A whole weight [F, D] in float8, as the products of one pass read it; to autograd a tensor of the dtype that it was cast from."""

    @staticmethod
    def __new__(cls, data: Tensor, scale: Tensor, cast: Cast, dtype: torch.dtype):
        return Tensor._make_wrapper_subclass(cls, data.size(), strides=data.stride(), dtype=dtype, device=data.device, requires_grad=False)

    def __init__(self, data: Tensor, scale: Tensor, cast: Cast, dtype: torch.dtype):
        self.float8, self.scale, self.cast = data, scale, cast

    def ftc_float8(self, cast: Cast) -> Scaled:
        """What a product multiplies. FtcError where another scaling was gathered."""
        if cast != self.cast:
            raise FtcError(
                f"a weight was gathered in float8 with {self.cast.scaling} and is read with {cast.scaling}: with this recipe all_gather = true needs "
                "weights that are resharded after the forward pass, and no activation checkpointing; or take recipe tensorwise"
            )
        return Scaled(self.float8, self.scale)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func in (aten.detach.default, aten.as_strided.default, aten.view.default, aten.alias.default):
            weight = args[0]
            return GatheredWeight(func(weight.float8, *args[1:], **(kwargs or {})), weight.scale, weight.cast, weight.dtype)
        raise FtcError(f"{func} of a weight that was gathered in float8; only float8 products read it")

    def __repr__(self, **_) -> str:
        return f"GatheredWeight({list(self.shape)}, {self.cast.scaling})"


class ShardedWeight(Tensor):
    """A weight that FSDP2 gathers in float8, or one rank's rows of it. Everything else computes with the numbers in `whole`."""

    @staticmethod
    def __new__(cls, whole: Tensor, recipe: str, changes: list[int] | None = None):
        return Tensor._make_wrapper_subclass(
            cls, whole.size(), strides=whole.stride(), storage_offset=whole.storage_offset(), dtype=whole.dtype, layout=whole.layout,
            device=whole.device, requires_grad=whole.requires_grad,
        )  # fmt: skip

    def __init__(self, whole: Tensor, recipe: str, changes: list[int] | None = None):
        self.whole, self.recipe = whole, recipe
        self.changes = [0] if changes is None else changes  # shared with views: below autograd nothing else counts writes
        self.ready: dict[Cast, tuple[tuple, Tensor, object]] = {}  # by cast: version of the numbers, their scale, when it is there

    @property
    def version(self) -> tuple[int, int]:
        return self.changes[0], self.whole._version

    def __tensor_flatten__(self):
        return ["whole"], self.recipe

    @staticmethod
    def __tensor_unflatten__(inner, recipe, outer_size, outer_stride):
        return ShardedWeight(inner["whole"], recipe)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        first = next(t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, ShardedWeight))
        _count_writes(func, args, kwargs or {})
        args, kwargs = pytree.tree_map_only(ShardedWeight, lambda t: t.whole, (args, kwargs or {}))
        out = func(*args, **kwargs)
        return pytree.tree_map_only(Tensor, lambda t: ShardedWeight(t, first.recipe, first.changes), out) if func in _KEEP else out

    def __repr__(self, **_) -> str:
        return f"ShardedWeight({self.whole}, {self.recipe!r})"

    def fsdp_pre_all_gather(self, mesh, outer_size, outer_stride, module, mp_policy):
        """Rows in float8, filled up to as many as every rank has, and beside them the scale of the whole weight."""
        group, dtype = mesh.get_group(), mp_policy.param_dtype or self.whole.dtype
        recipe = recipe_of(self.recipe)
        cast = recipe.weight_for_dx if torch._C._current_graph_task_id() != -1 else recipe.weight
        rows = self.whole.to(dtype)
        missing = -(-outer_size[0] // group.size()) - rows.shape[0]
        known = self.ready.get(cast)
        if known is not None and known[0] == self.version:
            _, scale, there = known
            if there is not None:
                there.wait()  # FSDP2 gathers on a stream of its own
        elif cast.over == -1:
            scale = scale_of(_amax(rows, cast), cast)
        else:
            scale = scale_of(_maximum(_amax(rows, cast), group), cast)
        data = with_scale(rows, scale, cast.dtype)
        if missing:
            data = nn.functional.pad(data.view(torch.uint8), (0, 0, 0, missing)).view(cast.dtype)
        if cast.over == -1:
            scale = _every_row(scale, missing, group)[: outer_size[0]]
        return (data,), (scale, cast)

    def fsdp_post_all_gather(self, all_gather_outputs, metadata, param_dtype, *, out=None):
        """The weight that products read; FSDP2 keeps one and fills it again at the next gather."""
        (data,), (scale, cast) = all_gather_outputs, metadata
        if out is not None:
            out.scale, out.cast = scale, cast
            return None
        return GatheredWeight(data, scale, cast, param_dtype), (data,)


def _count_writes(func, args, kwargs) -> None:
    """Note on every weight that `func` writes to that its numbers change."""
    for argument, value in zip(func._schema.arguments, [*args, *[None] * len(func._schema.arguments)], strict=False):
        if argument.alias_info is not None and argument.alias_info.is_write:
            for t in pytree.tree_leaves(kwargs.get(argument.name, value)):
                if isinstance(t, ShardedWeight):
                    t.changes[0] += 1


def _amax(rows: Tensor, cast: Cast) -> Tensor:
    """Largest magnitudes in float32; zeros for a rank that has no rows."""
    if rows.shape[0] == 0:
        return rows.new_zeros({None: (), 0: (1, rows.shape[1]), -1: (0, 1)}[cast.over], dtype=torch.float32)
    return amax_of(rows, cast).float()


def _maximum(amax: Tensor, group) -> Tensor:
    dist.all_reduce(amax, op=dist.ReduceOp.MAX, group=group)
    return amax


def _every_row(scale: Tensor, missing: int, group) -> Tensor:
    """[rows of all ranks, 1] of each rank's [rows, 1]."""
    own = nn.functional.pad(scale, (0, 0, 0, missing), value=1.0).contiguous()
    found = own.new_empty(own.shape[0] * group.size(), 1)
    gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)  # the name until torch 2.12
    gather(found, own, group=group)
    return found


def float8_weights(graphs) -> dict[str, str]:
    """Parameters that nothing but float8 products reads, in all of `graphs` that read them, with their recipe."""
    found, others = {}, set()
    for graph in graphs:
        for node in graph.nodes:
            if not is_parameter(node):
                continue
            for user in node.users:
                if is_float8(user) and user.target is LINEAR and user.args[1] is node:
                    found[str(node.target)] = user.args[3]
                elif is_float8(user) and user.target is LINEARS and node in user.args[1] and node not in user.args[0]:
                    found[str(node.target)] = user.args[3]
                else:
                    others.add(str(node.target))
    return {name: recipe for name, recipe in found.items() if name not in others}


def wants_all_gather(program) -> bool:
    """Whether the program was rewritten with float8 and all_gather = true."""
    return any(entry["pass"] == "float8" and entry["options"].get("all_gather") for entry in program._applied)


def gather_in_float8(program, reshard: bool = True, recomputed: bool = False) -> list[str]:
    """Mark the weights of float8 products of the program's regions, in place, before `fully_shard`; returns their names.

    `reshard`: weights are resharded after the forward pass; `recomputed`: regions run forward again in the backward pass. Before each forward pass the
    scales that span ranks are then found in one all-reduce (`scales_ahead`). FtcError where the recipe needs what is not given, or has no float8 gather.
    """
    marked = []
    for region in program.regions:
        for name, recipe in float8_weights(v.captured.graph for v in region.code.all_variants()).items():
            if recipe == FINE:
                raise FtcError('recipe "fine" has no float8 gather: its blocks of 128 rows cross the ranks\' shards; set all_gather = false')
            if recipe_of(recipe).weight_needs > 1 and (recomputed or not reshard):
                raise FtcError(
                    f"float8 recipe {recipe} scales weights in two ways, so with all_gather = true weights must be resharded after the forward pass "
                    "(parallelism.fsdp_reshard_after_forward) and regions not be recomputed (activation_checkpoint.mode); or take recipe tensorwise"
                )
            owner, _, leaf = name.rpartition(".")
            module = region.get_submodule(owner)
            parameter = module._parameters[leaf]
            module._parameters[leaf] = nn.Parameter(ShardedWeight(parameter.detach(), recipe), requires_grad=parameter.requires_grad)
            marked.append(f"{region.name}.{name}")
        region.forget()
    program.forget()
    if not marked:
        raise FtcError("all_gather = true finds no weight that only float8 products read")
    program.register_forward_pre_hook(_scales_before)
    program.register_state_dict_post_hook(_plain_state)
    return marked


def _scales_before(program, args) -> None:
    scales_ahead(program, program.compute_dtype)


def _plain_state(module, state_dict: dict, prefix: str, metadata) -> None:
    """Checkpoints hold plain numbers, the same memory."""
    from torch.distributed.tensor import DTensor

    for name, value in state_dict.items():
        if isinstance(value, ShardedWeight):
            state_dict[name] = value.whole
        elif isinstance(value, DTensor) and isinstance(value._local_tensor, ShardedWeight):
            plain = value._local_tensor.whole
            state_dict[name] = DTensor.from_local(plain, value.device_mesh, value.placements, run_check=False, shape=value.shape, stride=value.stride())


def _local_weights(module: nn.Module) -> Iterator[tuple[nn.Parameter, ShardedWeight]]:
    for parameter in module.parameters():
        shard = getattr(parameter, "_local_tensor", None)
        if isinstance(shard, ShardedWeight):
            yield parameter, shard


@torch.no_grad()
def scales_ahead(module: nn.Module, dtype: torch.dtype | None = None) -> int:
    """Find the scales that span ranks for all weights at once, in one all-reduce; returns how many. Scales of numbers that have not changed stay, and those
    of numbers that have changed since are not used. `dtype`: what FSDP2 gathers in (its `param_dtype`)."""
    wanted = [
        (parameter, shard, cast)
        for parameter, shard in _local_weights(module)
        for cast in dict.fromkeys((recipe_of(shard.recipe).weight, recipe_of(shard.recipe).weight_for_dx))
        if cast.over != -1 and shard.ready.get(cast, (None,))[0] != shard.version
    ]
    if not wanted:
        return 0
    found = [_amax(shard.whole.to(dtype or shard.whole.dtype), cast) for _, shard, cast in wanted]
    mesh = wanted[0][0].device_mesh
    joined = _maximum(torch.cat([amax.reshape(-1) for amax in found]), mesh.get_group(mesh.ndim - 1))
    parts = joined.split([amax.numel() for amax in found])
    scales = [scale_of(part.view(amax.shape), cast) for (_, _, cast), amax, part in zip(wanted, found, parts, strict=True)]
    there = torch.cuda.current_stream().record_event() if joined.is_cuda else None
    for (_, shard, cast), scale in zip(wanted, scales, strict=True):
        shard.ready[cast] = (shard.version, scale, there)
    return len(wanted)
