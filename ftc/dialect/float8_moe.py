"""`ftc::float8_moe`: `ftc::moe` with the products of its experts in float8; same arguments and a recipe of `ftc.float8.recipes`.

    x         cast once a token; what is kept for the backward pass, beside routing and parameters, is this cast
    g, u      products of the cast rows                                                          made again in the backward pass
    act(g) u  in the dtype of x, cast again for the product with W_down

Backward, with G the gradient of a token's result and w its weight on the output (on the input: 1 here, and dx and dw as written in brackets):

    dh  = w (G W_down)                                   dW_down    = sum (w G)^T h
    dg, du from dh                                       dW_gate_up = sum [dg; du]^T (w) x
    dx  = (w) [dg; du] W_gate_up                         dw         = <G W_down, h> + <G, b_down>   (<[dg; du] W_gate_up, x>)

Router, routing weights and activations stay in the dtype they have. What runs:

    "fine" on Hopper, 16 bits, sizes in whole blocks of 128     `ftc.kernels.fine_grouped`: one launch a product, nothing waits for the device
    everything else                                             `definition`: the products of `ftc.float8.fine_experts`, expert by expert, rows sorted by
                                                                expert; on CUDA (torch._scaled_mm) the counts of rows are read back once a pass

Legend: N tokens, D model, E experts, K experts a token, F width of an expert's middle, S rows that some expert computes.
"""

import torch
from torch import Tensor

from ftc.dialect.fused_moe import Order, middle_backward
from ftc.dialect.library import LIBRARY
from ftc.dialect.moe import ARGUMENTS, check, middle
from ftc.float8.fine_experts import FineForm, Rows, ScaledForm, form_of
from ftc.float8.recipes import FINE
from ftc.kernels import has_triton

LIBRARY.define(f"float8_moe({ARGUMENTS}, str recipe='rowwise') -> Tensor")
# The result, and the cast of x: values and scales.
LIBRARY.define(f"float8_moe_forward({ARGUMENTS}, str recipe='rowwise') -> (Tensor, Tensor, Tensor)", tags=(torch.Tag.pt2_compliant_tag,))
# Gradients of x, weights, gate_up, down and both biases; those that `want` does not name are empty.
LIBRARY.define(
    "float8_moe_backward(Tensor grad, Tensor values, Tensor scales, Tensor indices, Tensor weights, Tensor gate_up, Tensor down, "
    "Tensor? gate_up_bias, Tensor? down_bias, str activation, float[] constants, bool weight_on_input, str recipe, bool[] want) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _bias(bias: Tensor | None, expert: int) -> Tensor | None:
    return None if bias is None else bias[expert]


def definition(
    x: Tensor, indices: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None, *, activation: str = "silu", constants: list[float] = (), weight_on_input: bool = False, recipe: str = "rowwise",
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(out [N, D] in the dtype of x, values and scales of x cast); arguments as `ftc.dialect.moe.definition`. Mutates nothing.

    ValueError for shapes and names that do not fit, FtcError for a recipe that there is not and, on the CPU, for numbers that are not finite.
    """
    gated, form = check(x, indices, weights, gate_up, down, activation, list(constants)), form_of(recipe)
    order, wide = Order.of(indices, down.shape[0], False), torch.promote_types(x.dtype, weights.dtype)
    cast, weight_S = form.cast_tokens(x, "x"), weights.reshape(-1)[order.slot_S]
    out = x.new_zeros(order.slot_S.shape[0], x.shape[1], dtype=wide)
    for expert, span in order.spans():
        rows = cast.take(order.token_S[span])
        rows = rows.times(weight_S[span]) if weight_on_input else rows
        rows = form.forward(rows, gate_up[expert], _bias(gate_up_bias, expert), x.dtype)
        rows = middle(rows, gated, activation, constants)
        rows = form.forward(form.cast(rows, "the middle of an expert"), down[expert], _bias(down_bias, expert), x.dtype)
        out[span] = rows.to(wide) if weight_on_input else rows * weight_S[span, None].to(wide)
    return order.combine(out, indices.shape).to(x.dtype), cast.values, cast.scales.contiguous()


def gradients(
    grad: Tensor, values: Tensor, scales: Tensor, indices: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, gate_up_bias: Tensor | None,
    down_bias: Tensor | None, activation: str, constants: list[float], weight_on_input: bool, recipe: str, want: list[bool],
) -> tuple[Tensor, ...]:  # fmt: skip
    """Gradients of x, weights, gate_up, down and both biases for grad [N, D], from what `definition` returns beside its result."""
    form, cast = form_of(recipe), Rows(values, scales, gate_up.shape[2])
    order = Order.of(indices, down.shape[0], False)
    rows, wide = order.slot_S.shape[0], torch.promote_types(grad.dtype, weights.dtype)
    by_x = grad.new_zeros(rows, grad.shape[1], dtype=wide) if want[0] else None
    by_weight = grad.new_zeros(rows, dtype=torch.promote_types(wide, torch.float32)) if want[1] else None
    found = [torch.zeros_like(t) if w else None for t, w in zip((gate_up, down, gate_up_bias, down_bias), want[2:], strict=True)]
    for expert, span in order.spans():
        weight = weights.reshape(-1)[order.slot_S[span]]
        one = _Expert(form, cast.take(order.token_S[span]), grad[order.token_S[span]], weight, weight_on_input)
        one.run(gate_up[expert], down[expert], _bias(gate_up_bias, expert), _bias(down_bias, expert), activation, list(constants), want)
        for target, gradient in zip(found, (one.gate_up, one.down, one.gate_up_bias, one.down_bias), strict=True):
            if target is not None:
                target[expert] = gradient
        if want[0]:
            by_x[span] = one.x.to(wide)
        if want[1]:
            by_weight[span] = one.weight
    dx = order.combine(by_x, indices.shape).to(grad.dtype) if want[0] else None
    dw = None
    if want[1]:
        dw = by_weight.new_zeros(weights.numel()).index_copy_(0, order.slot_S, by_weight).view(weights.shape).to(weights.dtype)
    return tuple(grad.new_empty(0) if t is None else t for t in (dx, dw, *found))


class _Expert:
    """The backward pass of one expert's rows; attributes named for what they are the gradient of, None where not wanted."""

    def __init__(self, form: FineForm | ScaledForm, rows: Rows, grad: Tensor, weight: Tensor, weight_on_input: bool):
        self.form, self.read, self.grad, self.routing, self.on_input = form, rows, grad, weight, weight_on_input
        self.rows = rows.times(weight) if weight_on_input else rows
        self.x = self.weight = self.gate_up = self.down = self.gate_up_bias = self.down_bias = None

    def run(self, gate_up, down, gate_up_bias, down_bias, activation: str, constants: list[float], want: list[bool]) -> None:
        form, dtype, gated = self.form, self.grad.dtype, gate_up.shape[0] != down.shape[1]
        want_x, want_weight, want_gate_up, want_down, want_gate_up_bias, want_down_bias = want
        products = form.forward(self.rows, gate_up, gate_up_bias, dtype)
        h = middle(products, gated, activation, constants)
        weight = self.routing[:, None]
        grad = self.grad if self.on_input else (self.grad * weight).to(dtype)
        if want_down:
            self.down = form.outer(grad, h, down.dtype)
        if want_down_bias:
            self.down_bias = grad.sum(0, dtype=torch.promote_types(dtype, torch.float32)).to(down_bias.dtype)
        upstream = form.backward(form.cast_gradient(self.grad, "the gradient of the result"), down, dtype)
        if want_weight and not self.on_input:
            self.weight = _dot(upstream, h) + (0 if down_bias is None else _dot(self.grad, down_bias.expand_as(self.grad)))
        upstream = upstream if self.on_input else (upstream * weight).to(dtype)
        by_products = middle_backward(upstream, products, gated, activation, constants)
        if want_gate_up:
            self.gate_up = form.outer(by_products, self.rows, gate_up.dtype)
        if want_gate_up_bias:
            self.gate_up_bias = by_products.sum(0, dtype=torch.promote_types(dtype, torch.float32)).to(gate_up_bias.dtype)
        if want_x or (want_weight and self.on_input):
            by_rows = form.backward(form.cast_gradient(by_products, "the gradient of an expert's middle"), gate_up, dtype)
            self.x = by_rows * weight if self.on_input else by_rows
            if want_weight and self.on_input:
                self.weight = _dot(by_rows, form.read(self.read))


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Row by row, in at least float32."""
    wide = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    return (a.to(wide) * b.to(wide)).sum(-1)


class _Float8Moe(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, indices, weights, gate_up, down, gate_up_bias, down_bias, activation, constants, weight_on_input, recipe):
        out, values, scales = torch.ops.ftc.float8_moe_forward(
            x, indices, weights, gate_up, down, gate_up_bias, down_bias,
            activation=activation, constants=constants, weight_on_input=weight_on_input, recipe=recipe,
        )  # fmt: skip
        ctx.save_for_backward(values, scales, indices, weights, gate_up, down, gate_up_bias, down_bias)
        ctx.options = (activation, constants, weight_on_input, recipe)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        want = [ctx.needs_input_grad[i] for i in (0, 2, 3, 4, 5, 6)]
        found = torch.ops.ftc.float8_moe_backward(grad, *ctx.saved_tensors, *ctx.options, want)
        x, *rest = (g if w else None for g, w in zip(found, want, strict=True))
        return x, None, *rest, None, None, None, None


def _grouped(recipe: str, x: Tensor, indices: Tensor, gate_up: Tensor, down: Tensor) -> bool:
    """Whether `ftc.kernels.fine_grouped` computes this."""
    if recipe != FINE or not x.is_cuda or not has_triton():
        return False
    from ftc.kernels import fine_grouped

    return fine_grouped.supported(x, indices, gate_up, down)


def forward(
    x: Tensor, indices: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None, *, activation: str = "silu", constants: list[float] = (), weight_on_input: bool = False, recipe: str = "rowwise",
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`definition` by the fastest path for these tensors."""
    tensors = (x, indices, weights, gate_up, down, gate_up_bias, down_bias)
    if _grouped(recipe, x, indices, gate_up, down):
        from ftc.kernels import fine_grouped

        check(x, indices, weights, gate_up, down, activation, list(constants))
        return fine_grouped.forward(*tensors, activation, list(constants), weight_on_input)
    return definition(*tensors, activation=activation, constants=constants, weight_on_input=weight_on_input, recipe=recipe)


def backward(
    grad, values, scales, indices, weights, gate_up, down, gate_up_bias, down_bias, activation, constants, weight_on_input, recipe, want
) -> tuple[Tensor, ...]:  # fmt: skip
    """`gradients` by the fastest path for these tensors."""
    tensors, options = (grad, values, scales, indices, weights, gate_up, down, gate_up_bias, down_bias), (activation, list(constants), weight_on_input)
    if _grouped(recipe, grad, indices, gate_up, down):
        from ftc.kernels import fine_grouped

        return fine_grouped.backward(*tensors, *options, want)
    return gradients(*tensors, *options, recipe, want)


def _plain(*tensors, activation="silu", constants=(), weight_on_input=False, recipe="rowwise"):
    return forward(*tensors, activation=activation, constants=constants, weight_on_input=weight_on_input, recipe=recipe)[0]


def _differentiable(
    x, indices, weights, gate_up, down, gate_up_bias=None, down_bias=None, *, activation="silu", constants=(), weight_on_input=False, recipe="rowwise"
):
    tensors = (x, indices, weights, gate_up, down, gate_up_bias, down_bias)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        return _Float8Moe.apply(*tensors, activation, list(constants), weight_on_input, recipe)
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.ftc.float8_moe(
            *tensors, activation=activation, constants=list(constants), weight_on_input=weight_on_input, recipe=recipe
        )  # fmt: skip


def _fake(x, indices, weights, gate_up, down, *biases, activation="silu", constants=(), recipe="rowwise", **_):
    check(x, indices, weights, gate_up, down, activation, list(constants))
    form_of(recipe)
    return x.new_empty(x.shape)


def _forward_fake(x, *tensors, recipe="rowwise", **options):
    values = torch.ops.ftc.fine_tiles(x)[0] if recipe == FINE else x.new_empty(x.shape, dtype=torch.float8_e4m3fn)
    scales = x.new_empty(values.shape[1] // 128 if recipe == FINE else 1, x.shape[0], dtype=torch.float32)
    return _fake(x, *tensors, recipe=recipe, **options), values, scales


def _backward_fake(grad, values, scales, indices, weights, gate_up, down, gate_up_bias, down_bias, *options):
    tensors, want = (grad, weights, gate_up, down, gate_up_bias, down_bias), options[-1]
    return tuple(t.new_empty(t.shape) if w else grad.new_empty(0) for t, w in zip(tensors, want, strict=True))


LIBRARY.impl("float8_moe", _plain, "CompositeExplicitAutograd")
LIBRARY.impl("float8_moe", _differentiable, "Autograd")
LIBRARY.impl("float8_moe_forward", forward, "CompositeExplicitAutograd")
LIBRARY.impl("float8_moe_backward", backward, "CompositeExplicitAutograd")
torch.library.register_fake("ftc::float8_moe", _fake)
torch.library.register_fake("ftc::float8_moe_forward", _forward_fake)
torch.library.register_fake("ftc::float8_moe_backward", _backward_fake)
