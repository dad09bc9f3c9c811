"""Linear layers in float8 that share their input, forward and backward, and what is kept between the two.

    save     kept for the backward pass                                    bits
    input    the inputs, as torchao does                                   torchao's
    exact    x as the float8 operand of dW; before it a norm or a gate     the same: what is kept is what dW reads; norm and gate are
             is computed again from its own inputs                         computed again by the same operators
    float8   as exact, and the inputs of a gate in float8, a scale for     gradients differ: DeepSeek-V3 (arXiv:2412.19437, 3.3.3) keeps
             128 numbers                                                   the inputs of SwiGLU so

With recipe rowwise_with_gw_hp dW reads x in high precision, and so x is kept. Where a graph is traced for a compiler, all of this stands in the open in
the joint graph, and its partitioner has the last word on what is kept.

Legend: N tokens (all leading dimensions), D inputs, F outputs.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ftc.errors import FtcError, nearest
from ftc.float8 import prologue
from ftc.float8.cast import to_float8
from ftc.float8.recipes import BLOCK, NAMES, RECIPES
from ftc.float8.schemes import ByScale, ByTile, Operand, scheme_of

SAVES = ("input", "exact", "float8")


@dataclass(frozen=True)
class Setting:
    """What does not change from call to call: names of recipe, saving, products (`ftc.float8.products`) and prologue with its constants."""

    recipe: str
    save: str = "input"
    products: str = "auto"
    prologue: str = ""
    constants: tuple[float, ...] = ()

    def __post_init__(self):
        if self.save not in SAVES:
            raise FtcError(f"float8 save = {self.save!r} is not known; {nearest(self.save, SAVES)}")
        if self.recipe not in NAMES:
            raise FtcError(f"there is no float8 recipe {self.recipe!r}; {nearest(self.recipe, NAMES)}")

    @property
    def scheme(self) -> ByScale | ByTile:
        return scheme_of(self.recipe, self.products)

    @property
    def keeps_operand(self) -> bool:
        """Whether x is kept as the operand of dW, made in the forward pass."""
        return not self.prologue and self.save != "input" and self.scheme.keeps_float8


def linears(setting: Setting, inputs: Sequence[Tensor], weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> list[Tensor]:
    """[..., F_i] for every weight [F_i, D]: prologue(inputs) W_i^T + b_i, differentiable once in all of them; in the dtype of the inputs. Mutates nothing."""
    tensors = (*inputs, *weights, *biases)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        return list(_Linears.apply(setting, len(inputs), len(weights), *tensors))
    h = prologue.apply(setting.prologue, inputs, setting.constants)
    return list(_forward(setting, h, setting.scheme.of_x(_flat(h), False)[0], weights, biases))


def _flat(h: Tensor) -> Tensor:
    return h.reshape(-1, h.shape[-1])


def _forward(setting: Setting, h: Tensor, x: Operand, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    outs = []
    for weight, bias in zip(weights, biases, strict=True):
        _check(h, weight, bias)
        out = setting.scheme.y(x, weight, h.dtype)
        out = out.reshape(*h.shape[:-1], out.shape[-1])
        outs.append(out if bias is None else out + bias.to(out.dtype))
    return tuple(outs)


def _check(h: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if weight.dim() != 2 or h.dim() < 1 or h.shape[-1] != weight.shape[1] or (bias is not None and bias.shape != weight.shape[:1]):
        shapes = f"x {list(h.shape)}, weight {list(weight.shape)}" + ("" if bias is None else f", bias {list(bias.shape)}")
        raise FtcError(f"ftc::float8_linear takes x [..., D], weight [F, D], bias [F]; got {shapes}")


class _Linears(torch.autograd.Function):
    @staticmethod
    def forward(ctx, setting: Setting, num_inputs: int, num_weights: int, *tensors):
        inputs, weights, biases = tensors[:num_inputs], tensors[num_inputs : num_inputs + num_weights], tensors[num_inputs + num_weights :]
        h = prologue.apply(setting.prologue, inputs, setting.constants)
        x, for_dw = setting.scheme.of_x(_flat(h), setting.keeps_operand)
        outs = _forward(setting, h, x, weights, biases)
        kept, ctx.restore = (list(for_dw), lambda kept: ([None], tuple(kept))) if for_dw is not None else _kept_inputs(setting, inputs)
        ctx.setting, ctx.counts, ctx.bias_dtypes = setting, (num_inputs, num_weights), [None if b is None else b.dtype for b in biases]
        ctx.save_for_backward(*weights, *kept)
        return outs

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads):
        setting, (num_inputs, num_weights) = ctx.setting, ctx.counts
        saved = ctx.saved_tensors  # once: activation checkpointing lets nobody ask again
        weights, kept = saved[:num_weights], saved[num_weights:]
        want = ctx.needs_input_grad[3:]
        want_inputs, want_weights, want_biases = want[:num_inputs], want[num_inputs : num_inputs + num_weights], want[num_inputs + num_weights :]
        inputs, x_for_dw = ctx.restore(kept)
        weight_grads: list[Tensor | None] = [None] * num_weights

        def by_h(h: Tensor | None, wanted: bool) -> Tensor | None:
            """The gradient of h; fills in those of the weights."""
            x = x_for_dw if x_for_dw is not None or not any(want_weights) else setting.scheme.of_x_for_dw(_flat(h))
            total = None
            for i in reversed(range(num_weights)):  # the order in which autograd adds up products of their own
                dx, weight_grads[i] = setting.scheme.dx_and_dw(_flat(grads[i]), weights[i], x if want_weights[i] else None, wanted)
                total = dx if total is None else total + dx
            return None if total is None else total.reshape(*grads[0].shape[:-1], total.shape[-1])

        input_grads = prologue.gradients(setting.prologue, inputs, setting.constants, want_inputs, by_h)
        bias_grads = [_bias_grad(g, dtype) if w else None for g, dtype, w in zip(grads, ctx.bias_dtypes, want_biases, strict=True)]
        return None, None, None, *input_grads, *weight_grads, *bias_grads


def _kept_inputs(setting: Setting, inputs: Sequence[Tensor]) -> tuple[list[Tensor], Callable]:
    """The inputs as they are kept, and a function from that to (inputs, None)."""
    if setting.save == "float8" and setting.prologue.startswith(prologue.GATED):
        like = [(t.shape, t.dtype) for t in inputs]
        packed = [part for t in inputs for part in pack(t)]
        return packed, lambda kept: ([unpack(*kept[2 * i : 2 * i + 2], *like[i]) for i in range(len(like))], None)
    return list(inputs), lambda kept: (list(kept), None)


def _bias_grad(grad: Tensor, dtype: torch.dtype) -> Tensor:
    return (grad.sum(tuple(range(grad.dim() - 1))) if grad.dim() > 1 else grad).to(dtype)


def pack(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [..., D] in e4m3 with a float32 scale for each 128 numbers (fewer at the end of a row): ([N, D] and [N, ceil(D / 128)])."""
    flat = x.reshape(-1, x.shape[-1])
    rest = -flat.shape[1] % BLOCK
    tiles = torch.nn.functional.pad(flat, (0, rest)).view(flat.shape[0], -1, BLOCK)
    scaled = to_float8(tiles, RECIPES["rowwise"].x, "input of a gate")
    return scaled.data.flatten(1)[:, : flat.shape[1]].contiguous(), scaled.scale[:, :, 0]


def unpack(data: Tensor, scale: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """What `pack` made, again in `dtype` and `shape`."""
    rest = -data.shape[1] % BLOCK
    tiles = torch.nn.functional.pad(data.float(), (0, rest)).view(data.shape[0], -1, BLOCK) / scale[:, :, None]
    return tiles.flatten(1)[:, : data.shape[1]].to(dtype).reshape(shape)
