"""State dicts of divided programs for torch.distributed.checkpoint, which saves them by whole weights and loads them on any number of ranks.

A rank's part of a stacked weight is several rectangles of the whole (its queries, its keys, its values), and FSDP2 cuts them once more along dim 0.
A DTensor has one rectangle. `Pieces` has a list of them, each a view of the parameter's own memory, at its place in the whole weight.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ftc.dialect.ranks import place_on
from ftc.errors import FtcError
from ftc.parallel.weights import bound_shards
from ftc.rewrite.shard import Shard

aten = torch.ops.aten


@dataclass(frozen=True)
class Rectangle:
    """A part of a whole weight: its place in it, and the values (a view)."""

    offsets: tuple[int, ...]
    values: Tensor


class Pieces(torch.Tensor):
    """A whole weight of which this rank holds some rectangles. It has no values of its own: only checkpoints read it."""

    @staticmethod
    def __new__(cls, size: Iterable[int], rectangles: list[Rectangle], like: Tensor):
        return torch.Tensor._make_wrapper_subclass(cls, tuple(size), dtype=like.dtype, device=like.device)

    def __init__(self, size, rectangles: list[Rectangle], like: Tensor):
        self.rectangles = rectangles

    def __repr__(self, **_):
        return f"Pieces({tuple(self.shape)}, {[(r.offsets, tuple(r.values.shape)) for r in self.rectangles]})"

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        first, others = args[0], args[1:]
        if function in (aten.detach.default, aten.clone.default, aten._to_copy.default, aten.alias.default):
            made = [Rectangle(r.offsets, function(r.values, *others, **(kwargs or {}))) for r in first.rectangles]
            return cls(first.shape, made, made[0].values if made else first)
        if function in (aten.new_empty.default, aten.empty_like.default):
            made = [Rectangle(r.offsets, torch.empty_like(r.values, **(kwargs or {}))) for r in first.rectangles]
            return cls(first.shape, made, made[0].values if made else first)
        if function is aten.copy_.default:
            for mine, theirs in zip(first.rectangles, others[0].rectangles, strict=True):
                mine.values.copy_(theirs.values)
            return first
        raise NotImplementedError(f"{function} on a piece of a weight: load it into a parameter, or make it whole with whole_state_dict")

    def __create_write_items__(self, name: str, _: object) -> list:
        from torch.distributed.checkpoint.metadata import MetadataIndex, TensorProperties
        from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

        items = []
        for chunk, rectangle in zip(self.__create_chunk_list__(), self.rectangles, strict=True):
            data = TensorWriteData(chunk=chunk, properties=TensorProperties.create_from_tensor(rectangle.values), size=self.shape)
            items.append(WriteItem(index=MetadataIndex(name, chunk.offsets), type=WriteItemType.SHARD, tensor_data=data))
        return items

    def __create_chunk_list__(self) -> list:
        from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

        return [ChunkStorageMetadata(offsets=torch.Size(r.offsets), sizes=r.values.shape) for r in self.rectangles]

    def __get_tensor_shard__(self, index) -> Tensor:
        for rectangle in self.rectangles:
            if torch.Size(rectangle.offsets) == index.offset:
                return rectangle.values
        raise FtcError(f"this rank holds no part of {index.fqn} that begins at {tuple(index.offset)}")


def checkpoint_state(program, tensors: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """`tensors` (default: the program's state dict) with every divided one as `Pieces`, for dcp.save and, to load in place, dcp.load.

    A key belongs to the parameter whose name it holds between dots ("state.layers.0.mlp.up.weight.exp_avg"), so optimizer moments by name are
    carried too. Tensors may be DTensors of FSDP2 (Shard(0) or replicated); what is not divided stays as it is.
    """
    tensors = program.state_dict() if tensors is None else tensors
    shards = bound_shards(program)
    names = sorted((name for name, _ in program.named_parameters(remove_duplicate=False)), key=len, reverse=True)
    found = {}
    for key, tensor in tensors.items():
        name = next((n for n in names if f".{n}." in f".{key}."), None)
        divided = name in shards and isinstance(tensor, Tensor) and tensor.dim() > 0
        found[key] = _pieces(shards[name], tensor) if divided else tensor
    return found


def _pieces(shard: Shard, tensor: Tensor) -> Pieces:
    """This rank's rectangles of a divided weight."""
    local, start = tensor.detach(), [0] * tensor.dim()
    if hasattr(tensor, "device_mesh"):
        from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

        _, start = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
        local = tensor.to_local().detach()
    size, dim = list(tensor.shape), shard.dim
    size[dim] = sum(shard.blocks)
    rank = place_on(shard.axis, shard.degree).rank
    rectangles = []
    for own, whole, length in shard.ranges(rank):
        first, last = max(own, start[dim]), min(own + length, start[dim] + local.shape[dim])
        if first < last and local.numel():
            offsets = list(start)
            offsets[dim] = whole + first - own
            rectangles.append(Rectangle(tuple(offsets), local.narrow(dim, first - start[dim], last - first)))
    return Pieces(size, rectangles, local)
