"""Stop before the optimizer step when a gradient is not finite, and say in which region it began."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ftc.errors import FtcFailure
from ftc.parallel.weights import local


class NonFiniteGuard:
    """Watches a trainer: after clipping and before the optimizer step all ranks agree whether every gradient is finite.

    Where one is not, the last microbatch runs once more, and the first region whose output is not finite is named, or else
    the last region (backward runs from the end) whose gradient is not. Costs a pass over the gradients and one flag a step.
    """

    def __init__(self, trainer: Any):
        self.trainer = trainer
        self._batch: dict[str, Any] = {}
        for optimizer in trainer.optimizers.optimizers[:1]:
            optimizer.register_step_pre_hook(self._check)

    def remember(self, batch: dict[str, Any]) -> None:
        """Keep the microbatch that is about to run."""
        self._batch = batch

    def _check(self, *_: Any) -> None:
        parts = self.trainer.model_parts
        gradients = [local(p.grad) for part in parts for p in part.parameters() if p.grad is not None]
        if not _any_bad(gradients):
            return
        where = _first_bad_region(self.trainer, self._batch)
        step = self.trainer.step
        raise FtcFailure(
            f"at step {step} the gradient is not finite; it began {where}. The weights are those of step {step - 1}: lower "
            "optimizer.lr, or raise lr_scheduler.warmup_steps, and continue from the last checkpoint"
        )


def _any_bad(gradients: list[Tensor]) -> bool:
    """Whether any rank has a gradient that is not finite. A sum of squares overflows only where a clip would have, too."""
    norms = torch._foreach_norm([g for g in gradients if g.numel()])
    total = torch.stack([n.float() for n in norms]).sum() if norms else torch.zeros(())
    bad = (~torch.isfinite(total)).float()
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(bad, op=dist.ReduceOp.MAX)
    return bool(bad > 0)


def _first_bad_region(trainer: Any, batch: dict[str, Any]) -> str:
    """Where the last microbatch, run again, first leaves the finite numbers; in words."""
    body, found, hooks = trainer.model_parts[0].body, [], []

    def look(name: str) -> Any:
        def hook(module: nn.Module, args: tuple, output: Any) -> None:
            tensors = [t for t in torch.utils._pytree.tree_leaves(output) if isinstance(t, Tensor)]
            if not found and any(t.is_floating_point() and not bool(torch.isfinite(t).all()) for t in tensors):
                found.append(name)

        return hook

    for region in body.regions:
        hooks.append(region.register_forward_hook(look(region.name)))
    trainer.run_again(batch)
    for hook in hooks:
        hook.remove()
    if found:
        return f"in the output of region {found[0]}"
    for region in reversed(body.regions):
        gradients = [local(p.grad) for p in region.parameters() if p.grad is not None]
        if any(not bool(torch.isfinite(g).all()) for g in gradients):
            return f"in the gradients of region {region.name}"
    return "in the embedding, the head or the loss"
