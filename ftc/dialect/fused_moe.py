"""`ftc::fused_moe`: `ftc::moe` made fast; same arguments, same gradients, one node in every graph.

What runs is chosen inside the kernel, where device and number of tokens are known:

    few tokens on CUDA                     the experts of each slot are gathered and multiplied as one batch: no size leaves the device
    CUDA with Triton                       `ftc.kernels.grouped_experts`
    CUDA without it, bfloat16              rows sorted by expert, PyTorch's grouped_mm
    CPU, float32 or float64, a compiler    `ftc.kernels.cpu_moe`: few tokens read the weights of their experts in place, many are sorted
    else                                   rows sorted by expert, one product for each expert that was hit

The gradient of a weight on the output needs no expert's result: d loss / d w[n, j] = <W_down^T grad_n, middle> + <grad_n, b_down>. The
backward makes the middle again from x, so that the forward keeps nothing.

Legend: N tokens, D model, E experts, K experts a token, F middle width, S rows that some expert computes (N * K without the dropped ones).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ftc.dialect.gated import ACTIVATIONS as GATES
from ftc.dialect.library import LIBRARY
from ftc.dialect.moe import ARGUMENTS, BACKWARD_ARGUMENTS, CLAMPED, check, middle, register
from ftc.kernels import cpu_moe, has_triton

# On CUDA up to this many rows are a batch of matrix-vector products: it reads each row's expert once, as a decode step must anyway.
MOST_GATHERED = 64

LIBRARY.define(f"fused_moe({ARGUMENTS}) -> Tensor")
LIBRARY.define(f"fused_moe_backward({BACKWARD_ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)")


# d loss / d gate for d loss / d act(gate).
BACKWARDS = {
    "silu": torch.ops.aten.silu_backward,
    "gelu": torch.ops.aten.gelu_backward,
    "gelu_tanh": lambda grad, gate: torch.ops.aten.gelu_backward(grad, gate, approximate="tanh"),
    "relu": lambda grad, gate: torch.where(gate > 0, grad, 0),
    "sigmoid": lambda grad, gate: torch.ops.aten.sigmoid_backward(grad, gate.sigmoid()),
    "relu2": lambda grad, gate: grad * 2 * gate.relu(),
    "identity": lambda grad, gate: grad,
}


def middle_backward(grad: Tensor, products: Tensor, gated: bool, activation: str, constants: list[float]) -> Tensor:
    """The gradient of `middle`'s argument. Not autograd's: under a dispatch mode an operator's kernel runs where nothing is recorded."""
    if not gated:
        return BACKWARDS[activation](grad, products)
    gate, up = products.chunk(2, -1)
    if activation != CLAMPED:
        return torch.cat([BACKWARDS[activation](grad * up, gate), grad * GATES[activation](gate)], -1)
    alpha, limit = constants
    low_gate, low_up = gate.clamp(max=limit), up.clamp(-limit, limit)
    share = torch.sigmoid(alpha * low_gate)
    by_gate = grad * (low_up + 1) * share * (1 + alpha * low_gate * (1 - share))
    return torch.cat([torch.where(gate <= limit, by_gate, 0), torch.where(up.abs() <= limit, grad * low_gate * share, 0)], -1)


@dataclass(frozen=True)
class Order:
    """Slots n * K + j in the order of their experts, those of no expert left out; the rows of expert e end at ends[e]."""

    slot_S: Tensor
    token_S: Tensor
    expert_S: Tensor
    ends: list[int]
    grouped: bool  # by PyTorch's grouped_mm, else by one product an expert

    @classmethod
    def of(cls, indices_NK: Tensor, num_experts: int, grouped: bool) -> "Order":
        expert = indices_NK.reshape(-1)
        expert = torch.where((expert < 0) | (expert > num_experts), num_experts, expert)
        ends = torch.bincount(expert, minlength=num_experts + 1).cumsum(0)[:num_experts].tolist()
        slot_S = expert.argsort(stable=True)[: ends[-1]]
        return cls(slot_S, slot_S // indices_NK.shape[1], expert[slot_S], ends, grouped)

    def spans(self):
        start = 0
        for expert, end in enumerate(self.ends):
            if end > start:
                yield expert, slice(start, end)
            start = end

    def offsets(self) -> Tensor:
        return torch.tensor(self.ends, dtype=torch.int32, device=self.slot_S.device)

    def product(self, rows_SI: Tensor, matrix_EIO: Tensor, bias_EO: Tensor | None = None) -> Tensor:
        """[S, O]: each row times the matrix of its expert, plus its bias."""
        if self.grouped:
            out = torch.nn.functional.grouped_mm(rows_SI, matrix_EIO, offs=self.offsets())
            return out if bias_EO is None else out + bias_EO[self.expert_S]
        out = rows_SI.new_empty(rows_SI.shape[0], matrix_EIO.shape[2])
        for expert, span in self.spans():
            if bias_EO is None:
                torch.mm(rows_SI[span], matrix_EIO[expert], out=out[span])
            else:
                torch.addmm(bias_EO[expert], rows_SI[span], matrix_EIO[expert], out=out[span])
        return out

    def outer(self, a_SI: Tensor, b_SO: Tensor) -> Tensor:
        """[E, I, O]: sum of a_s b_s^T over each expert's rows."""
        if self.grouped and a_SI.shape[0]:
            out = torch.nn.functional.grouped_mm(a_SI.t(), b_SO, offs=self.offsets())
            hit = {expert for expert, _ in self.spans()}
            for expert in set(range(len(self.ends))) - hit:
                out[expert].zero_()  # grouped_mm promises nothing about a group of no rows
            return out
        out = a_SI.new_zeros(len(self.ends), a_SI.shape[1], b_SO.shape[1])
        for expert, span in self.spans():
            torch.mm(a_SI[span].t(), b_SO[span], out=out[expert])
        return out

    def sums(self, rows_SO: Tensor) -> Tensor:
        """[E, O]: sum of each expert's rows, in at least float32."""
        wide = torch.promote_types(rows_SO.dtype, torch.float32)
        return rows_SO.new_zeros(len(self.ends), rows_SO.shape[1], dtype=wide).index_add_(0, self.expert_S, rows_SO.to(wide))

    def combine(self, rows_SD: Tensor, shape_NK: torch.Size) -> Tensor:
        """[N, D]: sum of each token's rows, in one order always (index_add has none on CUDA)."""
        full = rows_SD.new_zeros(shape_NK.numel(), rows_SD.shape[1])
        full[self.slot_S] = rows_SD
        return full.view(*shape_NK, rows_SD.shape[1]).sum(1)


def sorted_forward(x, indices, weights, gate_up, down, gate_up_bias, down_bias, activation, constants, weight_on_input, grouped=False) -> Tensor:
    """The rows sorted by expert; arguments as `ftc::moe`, `grouped`: by PyTorch's grouped_mm."""
    wide, gated = torch.promote_types(x.dtype, weights.dtype), gate_up.shape[1] != down.shape[2]
    order = Order.of(indices, down.shape[0], grouped)
    weight_S1 = weights.reshape(-1, 1)[order.slot_S]
    rows = (x[order.token_S] * weight_S1).to(x.dtype) if weight_on_input else x[order.token_S]
    rows = middle(order.product(rows, gate_up.transpose(1, 2), gate_up_bias), gated, activation, constants)
    rows = order.product(rows, down.transpose(1, 2), down_bias).to(wide)
    return order.combine(rows if weight_on_input else rows.mul_(weight_S1), indices.shape).to(x.dtype)


@torch.no_grad()
def sorted_backward(
    grad, x, indices, weights, gate_up, down, gate_up_bias, down_bias, activation, constants, weight_on_input, want, grouped=False
) -> tuple[Tensor, ...]:  # fmt: skip
    """Gradients of x, weights, gate_up, down and both biases, those that `want` names, the others empty."""
    wide, gated = torch.promote_types(x.dtype, weights.dtype), gate_up.shape[1] != down.shape[2]
    order = Order.of(indices, down.shape[0], grouped)
    weight_S1 = weights.reshape(-1, 1)[order.slot_S].to(wide)
    x_SD, grad_SD = x[order.token_S], grad[order.token_S]
    rows = (x_SD * weight_S1).to(x.dtype) if weight_on_input else x_SD
    by_middle = order.product(grad_SD, down)
    by_result = grad_SD if weight_on_input else (grad_SD * weight_S1).to(x.dtype)
    products = order.product(rows, gate_up.transpose(1, 2), gate_up_bias)
    mid = middle(products, gated, activation, constants)
    upstream = by_middle if weight_on_input else (by_middle * weight_S1).to(x.dtype)
    by_products = middle_backward(upstream, products, gated, activation, constants)
    by_rows = order.product(by_products, gate_up) if want[0] or (want[1] and weight_on_input) else None
    made = [
        lambda: order.combine((by_rows * weight_S1 if weight_on_input else by_rows).to(wide), indices.shape).to(x.dtype),
        lambda: _weight_gradient(order, weights, *((by_rows, x_SD) if weight_on_input else (by_middle, mid, grad_SD, down_bias))),
        lambda: order.outer(by_products, rows),
        lambda: order.outer(by_result, mid),
        lambda: order.sums(by_products).to(x.dtype),
        lambda: order.sums(by_result).to(x.dtype),
    ]
    return tuple(make() if w else grad.new_empty(0) for make, w in zip(made, want, strict=True))


def _weight_gradient(order: Order, weights: Tensor, a: Tensor, b: Tensor, grad_SD: Tensor | None = None, bias_ED: Tensor | None = None) -> Tensor:
    wide = torch.promote_types(torch.promote_types(a.dtype, weights.dtype), torch.float32)
    found_S = (a.to(wide) * b).sum(-1)
    if bias_ED is not None:
        found_S = found_S + (grad_SD.to(wide) * bias_ED[order.expert_S]).sum(-1)
    found = found_S.new_zeros(weights.numel())
    found[order.slot_S] = found_S
    return found.view(weights.shape).to(weights.dtype)


def gathered(x, indices, weights, gate_up, down, gate_up_bias, down_bias, activation, constants, weight_on_input) -> Tensor:
    """Every slot's expert gathered, the products one batch: nothing depends on how many rows an expert has. Arguments as `ftc::moe`."""
    wide, num_experts = torch.promote_types(x.dtype, weights.dtype), down.shape[0]
    expert_S, weight_S1 = indices.reshape(-1), weights.reshape(-1, 1)
    there_S1 = ((expert_S >= 0) & (expert_S < num_experts))[:, None]
    expert_S = expert_S.clamp(0, num_experts - 1)
    rows = x.repeat_interleave(indices.shape[1], 0)
    rows = (rows * weight_S1).to(x.dtype) if weight_on_input else rows
    rows = torch.bmm(gate_up[expert_S], rows[:, :, None])[:, :, 0]
    rows = rows if gate_up_bias is None else rows + gate_up_bias[expert_S]
    rows = middle(rows, gate_up.shape[1] != down.shape[2], activation, constants)
    rows = torch.bmm(down[expert_S], rows[:, :, None])[:, :, 0]
    rows = (rows if down_bias is None else rows + down_bias[expert_S]).to(wide)
    rows = torch.where(there_S1, rows if weight_on_input else rows * weight_S1, 0)
    return rows.view(*indices.shape, x.shape[1]).sum(1).to(x.dtype)


def _groupable(x: Tensor, gate_up: Tensor, down: Tensor) -> bool:
    """Whether grouped_mm takes these on CUDA: bfloat16, rows of whole 16 bytes."""
    return x.is_cuda and {t.dtype for t in (x, gate_up, down)} == {torch.bfloat16} and down.shape[1] % 8 == 0 and down.shape[2] % 8 == 0


def _backend(x: Tensor, indices: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, *biases: Tensor | None) -> tuple[Callable, Callable]:
    """The forward and backward that run for these tensors."""
    if cpu_moe.supported(x, indices, weights, gate_up, down, *biases):
        return cpu_moe.forward, cpu_moe.backward
    if x.is_cuda and has_triton():
        from ftc.kernels import grouped_experts

        if grouped_experts.supported(x, gate_up, down, weights):
            return grouped_experts.forward, grouped_experts.backward
    grouped = _groupable(x, gate_up, down)
    return (lambda *a: sorted_forward(*a, grouped=grouped)), (lambda *a: sorted_backward(*a, grouped=grouped))


def forward(
    x: Tensor, indices: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None, *, activation: str = "silu", constants: list[float] = (), weight_on_input: bool = False,
) -> Tensor:  # fmt: skip
    """`ftc::moe`'s definition by the fastest path for these tensors. Shapes, dtypes and errors as there; mutates nothing."""
    check(x, indices, weights, gate_up, down, activation, constants)
    for name, bias, matrix in (("gate_up_bias", gate_up_bias, gate_up), ("down_bias", down_bias, down)):
        if bias is not None and bias.shape != matrix.shape[:2]:
            raise ValueError(f"ftc::fused_moe: {name} is {list(bias.shape)}, its experts need {list(matrix.shape[:2])}")
    arguments = (x, indices, weights, gate_up, down, gate_up_bias, down_bias, activation, list(constants), weight_on_input)
    if x.is_cuda and indices.numel() <= MOST_GATHERED:
        return gathered(*arguments)
    if cpu_moe.few_supported(x, indices, weights, gate_up, down, gate_up_bias, down_bias):
        return cpu_moe.few(*arguments)
    return _backend(x, indices, weights, gate_up, down, gate_up_bias, down_bias)[0](*arguments)


def gradients(grad: Tensor, tensors: list[Tensor | None], indices: Tensor, options: dict, want: list[bool]) -> tuple[Tensor, ...]:
    """Gradients of `forward`, one by one those that `want` names, the others empty; `tensors`: x, weights, gate_up, down and both biases."""
    x, weights, *experts = tensors
    arguments = (grad, x, indices, weights, *experts, options["activation"], options["constants"], options["weight_on_input"], want)
    return _backend(x, indices, weights, *experts)[1](*arguments)


register("fused_moe", forward, gradients)
