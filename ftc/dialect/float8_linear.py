"""`ftc::float8_linear` and `ftc::float8_linears`: linear layers whose three products run in float8 (`ftc.float8.linear`).

    float8_linear(x, W, b, recipe)  is about  linear(x, W, b)
    float8_linears([x], [W1, W2], [b1, b2], recipe)  =  [float8_linear(x, W1, b1, recipe), float8_linear(x, W2, b2, recipe)], x cast and kept once

Composite: one node in a captured graph, in the open for AOTAutograd, so that a compiler fuses the casts with what stands around them. Recipe "fine"
is `ftc::fine_linear`.
"""

import torch
from torch import Tensor

from ftc.dialect.library import composite
from ftc.errors import FtcError
from ftc.float8.linear import Setting, linears
from ftc.float8.recipes import FINE


@composite("float8_linear(Tensor x, Tensor weight, Tensor? bias=None, str recipe='rowwise', str save='input', str products='auto') -> Tensor")
def float8_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, recipe: str = "rowwise", save: str = "input", products: str = "auto") -> Tensor:
    """x [..., D], weight [F, D], bias [F], one floating dtype; [..., F] in it. Differentiable in all three; mutates nothing. FtcError for names
    and shapes that do not fit, and for sizes that the device's float8 products cannot take."""
    if recipe == FINE:
        return torch.ops.ftc.fine_linear(x, weight, bias)  # which keeps float8 whatever `save`, and has kernels of its own whatever `products`
    return linears(Setting(recipe, save, products), [x], [weight], [bias])[0]


@composite(
    "float8_linears(Tensor[] inputs, Tensor[] weights, Tensor?[] biases, str recipe='rowwise', str save='input', str products='auto', "
    "str prologue='', float[] constants=[]) -> Tensor[]"
)
def float8_linears(inputs, weights, biases, recipe="rowwise", save="input", products="auto", prologue="", constants=()) -> list[Tensor]:
    """One result [..., F_i] for each weight [F_i, D], over one input: x, or what `prologue` makes of the inputs (`ftc.float8.prologue`), which is
    then computed again in the backward pass. `biases`: as many as weights, or none at all."""
    if prologue and save == "input":
        raise FtcError('ftc::float8_linears computes a prologue again in the backward pass only where save is "exact" or "float8"')
    biases = list(biases) or [None] * len(weights)
    return linears(Setting(recipe, save, products, prologue, tuple(constants)), inputs, weights, biases)
