"""Stop before the optimizer step when a gradient is not finite, and say in which region it began."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ftc.errors import FtcFailure
from ftc.float8.cast import watching
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
    """Where the last microbatch, run again, first leaves the finite numbers; in words. Of a pipeline, on all ranks the same."""
    regions = [region for part in trainer.model_parts for region in part.body.regions]
    found: list[str] = []
    hooks = [region.register_forward_hook(_looker(region.name, found)) for region in regions]
    with watching() as scales:  # of float8 products: what no scale fits
        trainer.run_again(batch)
    for hook in hooks:
        hook.remove()
    bad = [region.name for region in regions if any(not bool(torch.isfinite(local(p.grad)).all()) for p in region.parameters() if p.grad is not None)]
    outputs, gradients = [found[:1]], [bad[-1:]]
    if trainer.pipeline is not None:
        outputs, gradients = zip(*trainer.pipeline.told((found, bad)), strict=True)
        names = [region.name for region in trainer.pipeline.cut.model.body.regions]
        outputs, gradients = ([sorted({n for some in each for n in some}, key=names.index)] for each in (outputs, gradients))
    first = f" (the first operand that float8 has no scale for: {scales[0]})" if scales else ""
    if outputs[0]:
        return f"in the output of region {outputs[0][0]}{first}"
    if gradients[0]:
        return f"in the gradients of region {gradients[0][-1]}{first}"
    return f"in the embedding, the head or the loss{first}"


def _looker(name: str, found: list[str]) -> Any:
    """A hook that adds a region's name once its output is not finite."""

    def hook(module: nn.Module, args: tuple, output: Any) -> None:
        tensors = [t for t in torch.utils._pytree.tree_leaves(output) if isinstance(t, Tensor)]
        if name not in found and any(t.is_floating_point() and not bool(torch.isfinite(t).all()) for t in tensors):
            found.append(name)

    return hook
