"""The middle of an expert inside a kernel, there and back: h = act(g) u, or act(g) of plain experts, elementwise in float32.

The names are those of `ftc.dialect.moe`; derivatives at a kink are PyTorch's: 0 for relu at 0, 1 for a clamp at its limit.
"""

import triton
import triton.language as tl


@triton.jit
def tanh(x):
    """1 - 2 / (1 + e^2x), which is right at both ends where e^2x is 0 or infinite."""
    return 1.0 - 2.0 / (1.0 + tl.exp(2.0 * x))


@triton.jit
def activation(g, NAME: tl.constexpr):
    """(act(g), act'(g)); what is not used of the two is not computed."""
    if NAME == "silu":
        s = tl.sigmoid(g)
        value, slope = g * s, s * (1.0 + g * (1.0 - s))
    elif NAME == "sigmoid":
        s = tl.sigmoid(g)
        value, slope = s, s * (1.0 - s)
    elif NAME == "relu":
        value, slope = tl.maximum(g, 0.0), tl.where(g > 0.0, 1.0, 0.0)
    elif NAME == "relu2":
        positive = tl.maximum(g, 0.0)
        value, slope = positive * positive, 2.0 * positive
    elif NAME == "gelu":  # g Phi(g), and Phi(g) + g phi(g)
        below = 0.5 * (1.0 + tl.erf(g * 0.7071067811865476))
        value, slope = g * below, below + g * 0.3989422804014327 * tl.exp(-0.5 * g * g)
    elif NAME == "gelu_tanh":  # g (1 + tanh z) / 2, z = sqrt(2 / pi) (g + 0.044715 g^3)
        t = tanh(0.7978845608028654 * g * (1.0 + 0.044715 * g * g))
        inner = 0.7978845608028654 * (1.0 + 0.134145 * g * g)
        value, slope = 0.5 * g * (1.0 + t), 0.5 * (1.0 + t) + 0.5 * g * (1.0 - t * t) * inner
    else:
        tl.static_assert(NAME == "identity", "unknown activation")
        value, slope = g, tl.full(g.shape, 1.0, tl.float32)
    return value, slope


@triton.jit
def middle(g, u, alpha, limit, NAME: tl.constexpr, GATED: tl.constexpr):
    """h; `u` is not read for plain experts, `alpha` and `limit` only for clamped_swish."""
    if NAME == "clamped_swish":
        held = tl.minimum(g, limit)
        h = held * tl.sigmoid(alpha * held) * (tl.minimum(tl.maximum(u, -limit), limit) + 1.0)
    else:
        value, _ = activation(g, NAME)
        h = value * u if GATED else value
    return h


@triton.jit
def middle_backward(g, u, dh, alpha, limit, NAME: tl.constexpr, GATED: tl.constexpr):
    """(dg, du) for dh; du is dg for plain experts."""
    if NAME == "clamped_swish":
        held = tl.minimum(g, limit)
        s = tl.sigmoid(alpha * held)
        around = tl.minimum(tl.maximum(u, -limit), limit) + 1.0
        dg = tl.where(g <= limit, dh * around * s * (1.0 + alpha * held * (1.0 - s)), 0.0)
        du = tl.where((u <= limit) & (u >= -limit), dh * held * s, 0.0)
    else:
        value, slope = activation(g, NAME)
        dg = dh * u * slope if GATED else dh * slope
        du = dh * value if GATED else dg
    return dg, du
