"""`ftc::moe` in Triton: gathers, activation and routing weights inside grouped products, nothing but the inputs kept for the backward pass.

Forward: an order of the slots (`expert_order`), then the kernels up, down and sum of `grouped_experts_forward`. Backward: the same order, the
middle of the experts found again, and the kernels of `grouped_experts_backward`. Nothing waits for the device and nothing is added atomically, so
that equal inputs give equal bits. Memory beside inputs and gradients, in elements: S (F + D) forward and S (3F + 1) or S (2F + D) backward, the
larger, where a form that gathers the tokens first and is differentiated by autograd holds about S (4F + 3D).

Legend: N tokens, K experts a token, S = N K slots, D model, F middle, E experts.
"""

import torch
from torch import Tensor

from ftc.kernels import grouped_experts_backward as backward_kernels
from ftc.kernels import grouped_experts_forward as forward_kernels
from ftc.kernels.expert_order import Order, expert_order
from ftc.kernels.grouped_product import Tiles, choose_tiles

FLOATS = (torch.bfloat16, torch.float16, torch.float32)


def supported(x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor) -> bool:
    """Whether the kernels compute this: tokens and experts of one dtype of FLOATS, weights of any of them, row numbers that fit 32 bits."""
    one = x.dtype == gate_up.dtype == down.dtype
    rows = max(weights.numel(), gate_up.shape[0] * gate_up.shape[1], down.shape[0] * down.shape[1])
    return one and x.dtype in FLOATS and weights.dtype in FLOATS and rows < 2**31


def forward(
    x: Tensor, indices: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, gate_up_bias: Tensor | None, down_bias: Tensor | None,
    activation: str, constants: list[float], weight_on_input: bool, tiles: Tiles | None = None,
) -> Tensor:  # fmt: skip
    """[N, D] in the dtype of x; arguments as in `ftc.dialect.moe.definition`, `tiles` overrides what is chosen from the shapes.

    Sums over depth and over a token's experts are in float32. Mutates nothing; operands that are not contiguous are copied.
    """
    if 0 in (x.numel(), indices.numel(), down.numel()):
        return torch.zeros_like(x)
    x, indices, weights, gate_up, down, gate_up_bias, down_bias = _contiguous(x, indices, weights, gate_up, down, gate_up_bias, down_bias)
    tiles, order = _prepare(x, indices, down, tiles)
    width = down.shape[2]
    h = forward_kernels.up(x, order, weights, gate_up, gate_up_bias, activation, constants, weight_on_input, width, tiles.up)
    y = forward_kernels.slots(h, order, down, down_bias, True, tiles.down)
    return forward_kernels.sum_slots(y, indices, None if weight_on_input else weights, down.shape[0], x.dtype)


def backward(
    grad: Tensor, x: Tensor, indices: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, gate_up_bias: Tensor | None,
    down_bias: Tensor | None, activation: str, constants: list[float], weight_on_input: bool, want: list[bool], tiles: Tiles | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Gradients of x, weights, gate_up, down and both biases for grad [N, D], each in the dtype of what it belongs to.

    `want` says which of the six; the others are empty. Mutates nothing.
    """
    inputs = (x, weights, gate_up, down, gate_up_bias, down_bias)
    if 0 in (x.numel(), indices.numel(), down.numel()):
        return tuple(torch.zeros_like(t) if w else grad.new_empty(0) for t, w in zip(inputs, want, strict=True))
    grad, x, indices, weights, gate_up, down, gate_up_bias, down_bias = _contiguous(grad, *inputs[:1], indices, *inputs[1:])
    tiles, order = _prepare(x, indices, down, tiles)
    want_x, want_weights, want_gate_up, want_down, want_gate_up_bias, want_down_bias = want
    found = [grad.new_empty(0)] * 6
    fill = {"h": want_down, "pre": want_x or want_gate_up, "weight": want_weights, "bias": want_gate_up_bias}
    on_output = None if weight_on_input else weights
    if any(fill.values()):
        middle = backward_kernels.middle_of(
            grad, x, order, weights, gate_up, down, gate_up_bias, activation, constants, weight_on_input, fill, tiles.middle
        )  # fmt: skip
        if want_down:
            found[3] = backward_kernels.matrices(grad, middle.pop("h"), True, order, torch.empty_like(down), tiles.matrices)
        if want_weights:
            bias = None if weight_on_input else down_bias
            found[1] = backward_kernels.weights_gradient(middle["weight"], grad, bias, order, weights, down.shape[0], tiles.middle)
        if want_gate_up_bias:
            out = torch.empty_like(gate_up_bias)
            found[4] = backward_kernels.bias_gradient(middle["bias"], order.tile_bounds, order, None, False, out)
        if want_gate_up:
            found[2] = backward_kernels.matrices(middle["pre"], x, False, order, torch.empty_like(gate_up), tiles.matrices)
        if want_x:
            dx = forward_kernels.slots(middle.pop("pre"), order, gate_up, None, False, tiles.tokens)
            found[0] = forward_kernels.sum_slots(dx, indices, None, down.shape[0], x.dtype)
    if want_down_bias:
        found[5] = backward_kernels.bias_gradient(grad, order.bounds, order, on_output, True, torch.empty_like(down_bias))
    return tuple(found)


def _contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if tensor is None else tensor.contiguous() for tensor in tensors]


def _prepare(x: Tensor, indices: Tensor, down: Tensor, tiles: Tiles | None) -> tuple[Tiles, Order]:
    tiles = tiles or choose_tiles(x.dtype, indices.numel(), down.shape[0])
    return tiles, expert_order(indices, down.shape[0], tiles.rows)
