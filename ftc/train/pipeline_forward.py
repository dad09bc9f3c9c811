"""Batches through the stages of a pipeline without gradients: for measuring on held-out text. The schedule is not asked."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ftc.train.pipeline_part import Cut, StagePart


class PipelinedForward:
    """Runs microbatches from stage to stage. Ranks call it with the same inputs; each goes on as soon as its stages have run.

    Inputs have the sizes of the training's, as what stages give each other has.
    """

    def __init__(self, cut: Cut, device: torch.device, group: dist.ProcessGroup):
        self.cut, self.device, self.group = cut, device, group
        self.rank = dist.get_rank(group)
        self._parts: dict[int, StagePart] = {part.index: part for part in cut.parts}

    @torch.no_grad()
    def next_token_nats(self, tokens_BT: Tensor, labels_BT: Tensor, position_ids_BT: Tensor | None) -> Tensor:
        """The summed cross-entropy of the next token over the labels that count, of a batch, on all ranks (a collective)."""
        nats = torch.zeros((), device=self.device)
        for inputs in self._microbatches({"tokens": tokens_BT, "labels": labels_BT, "position_ids": position_ids_BT}):
            crossing: tuple[Tensor, ...] = ()
            sent: list[dist.Work] = []
            for index, place in enumerate(self.cut.pipeline.ranks):
                if place != self.rank:
                    continue
                part = self._parts[index]
                if index and self.cut.pipeline.ranks[index - 1] != self.rank:
                    crossing = self._received(index - 1)
                with part.measuring():
                    result = part(*(crossing if index else ()), **inputs)
                if part.is_last:
                    nats += result.float()
                    continue
                crossing = result
                if self.cut.pipeline.ranks[index + 1] != self.rank:
                    sent += [dist.isend(t, group=self.group, group_dst=self.cut.pipeline.ranks[index + 1]) for t in crossing]
            for work in sent:
                work.wait()
        dist.all_reduce(nats, group=self.group)
        return nats

    def _microbatches(self, inputs: Mapping[str, Tensor | None]) -> Iterator[dict[str, Any]]:
        size = self.cut.pipeline.microbatch_size
        parts = {name: tensor.split(size) for name, tensor in inputs.items() if tensor is not None}
        for number in range(len(parts["tokens"])):
            yield {name: split[number] for name, split in parts.items()}

    def _received(self, index: int) -> tuple[Tensor, ...]:
        """What stage `index` gives the next, from the rank that it is on."""
        source = self.cut.pipeline.ranks[index]
        received = tuple(torch.empty(like.shape, dtype=like.dtype, device=self.device) for like in self.cut.shapes[index])
        for tensor in received:
            dist.recv(tensor, group=self.group, group_src=source)
        return received
