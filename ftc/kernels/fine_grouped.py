"""`ftc::float8_moe` in fine-grained FP8 on Hopper: nothing waits for the device, every product of all experts is one launch.

The rows of an expert are filled up to whole tiles of 128, in the order of `expert_order`. A tile then belongs to one expert, so that its matrix is a
place in the stacked matrices (products along rows), and 128 rows are one block of the depth (products over rows, the gradients of matrices):

    rows_product     out[r]  = W[expert of r's tile] a[r]                  forward, gradients of rows
    depth_product    out[e]  = sum over the tiles of e of a_t b_t^T         gradients of the matrices

How many tiles there are is known on the device alone; as many as there can be are launched, those without an expert are skipped and hold nothing.
Rows that fill a tile up have scale 0.

Legend: N tokens, K experts a token, S = N K slots, T tiles, R = 128 T rows, E experts, D model, F middle, H = F or 2 F.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ftc.dialect.fused_moe import middle_backward
from ftc.dialect.moe import middle
from ftc.errors import FtcFailure
from ftc.float8.fine import BLOCK
from ftc.kernels import fine_quantise as quantise
from ftc.kernels.expert_order import expert_order
from ftc.kernels.fine_product import on_hopper


@dataclass(frozen=True)
class Products:
    """The two grouped products; arguments and results of `fine_product_hopper.rows_product` and `depth_product`."""

    rows: Callable[..., Tensor]
    depth: Callable[..., Tensor]


def hopper_products() -> Products:
    from ftc.kernels import fine_product_hopper

    return Products(fine_product_hopper.rows_product, fine_product_hopper.depth_product)


def supported(x: Tensor, indices: Tensor, gate_up: Tensor, down: Tensor) -> bool:
    """Whether the kernels compute this: Hopper, 16-bit tokens, whole blocks of 128 in every matrix, something to do."""
    whole = all(size % BLOCK == 0 and size > 0 for size in (*gate_up.shape[1:], *down.shape[1:]))
    return whole and x.dtype in (torch.bfloat16, torch.float16) and indices.numel() > 0 and on_hopper(x.device)


@dataclass(frozen=True)
class Layout:
    """Where slots stand in rows filled up to tiles of one expert."""

    expert_T: Tensor  # int32, E for tiles that hold nothing
    bounds: Tensor  # int32 [E + 1]: expert e has the tiles bounds[e] to bounds[e + 1]
    slot_R: Tensor  # slot of each row, 0 where it has none
    there_R: Tensor  # whether it has one
    row_S: Tensor  # row of each slot, 0 where it was dropped
    kept_S: Tensor  # whether it was not
    share: int

    @classmethod
    def of(cls, indices: Tensor, num_experts: int) -> "Layout":
        order = expert_order(indices.contiguous(), num_experts, BLOCK)
        slots, rows = indices.numel(), order.num_tiles * BLOCK
        sorted_S = torch.arange(slots, device=indices.device, dtype=torch.int32)
        expert_S = torch.searchsorted(order.bounds[1:], sorted_S, right=True)
        kept = expert_S < num_experts
        place = torch.where(kept, order.tile_bounds[expert_S] * BLOCK + sorted_S - order.bounds[expert_S], rows).long()
        slot_S = order.slot_S.long()
        slot_R = torch.full((rows + 1,), -1, device=indices.device).index_put_((place,), slot_S)[:rows]
        empty = lambda dtype: torch.zeros(slots, dtype=dtype, device=indices.device)  # noqa: E731
        row_S = empty(torch.int64).index_put_((slot_S,), torch.where(kept, place, 0))
        kept_S = empty(torch.bool).index_put_((slot_S,), kept)
        return cls(order.expert_T, order.tile_bounds, slot_R.clamp_min(0), slot_R >= 0, row_S, kept_S, indices.shape[1])

    @property
    def token_R(self) -> Tensor:
        return self.slot_R // self.share

    def gather(self, values: Tensor, scales: Tensor, weight_R: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Rows of each slot's token from cast tokens (values [N, P], scales [B, N]), times `weight_R` where given."""
        factor = self.there_R.float() if weight_R is None else self.there_R * weight_R.float()
        return values.view(torch.uint8)[self.token_R].view(values.dtype), (scales[:, self.token_R] * factor).contiguous()

    def rows(self, x: Tensor, weight_R: Tensor | None = None) -> Tensor:
        """[R, D]: rows of each slot's token from x [N, D], times `weight_R`, 0 where there is none."""
        rows = x[self.token_R]
        return torch.where(self.there_R[:, None], rows if weight_R is None else (rows * weight_R[:, None]).to(x.dtype), 0)

    def sums(self, rows: Tensor, weight_S: Tensor | None, dtype: torch.dtype) -> Tensor:
        """[N, D] in `dtype`: the sum of each token's rows, times `weight_S` where given; in at least float32."""
        wide = torch.promote_types(rows.dtype if weight_S is None else torch.promote_types(rows.dtype, weight_S.dtype), torch.float32)
        found = rows[self.row_S].to(wide) if weight_S is None else rows[self.row_S].to(wide) * weight_S[:, None].to(wide)
        return torch.where(self.kept_S[:, None], found, 0).view(-1, self.share, rows.shape[1]).sum(1).to(dtype)

    def by_expert(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        """[E, H] in `dtype`: the sum of each expert's rows, in float32 and in one order always."""
        num_experts = self.bounds.shape[0] - 1
        parts = rows.view(-1, BLOCK, rows.shape[1]).sum(1, dtype=torch.float32)
        parts = torch.where((self.expert_T < num_experts)[:, None], parts, 0)
        chosen = self.expert_T == torch.arange(num_experts, device=rows.device)[:, None]
        return (chosen.float() @ parts).to(dtype)

    def by_slot(self, values_R: Tensor, like: Tensor) -> Tensor:
        """Numbers of rows in the places of their slots, 0 where a slot was dropped; shape and dtype of the routing weights `like`."""
        return torch.where(self.kept_S, values_R[self.row_S], 0).view(like.shape).to(like.dtype)


CLOSE = 2e-2  # norm of a difference over norm, bfloat16; two FP8 forms that disagree are 4e-2 apart, a wrong one 1


def probe(device: torch.device) -> dict[str, float]:
    """A small mixture by these kernels and by the definition: name of result or gradient to the norm of the difference over the norm."""
    from ftc.dialect import float8_moe

    generator = torch.Generator(device).manual_seed(0)
    normal = lambda *shape: torch.randn(*shape, generator=generator, device=device, dtype=torch.float32)  # noqa: E731
    weights, indices = normal(300, 4).softmax(-1).topk(2, -1)
    indices[::7, 0] = 4  # dropped
    tensors = [normal(300, 256), weights, normal(4, 256, 256) / 16, normal(4, 256, 128) / 11, normal(4, 256), normal(4, 256)]
    tensors = [t if t is weights else t.to(torch.bfloat16) for t in tensors]
    grad, options = normal(300, 256).to(torch.bfloat16), ("silu", [], False)
    rest, want = (indices, *tensors[1:]), [True] * 6
    out, *cast = forward(tensors[0], *rest, *options, hopper_products())
    got = [out, *backward(grad, *cast, *rest, *options, want, hopper_products())]
    out, *cast = float8_moe.definition(tensors[0], *rest, activation="silu", recipe="fine")
    expected = [out, *float8_moe.gradients(grad, *cast, *rest, *options, "fine", want)]
    names = ("result", "x", "weights", "gate_up", "down", "gate_up_bias", "down_bias")
    return {n: ((g.float() - e.float()).norm() / e.float().norm()).item() for n, g, e in zip(names, got, expected, strict=True)}


@functools.cache
def prove(device: torch.device) -> None:
    """Once a process and device, before its first use: `probe`. FtcFailure, with what differs, where these kernels are not the definition."""
    with torch.no_grad():
        far = {name: found for name, found in probe(device).items() if not found <= CLOSE}
    if far:
        differ = ", ".join(f"{name} by {found:.1e}" for name, found in far.items())
        raise FtcFailure(f"the grouped FP8 kernels disagree with their definition on {torch.cuda.get_device_name(device)}: {differ} of the norm, {CLOSE} allowed")


def forward(
    x: Tensor, indices: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, gate_up_bias: Tensor | None, down_bias: Tensor | None,
    activation: str, constants: list[float], weight_on_input: bool, products: Products | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """What `ftc.dialect.float8_moe.definition` gives for recipe "fine": out [N, D], values and scales of x cast. Mutates nothing."""
    if products is None:
        prove(x.device)
    products, experts = products or hopper_products(), down.shape[0]
    layout = Layout.of(indices, experts)
    values, scales = quantise.tiles(x, True)
    weight_R = weights.flatten()[layout.slot_R] if weight_on_input else None
    rows = layout.gather(values, scales, weight_R)
    rows = products.rows(*rows, *quantise.blocks(gate_up.flatten(0, 1), False), layout.expert_T, experts, gate_up_bias, x.dtype)
    rows = quantise.tiles(middle(rows, gate_up.shape[1] != down.shape[2], activation, constants))
    rows = products.rows(*rows, *quantise.blocks(down.flatten(0, 1), False), layout.expert_T, experts, down_bias, x.dtype)
    return layout.sums(rows, None if weight_on_input else weights.flatten(), x.dtype), values, scales


def backward(
    grad: Tensor, values: Tensor, scales: Tensor, indices: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, gate_up_bias: Tensor | None,
    down_bias: Tensor | None, activation: str, constants: list[float], weight_on_input: bool, want: list[bool], products: Products | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Gradients of x, weights, gate_up, down and both biases, empty where `want` does not name them; as `ftc.dialect.float8_moe.gradients`."""
    products, experts, gated, dtype = products or hopper_products(), down.shape[0], gate_up.shape[1] != down.shape[2], grad.dtype
    want_x, want_weights, want_gate_up, want_down, want_gate_up_bias, want_down_bias = want
    layout = Layout.of(indices, experts)
    weight_R = weights.flatten()[layout.slot_R]
    rows = layout.gather(values, scales, weight_R if weight_on_input else None)
    pre = products.rows(*rows, *quantise.blocks(gate_up.flatten(0, 1), False), layout.expert_T, experts, gate_up_bias, dtype)
    h = middle(pre, gated, activation, constants)
    weighed = layout.rows(grad, None if weight_on_input else weight_R) if want_down or want_down_bias else None
    by_h = products.rows(*layout.gather(*quantise.tiles(grad)), *quantise.stacked_blocks_turned(down), layout.expert_T, experts, None, dtype)
    by_pre = middle_backward(by_h if weight_on_input else (by_h * weight_R[:, None]).to(dtype), pre, gated, activation, constants)
    found: list[Tensor] = [grad.new_empty(0)] * 6
    if want_x or (want_weights and weight_on_input):
        by_rows = products.rows(*quantise.tiles(by_pre), *quantise.stacked_blocks_turned(gate_up), layout.expert_T, experts, None, dtype)
        found[0] = layout.sums(by_rows, weights.flatten() if weight_on_input else None, dtype) if want_x else found[0]
    if want_weights and weight_on_input:
        unweighed = _read(*layout.gather(values, scales), gate_up.shape[2])
        found[1] = layout.by_slot((by_rows.float() * unweighed).sum(1), weights)
    elif want_weights:
        shares = (by_h.float() * h.float()).sum(1)
        if down_bias is not None:
            shares = shares + (layout.rows(grad).float() * down_bias[layout.expert_T.clamp_max(experts - 1).repeat_interleave(BLOCK)].float()).sum(1)
        found[1] = layout.by_slot(shares, weights)
    if want_gate_up:
        second = quantise.turn_tiles(*rows, gate_up.shape[2], True)
        found[2] = products.depth(*quantise.turned(by_pre), *second, layout.bounds, experts, gate_up.dtype)
    if want_down:
        of_slots = torch.where(layout.there_R[:, None], h, 0)  # a bias is in every row, and would be in the scales of columns
        found[3] = products.depth(*quantise.turned(weighed), *quantise.turned(of_slots), layout.bounds, experts, down.dtype)
    if want_gate_up_bias:
        found[4] = layout.by_expert(by_pre, gate_up_bias.dtype)
    if want_down_bias:
        found[5] = layout.by_expert(weighed, down_bias.dtype)
    return tuple(found)


def _read(values: Tensor, scales: Tensor, width: int) -> Tensor:
    """float32 [R, width]."""
    return (values.float() * scales.t().repeat_interleave(BLOCK, 1))[:, :width]
