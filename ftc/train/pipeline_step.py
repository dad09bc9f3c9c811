"""What a trainer does differently where stages of its model lie on several ranks: a schedule runs each batch, gradients that stages
share are summed, the norm is that of all stages, and what one stage knows is told to all.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.distributed_c10d import _resolve_process_group

from ftc.errors import FtcError, FtcFailure
from ftc.parallel.weights import bound_shards, full
from ftc.pipeline import TiedParameters
from ftc.train.pipeline_part import Cut

T = TypeVar("T")


class PipelinedSteps:
    """One rank's part of the pipeline of a trainer, which it tells to clip nothing: the norm of one rank's stages is not the model's."""

    def __init__(self, trainer: Any):
        self.trainer, self.schedule, self.parts = trainer, trainer.pp_schedule, trainer.model_parts
        self.cut: Cut = self.parts[0].cut
        self.group = trainer.parallel_dims.get_mesh("pp").get_group()
        self.rank = dist.get_rank(self.group)
        self.tied = self.tie()
        self._counted = self._by_axis()
        self.norm = 0.0
        self.max_norm, trainer.job_config.training.max_norm = trainer.job_config.training.max_norm, float("inf")
        # Around the container's step, as loading a checkpoint steps each optimizer by itself, with gradients of zero, to make its state.
        self._step, trainer.optimizers.step = trainer.optimizers.step, self._step_all

    def tie(self) -> TiedParameters:
        """The weights that several stages of the pipeline hold."""
        return TiedParameters([part.stage for part in self.parts], self.group)

    def forward_backward(self, input_dict: Mapping[str, Tensor], labels: Tensor, global_valid_tokens: Tensor) -> Tensor:
        """Forward and backward of a batch, int64 [B, T], the same on all ranks of the pipeline; gradients are added up. Returns the
        batch's share of the step's mean loss, a scalar, on all of them."""
        for part in self.parts:
            part.num_labels, part.losses_seen = global_valid_tokens, []
        inputs = {"tokens" if name == "input" else name: tensor for name, tensor in input_dict.items()}
        losses: list[Tensor] = []
        has_last = any(part.is_last for part in self.parts)
        with self.trainer.train_context():
            last = {"target": labels, "losses": losses} if has_last else {}
            self.schedule.step(**(inputs | {"labels": labels}), **last, return_outputs=False)
        own = sum((loss.detach().float() for loss in losses), torch.zeros((), device=self.trainer.device))
        return self.summed(own)

    def summed(self, value: Tensor) -> Tensor:
        """The sum of a tensor over the ranks of the pipeline, in place."""
        dist.all_reduce(value, group=self.group)
        return value

    def told(self, value: T) -> list[T]:
        """A value of each rank of the pipeline, on all of them."""
        values: list[Any] = [None] * dist.get_world_size(self.group)
        dist.all_gather_object(values, value, group=self.group)
        return values

    def together(self, action: Callable[[], None]) -> None:
        """Run `action` on all ranks; where it ends in an error of ours on one, that error is raised on all, and none waits for it."""
        error = None
        try:
            action()
        except (FtcError, FtcFailure) as raised:
            error = raised
        for said in self.told(error):
            if said is not None:
                raise said

    @property
    def is_mirrored(self) -> bool:
        """Whether each stage is on two ranks, one for each direction."""
        return self.cut.pipeline.is_mirrored

    def in_order(self, named: Mapping[str, T]) -> dict[str, T]:
        """What is named after modules inside of regions, in the order of the model's regions."""
        places = [f"{region.name}." for region in self.cut.model.body.regions]
        return dict(sorted(named.items(), key=lambda item: next((i for i, place in enumerate(places) if f"{item[0]}.".startswith(place)), len(places))))

    def loss_parts(self) -> dict[str, Tensor]:
        """Of a loss of several parts each, the mean over the microbatches of the last batch; on all ranks of the pipeline."""
        seen = [parts for part in self.parts for parts in part.losses_seen]
        own = {name: float(torch.stack([parts[name].float() for parts in seen]).mean()) for name in (seen[0] if seen else ())}
        everyone = [parts for parts in self.told(own) if parts]
        return {name: torch.tensor(sum(parts[name] for parts in everyone) / len(everyone)) for name in (everyone[0] if everyone else ())}

    def _step_all(self, *args: Any, **kwargs: Any) -> Any:
        self._finish_gradients()
        return self._step(*args, **kwargs)

    @torch.no_grad()
    def _finish_gradients(self) -> None:
        """Sum the gradients of weights that several stages hold, and clip all by the norm of the whole model's."""
        self.tied.reduce_gradients()
        square = torch.zeros((), device=self.trainer.device)
        for axis, parameters in self._counted.items():
            own = full(nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])).to(square).square()
            if axis is not None:
                dist.all_reduce(own, group=_resolve_process_group(self.cut.model.body.bound[axis]))
            square += own
        norm = self.summed(square).sqrt()
        scale = (self.max_norm / (norm + 1e-6)).clamp(max=1.0)
        for gradient in self._gradients():
            gradient.mul_(scale.to(gradient.device))
        self.norm = float(norm)

    def _by_axis(self) -> dict[str | None, list[nn.Parameter]]:
        """The parameters that this rank counts in the norm, by the axis of ranks that they are divided over."""
        shards, found = bound_shards(self.cut.model.body), {}
        for part, names in zip(self.parts, self.tied.counted(), strict=True):
            for name, parameter in part.body.named_parameters():
                if parameter.requires_grad and name in names:
                    found.setdefault(shards[name].axis if name in shards else None, []).append(parameter)
        return found

    def _gradients(self) -> Iterator[Tensor]:
        """Of this rank's stages, each once."""
        held = {id(p): p.grad for part in self.parts for p in part.parameters() if p.grad is not None}
        yield from held.values()
