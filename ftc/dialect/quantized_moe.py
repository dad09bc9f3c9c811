"""`ftc::quantized_moe`: `ftc::moe` (see there) whose experts' matrices are stored in 8 or 4 bits, as `ftc.dialect.quantized_linear` describes.

A loop over the experts that some token chose: what nobody chose is not dequantised. Custom and not composite, because such a loop cannot be traced.
Gradients go to x, the weights of the choice and the biases.
"""

import torch
from torch import Tensor

from ftc.dialect.library import LIBRARY
from ftc.dialect.moe import _autograd_within, check, middle
from ftc.dialect.quantized_linear import linear

LIBRARY.define(
    "quantized_moe(Tensor x, Tensor indices, Tensor weights, Tensor gate_up, Tensor gate_up_scale, Tensor? gate_up_zero, Tensor down, Tensor down_scale, "
    "Tensor? down_zero, Tensor? gate_up_bias, Tensor? down_bias, str dtype, int[] gate_up_block, int[] down_block, int inner, str activations='none', *, "
    "str activation='silu', float[] constants=[], bool weight_on_input=False) -> Tensor"
)


def _gated(x: Tensor, indices: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, inner: int, activation: str, constants) -> bool:
    """Whether the experts are gated; ValueError for shapes that do not fit, as `ftc::moe`."""
    like = x.new_empty(1)
    return check(x, indices, weights, like.expand(*gate_up.shape[:2], x.shape[1]), like.expand(*down.shape[:2], inner), activation, list(constants))


def definition(
    x, indices, weights, gate_up, gate_up_scale, gate_up_zero, down, down_scale, down_zero, gate_up_bias, down_bias, dtype, gate_up_block, down_block,
    inner, activations="none", *, activation="silu", constants=(), weight_on_input=False,
) -> Tensor:  # fmt: skip
    """x [N, D]; indices and weights [N, K]; gate_up [E, 2F or F, D] and down [E, D, F] in `dtype` (int4: half the columns), scales and zeros
    [E, R, C] a number a block of one expert; `inner` F; `activations` "none" or "dynamic". The rest, and what is raised, as `ftc::moe`; returns
    [N, D] in the dtype of x and mutates nothing."""
    gated = _gated(x, indices, weights, gate_up, down, inner, activation, constants)
    wide = torch.promote_types(x.dtype, weights.dtype)
    out = x.new_zeros(x.shape, dtype=wide)
    for expert in indices.unique().tolist():
        if not 0 <= expert < down.shape[0]:
            continue  # a token that was dropped
        token, slot = torch.where(indices == expert)
        weight = weights[token, slot, None]
        rows = (x[token] * weight).to(x.dtype) if weight_on_input else x[token]
        rows = _product(rows, expert, gate_up, gate_up_scale, gate_up_zero, gate_up_bias, dtype, gate_up_block, x.shape[1], activations)
        rows = middle(rows, gated, activation, list(constants))
        rows = _product(rows, expert, down, down_scale, down_zero, down_bias, dtype, down_block, inner, activations)
        out = out.index_add(0, token, rows.to(wide) if weight_on_input else rows * weight.to(wide))
    return out.to(x.dtype)


def _product(rows, expert, data, scale, zero, bias, dtype, block, width, activations) -> Tensor:
    zero, bias = (None if t is None else t[expert] for t in (zero, bias))
    return linear(rows, data[expert], scale[expert], zero, bias, None, dtype, block, width, activations)


class _Straight(torch.autograd.Function):
    """The gradient of the definition, which is made again in the backward pass."""

    @staticmethod
    def forward(ctx, arguments, options, x, weights, gate_up_bias, down_bias):
        ctx.arguments, ctx.options = arguments, options
        ctx.save_for_backward(x, weights, gate_up_bias, down_bias)
        return _below(arguments, options)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        want = ctx.needs_input_grad[2:]
        with torch.enable_grad(), _autograd_within():
            leaves = [None if t is None else t.detach().requires_grad_(w) for t, w in zip(ctx.saved_tensors, want, strict=True)]
            arguments = list(ctx.arguments)
            arguments[0], arguments[2], arguments[9], arguments[10] = leaves
            wanted = [t for t, w in zip(leaves, want, strict=True) if w]
            out = definition(*arguments, **ctx.options)
            found = iter(torch.autograd.grad(out, wanted, grad, allow_unused=True, materialize_grads=True))
        return (None, None, *(next(found) if w else None for w in want))


def _below(arguments, options) -> Tensor:
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.ftc.quantized_moe(*arguments, **options)


def _differentiable(*arguments, **options) -> Tensor:
    leaves = tuple(arguments[i] for i in (0, 2, 9, 10))
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in leaves):
        return _Straight.apply(arguments, options, *leaves)
    return _below(arguments, options)


def _fake(x, indices, weights, gate_up, gate_up_scale, gate_up_zero, down, down_scale, down_zero, gate_up_bias, down_bias, dtype, gate_up_block,
          down_block, inner, activations="none", *, activation="silu", constants=(), weight_on_input=False):  # fmt: skip
    _gated(x, indices, weights, gate_up, down, inner, activation, constants)
    return x.new_empty(x.shape)


def _plain(*arguments, **options) -> Tensor:
    with torch.no_grad():
        return definition(*arguments, **options)


LIBRARY.impl("quantized_moe", _plain, "CompositeExplicitAutograd")
LIBRARY.impl("quantized_moe", _differentiable, "Autograd")
torch.library.register_fake("ftc::quantized_moe", _fake)
