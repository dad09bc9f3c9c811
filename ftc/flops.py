"""FLOPs of one operator call, by its operands' shapes: of matrix products and attention, 2 for a multiplication with its addition."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

aten = torch.ops.aten


def _attention(query, key, value, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_backward(grad, query, key, value, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return sdpa_backward_flop_count(grad, query, key, value)


# torch's table leaves out the kernels of the CPU.
_SHAPE_FORMULAS: dict[Any, Callable] = {
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


def operator_flops(func: Any, args: tuple, kwargs: dict, result: Any) -> int:
    """FLOPs of `func(*args, **kwargs)`, which gave `result`, as torch.utils.flop_counter has them; 0 for all that is no product."""
    packet = getattr(func, "_overloadpacket", None)
    if packet in _SHAPE_FORMULAS:
        shapes = [a.shape for a in args if isinstance(a, Tensor)]
        return int(_SHAPE_FORMULAS[packet](*shapes))
    formula = flop_registry.get(packet)
    return 0 if formula is None else int(formula(*args, **kwargs, out_val=result))
