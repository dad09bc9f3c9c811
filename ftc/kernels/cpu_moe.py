"""A mixture of experts on the CPU: `cpu_moe.cpp`, compiled when first asked for, where a C++ compiler is there.

Each expert's chain of products runs in the cache of one thread. The backward makes the forward's first product again rather than keep it:
2/11 of the arithmetic of both passes, for 32 MiB less at 2048 tokens, 8 of 64 experts and widths of 256. Keeping it was not timed.
"""

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

from ftc.kernels import cpp_library

SOURCE = Path(__file__).with_suffix(".cpp")
# `Activation` in the source.
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "sigmoid", "relu2", "identity", "clamped_swish")


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernel, or None where it is turned off or cannot be built (a warning then says why, once)."""
    loaded = cpp_library.load(SOURCE)
    if loaded is None:
        return None
    for function in (loaded.ftc_moe_forward, loaded.ftc_moe_few, loaded.ftc_moe_backward):
        function.restype = None
    loaded.ftc_moe_forward.argtypes = loaded.ftc_moe_few.argtypes = [ctypes.c_void_p] * 5 + [ctypes.c_int]
    loaded.ftc_moe_backward.argtypes = [ctypes.c_void_p] * 6 + [ctypes.c_int]
    return loaded


KINDS = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2}  # `kind` in the source
# Up to this many rows an expert, reading its matrices in place is faster than packing them: 0.6x the time at 1 token of 8 in 64 experts,
# 0.8x at 16 tokens, 1.1x at 32 (width 128, 2 threads).
FEW_ROWS = 3


def _here(x: Tensor, indices: Tensor, weights: Tensor, *experts: Tensor | None) -> bool:
    """Whether all are on the CPU, x and experts of one dtype, the weights not wider than what sums are made in, and the library is there."""
    if not (x.is_cpu and indices.is_cpu and weights.is_cpu):
        return False
    for t in experts:
        if t is not None and (t.dtype != x.dtype or not t.is_cpu):
            return False
    return (weights.dtype != torch.float64 or x.dtype == torch.float64) and library() is not None


def supported(x: Tensor, indices: Tensor, weights: Tensor, *experts: Tensor | None) -> bool:
    """Whether `forward` and `backward` compute this; `experts`: gate_up, down and biases. All in float32 or float64 on the CPU."""
    return x.dtype in (torch.float32, torch.float64) and _here(x, indices, weights, *experts)


def few_supported(x: Tensor, indices: Tensor, weights: Tensor, *experts: Tensor | None) -> bool:
    """Whether `few` computes this: at most FEW_ROWS rows an expert, all in one of KINDS on the CPU."""
    return indices.numel() <= FEW_ROWS * experts[0].shape[0] and x.dtype in KINDS and _here(x, indices, weights, *experts)


def _arguments(x, indices, weights, experts, activation, constants, weight_on_input):
    """The arguments that both functions share, and the tensors that must outlive the call."""
    gate_up, down = experts[:2]
    num_experts, width, middle = down.shape
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    weights = weights if weights.dtype == wide else weights.to(wide)
    tensors = [t if t is None or t.is_contiguous() else t.contiguous() for t in (x, weights, *experts)]
    indices = indices if indices.dtype == torch.int64 and indices.is_contiguous() else indices.to(torch.int64).contiguous()
    inputs = (ctypes.c_void_p * 6)(*(None if t is None else t.data_ptr() for t in tensors))
    gated = gate_up.shape[1] != middle
    sizes = (ctypes.c_int64 * 9)(
        x.shape[0], width, num_experts, indices.shape[1], middle, gated, weight_on_input, ACTIVATIONS.index(activation), torch.get_num_threads()
    )  # fmt: skip
    numbers = (ctypes.c_double * 2)(*(constants or (0.0, 0.0)))
    return (inputs, indices.data_ptr(), sizes, numbers), (tensors, indices)


def forward(
    x: Tensor, indices: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, gate_up_bias: Tensor | None, down_bias: Tensor | None,
    activation: str, constants: list[float], weight_on_input: bool,
) -> Tensor:  # fmt: skip
    """`ftc::moe` of arguments that are `supported`: [N, D] in the dtype of x. Mutates nothing."""
    arguments, alive = _arguments(x, indices, weights, (gate_up, down, gate_up_bias, down_bias), activation, constants, weight_on_input)
    out = torch.empty(x.shape, dtype=x.dtype)
    library().ftc_moe_forward(*arguments, out.data_ptr(), x.dtype == torch.float64)
    del alive
    return out


def few(
    x: Tensor, indices: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, gate_up_bias: Tensor | None, down_bias: Tensor | None,
    activation: str, constants: list[float], weight_on_input: bool,
) -> Tensor:  # fmt: skip
    """`ftc::moe` of arguments that are `few_supported`, the weights read in place: [N, D] in the dtype of x, summed in at least float32."""
    arguments, alive = _arguments(x, indices, weights, (gate_up, down, gate_up_bias, down_bias), activation, constants, weight_on_input)
    out = torch.empty(x.shape, dtype=x.dtype)
    library().ftc_moe_few(*arguments, out.data_ptr(), KINDS[x.dtype])
    del alive
    return out


def backward(
    grad: Tensor, x: Tensor, indices: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, gate_up_bias: Tensor | None,
    down_bias: Tensor | None, activation: str, constants: list[float], weight_on_input: bool, want: list[bool],
) -> tuple[Tensor, ...]:  # fmt: skip
    """Gradients of x, weights, gate_up, down and both biases, those that `want` names, the others empty. Mutates nothing."""
    experts = (gate_up, down, gate_up_bias, down_bias)
    arguments, alive = _arguments(x, indices, weights, experts, activation, constants, weight_on_input)
    made = [torch.empty(t.shape, dtype=x.dtype) if w else None for t, w in zip((x, weights, *experts), want, strict=True)]
    grad = grad.contiguous()
    outputs = (ctypes.c_void_p * 6)(*(None if t is None else t.data_ptr() for t in made))
    library().ftc_moe_backward(*arguments, grad.data_ptr(), outputs, x.dtype == torch.float64)
    del alive
    if made[1] is not None:
        made[1] = made[1].to(weights.dtype)
    return tuple(grad.new_empty(0) if t is None else t for t in made)
