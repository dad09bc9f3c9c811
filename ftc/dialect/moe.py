"""`ftc::moe`: a mixture of experts behind its router (Shazeer et al. 2017, arXiv:1701.06538, equation 1), in canonical spelling.

    moe(x, i, w)_n = sum_j  w[n, j] f(x_n; expert i[n, j])          weight on the output: all families but one
    moe(x, i, w)_n = sum_j  f(w[n, j] x_n; expert i[n, j])          weight on the input: Llama 4

    f(x; e) = W_down[e] (act(g) * u) + b_down[e],   [g; u] = W_gate_up[e] x + b_gate_up[e]            gated experts
    f(x; e) = W_down[e]  act(g)      + b_down[e],        g = W_gate_up[e] x + b_gate_up[e]            plain experts

The router is not part of it: how experts are chosen and weighed stays in the graph. This operator is the definition, a loop over experts in plain
PyTorch, and what every kernel is tested against; `fuse-moe` puts `ftc::fused_moe` in its place, which has the same arguments and is fast. It is a
custom operator and not a composite one, because a loop inside a composite would be traced through.

Legend: N tokens, D model, E experts, K experts a token, F width of an expert's middle.
"""

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ftc.dialect.gated import ACTIVATIONS as GATES
from ftc.dialect.library import LIBRARY
from ftc.errors import nearest

ARGUMENTS = (
    "Tensor x, Tensor indices, Tensor weights, Tensor gate_up, Tensor down, Tensor? gate_up_bias=None, Tensor? down_bias=None, *, "
    "str activation='silu', float[] constants=[], bool weight_on_input=False"
)
# Gradients of x, weights, gate_up, down and both biases; those that `want` does not name are empty.
BACKWARD_ARGUMENTS = (
    "Tensor grad, Tensor x, Tensor indices, Tensor weights, Tensor gate_up, Tensor down, Tensor? gate_up_bias, Tensor? down_bias, "
    "str activation, float[] constants, bool weight_on_input, bool[] want"
)
LIBRARY.define(f"moe({ARGUMENTS}) -> Tensor")
LIBRARY.define(f"moe_backward({BACKWARD_ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)")

CLAMPED = "clamped_swish"


def clamped_swish(gate: Tensor, up: Tensor, alpha: float, limit: float) -> Tensor:
    """min(g, limit) sigmoid(alpha min(g, limit)) (clamp(u, -limit, limit) + 1): the gate of GPT-OSS (OpenAI 2025, model card)."""
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return gate * torch.sigmoid(alpha * gate) * (up + 1)


def middle(gate_up: Tensor, gated: bool, activation: str, constants: list[float]) -> Tensor:
    """What an expert multiplies by its last matrix: gate_up [..., 2F] (gate first) to [..., F], or [..., F] to itself where not gated."""
    if not gated:
        return GATES[activation](gate_up)
    gate, up = gate_up.chunk(2, -1)
    return clamped_swish(gate, up, *constants) if activation == CLAMPED else GATES[activation](gate) * up


def check(x: Tensor, indices: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, activation: str, constants: list[float]) -> bool:
    """Whether the experts are gated. ValueError for shapes that do not fit and for an activation that there is not."""

    def shapes() -> str:  # made only for an error: this runs in every decode step
        named = {"x": x, "indices": indices, "weights": weights, "gate_up": gate_up, "down": down}
        return ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in named.items())

    if x.dim() != 2 or indices.dim() != 2 or weights.dim() != 2 or gate_up.dim() != 3 or down.dim() != 3:
        raise ValueError(f"ftc::moe takes x [N, D], indices and weights [N, K], gate_up [E, 2F or F, D], down [E, D, F]; got {shapes()}")
    experts, width, middle_width = down.shape
    if gate_up.shape[0] != experts or gate_up.shape[2] != width or gate_up.shape[1] not in (middle_width, 2 * middle_width):
        raise ValueError(f"the experts of ftc::moe do not fit each other: {shapes()}; gate_up must be [{experts}, {middle_width} or twice, {width}]")
    if indices.shape != weights.shape or indices.shape[1] > experts or x.shape[0] != indices.shape[0] or x.shape[1] != width:
        raise ValueError(f"the routing of ftc::moe does not fit its {experts} experts of width {width}: {shapes()}")
    gated = gate_up.shape[1] != middle_width
    valid = [*GATES, *([CLAMPED] if gated else [])]
    if activation not in valid:
        raise ValueError(f"ftc::moe has no activation {activation!r}; {nearest(activation, valid)}")
    if len(constants) != (2 if activation == CLAMPED else 0):
        raise ValueError(f"ftc::moe: activation {activation!r} takes {2 if activation == CLAMPED else 0} constants, got {constants}")
    return gated


def definition(
    x: Tensor,
    indices: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    *,
    activation: str = "silu",
    constants: list[float] = (),
    weight_on_input: bool = False,
) -> Tensor:
    """The definition in plain PyTorch, differentiable in everything that floats.

    x [N, D]; indices [N, K] int64, the experts of each token, all different, where E stands for none (a token that was dropped); weights [N, K] of
    any floating dtype; gate_up [E, 2F, D], rows of the gate first (plain experts: [E, F, D]); down [E, D, F]; biases [E, 2F] and [E, D];
    `constants`: (alpha, limit) of "clamped_swish". Returns [N, D] in the dtype of x: each expert's result in that dtype, weighed and summed in
    the wider of it and the weights'. Mutates nothing. ValueError for shapes and names that do not fit.
    """
    gated = check(x, indices, weights, gate_up, down, activation, constants)
    wide = torch.promote_types(x.dtype, weights.dtype)
    out = x.new_zeros(x.shape, dtype=wide)
    for expert in range(down.shape[0]):
        token, slot = torch.where(indices == expert)
        weight = weights[token, slot, None]
        rows = (x[token] * weight).to(x.dtype) if weight_on_input else x[token]
        rows = torch.nn.functional.linear(rows, gate_up[expert], None if gate_up_bias is None else gate_up_bias[expert])
        rows = middle(rows, gated, activation, constants)
        rows = torch.nn.functional.linear(rows, down[expert], None if down_bias is None else down_bias[expert])
        out = out.index_add(0, token, rows.to(wide) if weight_on_input else rows * weight.to(wide))
    return out.to(x.dtype)


@contextlib.contextmanager
def _autograd_within() -> Iterator[None]:
    """Autograd inside an operator's kernel, where a mode (a counter of FLOPs, say) that called the kernel has turned it off."""
    with contextlib.ExitStack() as stack:
        for key in (torch._C.DispatchKey.AutogradFunctionality, torch._C.DispatchKey.AutogradOther, torch._C.DispatchKey.ADInplaceOrView):
            stack.enter_context(torch._C._SetExcludeDispatchKeyGuard(key, False))
        yield


def gradients(grad: Tensor, tensors: list[Tensor | None], indices: Tensor, options: dict, want: list[bool]) -> tuple[Tensor, ...]:
    """Gradients of `definition` by PyTorch's own autograd; `tensors`: x, weights, gate_up, down and both biases."""
    with torch.enable_grad(), _autograd_within():
        leaves = [None if t is None else t.detach().requires_grad_(w) for t, w in zip(tensors, want, strict=True)]
        x, weights, *rest = leaves
        out = definition(x, indices, weights, *rest, **options)
        wanted = [t for t, w in zip(leaves, want, strict=True) if w]
        found = iter(torch.autograd.grad(out, wanted, grad, allow_unused=True, materialize_grads=True) if wanted else ())
    return tuple(next(found) if w else grad.new_empty(0) for w in want)


def _is_plain(tensors: tuple[Tensor | None, ...]) -> bool:
    """Whether nobody listens below autograd: no mode (tracing, fakes, counters), no transform of functorch, no tensor of another kind."""
    if torch._C._len_torch_dispatch_stack() or torch._C._functorch.peek_interpreter_stack() is not None:
        return False
    return all(t is None or type(t) in (Tensor, torch.nn.Parameter) for t in tensors) and not torch._is_functional_tensor(tensors[0])


def register(name: str, forward: Callable, backward: Callable) -> None:
    """Register `ftc::{name}` and `ftc::{name}_backward`, defined with ARGUMENTS and BACKWARD_ARGUMENTS, with their fakes and gradient.

    `forward` has the arguments of `definition`, `backward` those of `gradients`; neither is traced or differentiated through."""
    operator, operator_backward = getattr(torch.ops.ftc, name), getattr(torch.ops.ftc, f"{name}_backward")

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, indices, weights, gate_up, down, gate_up_bias, down_bias, activation, constants, weight_on_input):
            ctx.save_for_backward(x, indices, weights, gate_up, down, gate_up_bias, down_bias)
            ctx.options = (activation, constants, weight_on_input)
            with torch._C._AutoDispatchBelowAutograd():
                return operator(
                    x, indices, weights, gate_up, down, gate_up_bias, down_bias,
                    activation=activation, constants=constants, weight_on_input=weight_on_input,
                )  # fmt: skip

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, grad):
            want = [ctx.needs_input_grad[i] for i in (0, 2, 3, 4, 5, 6)]
            found = operator_backward(grad, *ctx.saved_tensors, *ctx.options, want)
            x, weights, gate_up, down, gate_up_bias, down_bias = (g if w else None for g, w in zip(found, want, strict=True))
            return x, None, weights, gate_up, down, gate_up_bias, down_bias, None, None, None

    def plain(*tensors, activation="silu", constants=(), weight_on_input=False):
        if not torch.is_grad_enabled():
            return forward(*tensors, activation=activation, constants=constants, weight_on_input=weight_on_input)
        with torch.no_grad():
            return forward(*tensors, activation=activation, constants=constants, weight_on_input=weight_on_input)

    def differentiable(
        x, indices, weights, gate_up, down, gate_up_bias=None, down_bias=None, *, activation="silu", constants=(), weight_on_input=False
    ):
        tensors = (x, indices, weights, gate_up, down, gate_up_bias, down_bias)
        if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
            return Function.apply(*tensors, activation, list(constants), weight_on_input)
        if _is_plain(tensors):  # a second round through the dispatcher costs a decode step 12 us
            return plain(*tensors, activation=activation, constants=constants, weight_on_input=weight_on_input)
        with torch._C._AutoDispatchBelowAutograd():
            return operator(*tensors, activation=activation, constants=list(constants), weight_on_input=weight_on_input)

    def plain_backward(grad, x, indices, weights, gate_up, down, gate_up_bias, down_bias, activation, constants, weight_on_input, want):
        options = {"activation": activation, "constants": list(constants), "weight_on_input": weight_on_input}
        return backward(grad, [x, weights, gate_up, down, gate_up_bias, down_bias], indices, options, want)

    def fake(x, indices, weights, gate_up, down, *biases, activation="silu", constants=(), **_):
        check(x, indices, weights, gate_up, down, activation, list(constants))
        return x.new_empty(x.shape)

    def fake_backward(grad, x, indices, weights, gate_up, down, gate_up_bias, down_bias, activation, constants, weight_on_input, want):
        tensors = (x, weights, gate_up, down, gate_up_bias, down_bias)
        return tuple(t.new_empty(t.shape) if w else grad.new_empty(0) for t, w in zip(tensors, want, strict=True))

    LIBRARY.impl(name, plain, "CompositeExplicitAutograd")
    LIBRARY.impl(name, differentiable, "Autograd")
    LIBRARY.impl(f"{name}_backward", plain_backward, "CompositeExplicitAutograd")
    torch.library.register_fake(f"ftc::{name}", fake)
    torch.library.register_fake(f"ftc::{name}_backward", fake_backward)


register("moe", definition, gradients)
