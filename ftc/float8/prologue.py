"""What stands before a float8 product and is computed again in the backward pass instead of being kept: a norm, or a gated activation.

    ""            h = x
    "rms_norm"    h = w * dtype(rms_norm(wide(x), eps))       constants [eps, gain inside the norm (1) or after the rounding (0), wide in float32 (1) or not (0)]
    "gated:ACT"   h = ACT(gate) * up                          `ftc::gated`

Computed by the same operators in the same order as in the graph, so that values and gradients keep their bits.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ftc.errors import FtcError

NORM, GATED = "rms_norm", "gated"


def apply(name: str, inputs: Sequence[Tensor], constants: Sequence[float]) -> Tensor:
    """h for the inputs: [x], [x, w] or [gate, up], each [..., D]. FtcError for a name that there is not."""
    if not name:
        return inputs[0]
    if name == NORM:
        return _rms_norm(inputs, *constants)
    kind, _, activation = name.partition(":")
    if kind != GATED:
        raise FtcError(f"there is no prologue {name!r} of float8 products; use '', 'rms_norm' or 'gated:' with an activation of ftc::gated")
    return torch.ops.ftc.gated(*inputs, activation)


def _rms_norm(inputs: Sequence[Tensor], eps: float, inside: float, wide: float) -> Tensor:
    x, gain = inputs[0], (inputs[1] if len(inputs) > 1 else None)
    h = F.rms_norm(x.to(torch.promote_types(x.dtype, torch.float32)) if wide else x, [x.shape[-1]], gain if inside else None, eps).to(x.dtype)
    return h if inside or gain is None else gain * h


def gradients(name: str, inputs: Sequence[Tensor], constants: Sequence[float], want: Sequence[bool], backward) -> list[Tensor | None]:
    """Gradients of the inputs that `want` names. `backward(h, wanted)` gives the gradient of h, and may read h."""
    if not name:
        return [backward(inputs[0], want[0])]
    with torch.enable_grad():
        leaves = [t.detach().requires_grad_(w) for t, w in zip(inputs, want, strict=True)]
        h = apply(name, leaves, constants)
    grad = backward(h.detach(), any(want))
    wanted = [leaf for leaf, w in zip(leaves, want, strict=True) if w]
    found = iter(torch.autograd.grad(h, wanted, grad) if wanted else ())
    return [next(found) if w else None for w in want]
