"""One rank of a pipeline without the others: its stages, and its schedule's actions, for a simulated run."""

from typing import Any, TypeVar

import torch
from torch import Tensor

from ftc.pipeline import TiedParameters
from ftc.plan.roofline import Machine
from ftc.train.ledger import num_bytes
from ftc.train.pipeline import build_cut, build_schedule, divide_by
from ftc.train.pipeline_step import PipelinedSteps

T = TypeVar("T")

# Where a run measures its regions, a simulated one models them: only what they cost beside each other counts.
_MACHINES = {"cuda": Machine(flops=400e12, bandwidth=2.5e12, launch=5e-6), "cpu": Machine(flops=1e11, bandwidth=2e10, launch=1e-5)}


def simulated_pipelining(model: Any, parallel_dims: Any, job_config: Any, device: torch.device, *rest: Any) -> tuple[Any, list[Any], bool, bool]:
    """ftc.train.pipeline.pipelining, where no other rank answers: stages are cut by modelled costs."""
    machine = _MACHINES.get(device.type, _MACHINES["cuda"])
    cut = build_cut(model, parallel_dims, job_config, device, lambda pipeline: divide_by(model, pipeline, job_config, torch.device("cpu"), machine))
    schedule = build_schedule(cut, torch.device("cpu") if device.type == "cpu" else device, parallel_dims.get_mesh("pp").get_group())
    held = {part.index for part in cut.parts}
    return schedule, cut.parts, 0 in held, cut.pipeline.num_stages - 1 in held


class SimulatedSteps(PipelinedSteps):
    """The steps of a rank that hears of no other. `activation_bytes`: most that the schedule held between forward and backward passes."""

    def __init__(self, trainer: Any):
        super().__init__(trainer)
        self.activation_bytes, self._before = 0, 0
        backward = self.schedule.backward

        def counted(*args: Any, **kwargs: Any) -> None:
            gradients = num_bytes(p.grad for part in self.parts for p in part.parameters())
            self.activation_bytes = max(self.activation_bytes, trainer.ledger.current_bytes - self._before - gradients)
            backward(*args, **kwargs)

        self.schedule.backward = counted

    def forward_backward(self, input_dict: Any, labels: Tensor, global_valid_tokens: Tensor) -> Tensor:
        """The run's; what is there before is no activation."""
        self._before = self.trainer.ledger.current_bytes - num_bytes(p.grad for part in self.parts for p in part.parameters())
        return super().forward_backward(input_dict, labels, global_valid_tokens)

    def tie(self) -> TiedParameters:
        """Of this rank's stages alone."""
        return TiedParameters([part.stage for part in self.parts], None)

    def told(self, value: T) -> list[T]:
        return [value]
