"""Activation checkpointing: regions whose activations are computed again in the backward pass instead of kept."""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from ftc.errors import FtcError

aten = torch.ops.aten
# What `selective` with option "op" keeps: the products and the attention, where the time goes.
_KEPT = {
    aten.mm.default,
    aten.addmm.default,
    aten.bmm.default,
    aten._grouped_mm.default,
    aten._scaled_mm.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
    torch.ops._c10d_functional.reduce_scatter_tensor.default,
    torch.ops._c10d_functional.all_reduce.default,
    torch.ops._c10d_functional.all_gather_into_tensor.default,
}


def recompute_activations(regions: Sequence[nn.Module], config: Any, compiled: bool) -> None:
    """Make regions recompute as torchtitan's section `activation_checkpoint` says, in place.

    `full`: every region keeps its inputs only. `selective` with a number n: every n-th region does; with "op": every
    region keeps its products and attention. `memory_budget`: the compiler decides. Raises FtcError for a combination
    that would be ignored.
    """
    mode, option = config.mode, config.selective_ac_option
    if mode == "none":
        return
    if mode == "memory_budget":
        if not compiled:
            raise FtcError('activation_checkpoint.mode "memory_budget" is the compiler\'s: set compile.enable = true')
        torch._functorch.config.activation_memory_budget = config.memory_budget
        return
    if mode == "full":
        chosen, contexts = list(regions), None
    elif option == "op":
        if compiled:
            raise FtcError(
                'activation_checkpoint "selective" by "op" does not see into compiled regions; use a number (every n-th '
                'region), mode = "full", or mode = "memory_budget"'
            )
        chosen, contexts = list(regions), functools.partial(create_selective_checkpoint_contexts, _policy)
    else:
        chosen, contexts = list(regions)[:: _every(option)], None
    for region in chosen:
        region.around = functools.partial(_recomputed, contexts)


def _every(option: Any) -> int:
    if str(option).isdigit() and int(option) > 0:
        return int(option)
    raise FtcError(f'activation_checkpoint.selective_ac_option is {option!r}; it must be "op" or a number of 1 or more')


def _policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operator in _KEPT else CheckpointPolicy.PREFER_RECOMPUTE


def _recomputed(contexts: Any, run: Any, args: tuple, kwargs: dict) -> Any:
    if not torch.is_grad_enabled():
        return run(*args, **kwargs)
    options = {} if contexts is None else {"context_fn": contexts}
    return checkpoint(run, *args, use_reentrant=False, **options, **kwargs)
