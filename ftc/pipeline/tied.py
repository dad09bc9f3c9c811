"""Parameters that several stages hold: one gradient for all of them, counted once.

    embedding on stage 0:  dL/dE = g_0        head on stage S-1, tied to it:  dL/dE = g_1        both step with g_0 + g_1

    tied = TiedParameters(stages, group)      # the stages of this rank; group: the ranks that hold the others
    ... backward of all microbatches ...
    tied.reduce_gradients()                   # before clipping and the optimizer's step

Every holder adds the same numbers in the same order, so all of them stay equal to the last bit. Holders are found by the names that the
parameters have in the program, so mirrored stages (the bidirectional DualPipe of DeepSeek-V3, 2024, section 3.2.1, which holds each stage
on two ranks) are summed by the same rule.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from ftc.errors import FtcError, FtcFailure
from ftc.parallel.weights import local

BUCKET_BYTES = 256 << 20  # what is received at a time: mirrored stages would otherwise need a second copy of all gradients


@dataclass(frozen=True)
class Holding:
    """One parameter on one stage of one rank, as the others are told of it. `sizes` are those of this rank's shard."""

    rank: int
    stage: int
    position: int
    name: str
    sizes: tuple[int, ...]
    dtype: torch.dtype
    trained: bool


class TiedParameters:
    """The parameters of this rank's stages that other stages hold too; see the module's docstring.

    `stages`: the `Stage`s on this rank, or their bodies: modules with an `index`. `group`: the process group of the ranks that hold the
    other stages (with data parallelism those of the same place in it), None for one process. Parameters may be plain, or DTensors of FSDP2
    that are sharded alike on every rank of the group. Build it after sharding: it keeps the parameter objects. A collective.

    Raises FtcError where holders of one parameter differ in shard, dtype or in whether it is trained, or where their values differ (not
    compared on the meta device; `check_equal` does it later, and the first `reduce_gradients` does where nobody has).
    """

    def __init__(self, stages: Sequence[nn.Module], group: dist.ProcessGroup | None = None):
        self.group = group
        self.rank = dist.get_rank(group) if group is not None else 0
        self._stages = [getattr(stage, "body", stage) for stage in stages]
        self._parameters = [dict(body.named_parameters()) for body in self._stages]
        own = list(self._own())
        everyone = [holding for holdings in self._exchange(own) for holding in holdings]
        by_name: dict[str, list[Holding]] = {}
        for holding in everyone:
            by_name.setdefault(holding.name, []).append(holding)
        self.holders = {name: held for name, held in sorted(by_name.items()) if len(held) > 1}
        for name, held in self.holders.items():
            _check_alike(name, held)
        self._checked = False
        if not any(parameter.is_meta for parameter in self._shared_here()):
            self.check_equal()

    def _own(self) -> Iterator[Holding]:
        for position, (stage, parameters) in enumerate(zip(self._stages, self._parameters, strict=True)):
            for name, p in parameters.items():
                yield Holding(self.rank, stage.index, position, name, tuple(local(p).shape), p.dtype, p.requires_grad)

    def _exchange(self, value: object) -> list:
        """`value` of every rank of the group, in order of rank."""
        if self.group is None:
            return [value]
        values: list = [None] * dist.get_world_size(self.group)
        dist.all_gather_object(values, value, group=self.group)
        return values

    def _here(self, name: str) -> list[nn.Parameter]:
        """This rank's objects for a shared parameter, each once, in order of its stages."""
        found = [parameters[name] for parameters in self._parameters if name in parameters]
        return list({id(parameter): parameter for parameter in found}.values())

    def _shared_here(self) -> list[nn.Parameter]:
        return [parameter for name in self.holders for parameter in self._here(name)]

    def check_equal(self) -> None:
        """FtcError that names the first shared parameter whose holders differ in a bit. A collective; sends one number a parameter.

        Fake tensors, of a simulated run, have no bits and are not compared.
        """
        if any(isinstance(local(parameter), FakeTensor) for parameter in self._shared_here()):
            return
        prints = {name: [_print(p) for p in self._here(name)] for name in self.holders}
        everyone = self._exchange(prints)
        for name, held in self.holders.items():
            values = {value for prints in everyone for value in prints[name]}
            if len(values) > 1:
                where = ", ".join(f"{h.stage} on rank {h.rank}" for h in held)
                raise FtcError(
                    f"{name} is one parameter of the program, but its copies differ (stages {where}); give every stage the same initial weights, and "
                    "step all of them with the same optimizer"
                )
        self._checked = True

    @torch.no_grad()
    def reduce_gradients(self) -> None:
        """Give every holder of a shared parameter the sum of all holders' gradients, in place. A collective over the group.

        A holder without a gradient adds nothing and gets one. Call it once a step, after the last backward pass.
        """
        if not self._checked:
            self.check_equal()
        for bucket in self._buckets():
            sums = {name: self._local_sum(name) for name in bucket if self._here(name)}
            received = self._swap(bucket, sums)
            for name, own in sums.items():
                parts = {**received.get(name, {}), self.rank: own}
                total = _sum(parts[rank] for rank in sorted(parts))
                for parameter in self._here(name):
                    local(parameter.grad).copy_(total)

    def _buckets(self) -> Iterator[list[str]]:
        """The trained shared parameters in order of name, some at a time; the same on every rank."""
        bucket, size = [], 0
        for name, held in self.holders.items():
            if not held[0].trained:
                continue
            num_bytes = int(torch.Size(held[0].sizes).numel()) * held[0].dtype.itemsize
            if bucket and size + num_bytes > BUCKET_BYTES:
                yield bucket
                bucket, size = [], 0
            bucket.append(name)
            size += num_bytes
        if bucket:
            yield bucket

    def _local_sum(self, name: str) -> Tensor:
        """This rank's gradients of a shared parameter, added in order of its stages; those that are missing become zeros."""
        here = self._here(name)
        for parameter in here:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        return _sum(local(parameter.grad) for parameter in here).contiguous()

    def _swap(self, names: Iterable[str], sums: dict[str, Tensor]) -> dict[str, dict[int, Tensor]]:
        """What the other ranks' `sums` are: name -> rank -> tensor."""
        received: dict[str, dict[int, Tensor]] = {}
        operations = []
        for name in names:
            ranks = sorted({holding.rank for holding in self.holders[name]})
            if name not in sums:
                continue
            for rank in ranks:
                if rank != self.rank:
                    buffer = torch.empty_like(sums[name])
                    received.setdefault(name, {})[rank] = buffer
                    operations.append(dist.P2POp(dist.isend, sums[name], group=self.group, group_peer=rank))
                    operations.append(dist.P2POp(dist.irecv, buffer, group=self.group, group_peer=rank))
        for work in dist.batch_isend_irecv(operations) if operations else ():
            work.wait()
        return received

    def counted(self) -> list[set[str]]:
        """For each stage of this rank the names of the parameters whose norm this rank counts: all, but of a shared parameter one holder.

        The squares of a norm summed over these, on all ranks of the group, are those of the program's gradient.
        """
        counted: list[set[str]] = [set(parameters) for parameters in self._parameters]
        for name, held in self.holders.items():
            first = min(held, key=lambda h: (h.stage, h.rank, h.position))
            for holding in held:
                if holding.rank == self.rank and holding is not first:
                    counted[holding.position].discard(name)
        return counted

    def counted_parameters(self) -> list[nn.Parameter]:
        """The parameters that `counted` names."""
        return [parameters[name] for parameters, names in zip(self._parameters, self.counted(), strict=True) for name in parameters if name in names]


def _sum(tensors: Iterable[Tensor]) -> Tensor:
    """The tensors added one to the next."""
    first, *others = tensors
    total = first.clone()
    for tensor in others:
        total += tensor
    return total


def _check_alike(name: str, held: list[Holding]) -> None:
    for what in ("sizes", "dtype", "trained"):
        values = {getattr(holding, what) for holding in held}
        if len(values) > 1:
            told = ", ".join(f"{getattr(h, what)} on stage {h.stage} of rank {h.rank}" for h in held)
            raise FtcError(f"the holders of {name} differ in {what}: {told}; shard, cast and freeze all stages alike")


@torch.no_grad()
def _print(parameter: Tensor) -> int:
    """A number that tells tensors of the same shape apart: sum_i (2 i + 1) (b_i + c) modulo 2^64 over the words of their bits."""
    if parameter.is_meta:
        raise FtcFailure("a parameter that has no memory yet cannot be compared with its copies")
    flat = local(parameter).detach().contiguous().view(-1)
    words = flat.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.element_size()]).to(torch.int64)
    weights = torch.arange(1, 2 * len(words), 2, device=words.device) * 0x9E3779B97F4A7C1
    return int(((words + 0x51ED270B) * weights).sum())
