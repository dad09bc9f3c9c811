"""`ftc::balance`: auxiliary losses of a router, as a gradient that joins that of its logits, and the count of who was chosen.

    balance(w, l, i) = w,    d loss / d w passes through,    d loss / d l  +=  share * d (switch A + sequence S + z Z) / d l

    p_n = softmax(l_n), or sigmoid(l_n) over its sum        f_e = share of expert e in all choices        P_e = mean_n p_ne
    A = E sum_e f_e P_e                       Switch Transformer (Fedus et al. 2021, arXiv:2101.03961, equations 4 to 6), for top-K: 1 where all
                                              experts are chosen alike. f of this call ("batch"), or of the last steps of all ranks ("pool"; Qiu et
                                              al. 2025, arXiv:2501.11873, who find that f over more text lets experts specialise)
    S = mean over sequences of that same sum, with f and P of one sequence: DeepSeek-V3 (2024, arXiv:2412.19437, equations 17 to 20)
    Z = mean_n logsumexp(l_n)^2               ST-MoE (Zoph et al. 2022, arXiv:2202.08906, equation 5)

f is a count and has no gradient. No loss leaves the region: as in Megatron's MoEAuxLossAutoScaler the gradient is put in where the backward pass
comes by, which it does once a microbatch, also where activations are computed again; so that is where the choices are counted, into `tally`.

Legend: N tokens, K experts a token, E experts, S sequences.
"""

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ftc.dialect.library import LIBRARY
from ftc.errors import nearest

GATES, SCOPES = ("softmax", "sigmoid"), ("batch", "pool")
# What a tally holds behind the counts of E experts and their pool: sums over tokens. "bad": tokens whose logits are not finite.
SUMS = ("tokens", "entropy", "confidence", "switch", "sequence", "z", "bad")

OPTIONS = "str gate='softmax', float switch=0.0, float sequence=0.0, SymInt? tokens_in_sequence=None, float z=0.0, str scope='batch'"
LIBRARY.define(f"balance(Tensor weights, Tensor logits, Tensor indices, Tensor tally, *, {OPTIONS}) -> Tensor")
# The gradients of weights and logits. It writes into `tally` and its schema does not say so: the counter of a saved tensor's versions would
# take the microbatch that comes next for a mistake, and a compiler has no other reader of `tally` to put in order with this writer.
LIBRARY.define(
    "balance_backward(Tensor grad, Tensor logits, Tensor indices, Tensor tally, str gate, float switch, float sequence, "
    "SymInt? tokens_in_sequence, float z, str scope) -> (Tensor, Tensor)"
)

_share = 1.0


@contextlib.contextmanager
def share_of_batch(share: float) -> Iterator[None]:
    """Inside, a call of `ftc::balance` counts as `share` of the batch: its tokens over those of all ranks and microbatches of a step.

    The gradients of a step then sum up to those of coefficient times the mean over all its tokens. 1 outside. Not for graphs that replay
    kernels without Python (CUDA graphs), which would keep the share of their recording. ValueError where it is not in (0, 1].
    """
    global _share
    if not 0 < share <= 1:
        raise ValueError(f"a microbatch cannot be {share} of its batch; give its tokens over all tokens, more than 0 and at most 1")
    before, _share = _share, share
    try:
        yield
    finally:
        _share = before


def tally_size(experts: int) -> int:
    """Numbers in the tally of a router of `experts`."""
    return 2 * experts + len(SUMS)


def parts_of(tally: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Views of a tally [..., 2 E + 7]: choices of each expert since it was emptied [..., E], the pool [..., E], and SUMS [..., 7]."""
    return tally[..., :experts], tally[..., experts : 2 * experts], tally[..., 2 * experts :]


def check(weights: Tensor, logits: Tensor, indices: Tensor, tally: Tensor, gate: str, scope: str, sequence: float, tokens: int | None) -> None:
    """ValueError for shapes that do not fit, names that there are not, and a loss by sequence without its length."""
    shapes = f"weights {list(weights.shape)}, logits {list(logits.shape)}, indices {list(indices.shape)}, tally {list(tally.shape)}"
    if logits.dim() != 2 or indices.dim() != 2 or weights.shape != indices.shape or logits.shape[0] != indices.shape[0]:
        raise ValueError(f"ftc::balance takes weights and indices [N, K] and logits [N, E]; got {shapes}")
    if list(tally.shape) != [tally_size(logits.shape[1])] or tally.dtype != torch.float64:
        raise ValueError(f"the tally of {logits.shape[1]} experts is float64 [{tally_size(logits.shape[1])}]; got {tally.dtype}, {shapes}")
    for name, word, valid in (("gate", gate, GATES), ("scope", scope, SCOPES)):
        if word not in valid:
            raise ValueError(f"ftc::balance has no {name} {word!r}; {nearest(word, valid)}")
    if sequence and tokens is None:
        raise ValueError(f"ftc::balance with sequence = {sequence} needs tokens_in_sequence")


def probabilities(logits: Tensor, gate: str) -> tuple[Tensor, Tensor, Tensor]:
    """p [N, E], its rows summing to 1; logsumexp of the logits [N]; the raw scores [N, E]. In float32 or wider."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if gate == "softmax":
        p_NE = wide.softmax(-1)
        return p_NE, wide.logsumexp(-1), p_NE
    scores_NE = wide.sigmoid()
    return scores_NE / scores_NE.sum(-1, keepdim=True), wide.logsumexp(-1), scores_NE


def choices(indices: Tensor, experts: int, sequences: int) -> Tensor:
    """How often each expert was chosen by each of `sequences` equal parts of the tokens, int64 [S, E]; index E is nobody."""
    rows = torch.arange(sequences, device=indices.device).repeat_interleave(indices.shape[0] // sequences)
    places = (rows[:, None] * (experts + 1) + indices).flatten()
    # One flat scatter: of those with atomic additions it is the one that PyTorch can also do in a fixed order.
    counts = places.new_zeros(sequences * (experts + 1)).scatter_add_(0, places, torch.ones_like(places))
    return counts.view(sequences, experts + 1)[:, :-1]


def fractions(counts: Tensor) -> Tensor:
    """Shares of all choices, [..., E] of any number; zeros where nothing was chosen."""
    return counts / counts.sum(-1, keepdim=True).clamp(min=1)


def logit_gradient(gradient_NE: Tensor, p_NE: Tensor, scores_NE: Tensor, gate: str) -> Tensor:
    """The gradient of the logits from that of p, [N, E]."""
    centred = gradient_NE - (gradient_NE * p_NE).sum(-1, keepdim=True)
    if gate == "softmax":
        return p_NE * centred
    return p_NE * (1 - scores_NE) * centred  # p = s / sum(s), ds/dl = s (1 - s)


@torch.no_grad()
def backward(grad, logits, indices, tally, gate, switch, sequence, tokens_in_sequence, z, scope):
    """Gradients of weights and logits; adds this call's choices and sums to `tally`."""
    num_tokens, experts = logits.shape
    sequences, rest = (1, 0) if tokens_in_sequence is None else divmod(num_tokens, tokens_in_sequence)
    if rest:
        raise ValueError(f"ftc::balance was given {num_tokens} tokens, which are no sequences of {tokens_in_sequence}")
    p_NE, lse_N, scores_NE = probabilities(logits, gate)
    counts_SE = choices(indices, experts, sequences)
    counts_E, pool_E, sums = parts_of(tally.data, experts)
    f_E = fractions(counts_SE.sum(0).to(tally.dtype))
    if scope == "pool":  # empty before the first step has ended: f is then this call's
        f_E = torch.where(pool_E.sum() > 0, fractions(pool_E), f_E)
    f_E, f_SE = f_E.to(p_NE.dtype), fractions(counts_SE.to(tally.dtype)).to(p_NE.dtype)
    by_expert_NE = (f_SE * (experts * sequence)).repeat_interleave(num_tokens // sequences, 0) + f_E * (experts * switch)
    gradient_NE = logit_gradient(by_expert_NE, p_NE, scores_NE, gate)
    if z:
        softmax_NE = p_NE if gate == "softmax" else logits.to(p_NE.dtype).softmax(-1)
        gradient_NE = gradient_NE + softmax_NE * (2 * z * lse_N[:, None])
    p_SE = p_NE.view(sequences, -1, experts).sum(1)
    counts_E += counts_SE.sum(0)
    sums += torch.stack(
        [
            lse_N.new_full((), num_tokens),
            torch.special.entr(p_NE).sum(),
            p_NE.amax(-1).sum(),
            experts * (f_E * p_SE.sum(0)).sum(),
            experts * (f_SE * p_SE).sum(),
            lse_N.square().sum(),
            (~lse_N.isfinite()).sum().to(lse_N.dtype),
        ]
    )
    return grad.clone(), (gradient_NE * (_share / num_tokens)).to(logits.dtype)


class _Balance(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weights, logits, indices, tally, options):
        ctx.save_for_backward(logits, indices, tally)
        ctx.options = options
        with torch._C._AutoDispatchBelowAutograd():
            return _operator(weights, logits, indices, tally, options)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        # The gradient of the weights goes through the operator too, so that no compiler drops the count where the router is not trained.
        weights, logits = torch.ops.ftc.balance_backward(grad, *ctx.saved_tensors, *ctx.options)
        return weights, logits if ctx.needs_input_grad[1] else None, None, None, None


def _operator(weights: Tensor, logits: Tensor, indices: Tensor, tally: Tensor, options: Sequence) -> Tensor:
    gate, switch, sequence, tokens, z, scope = options
    return torch.ops.ftc.balance(
        weights, logits, indices, tally, gate=gate, switch=switch, sequence=sequence, tokens_in_sequence=tokens, z=z, scope=scope
    )


def _plain(weights, logits, indices, tally, *, gate="softmax", switch=0.0, sequence=0.0, tokens_in_sequence=None, z=0.0, scope="batch"):
    check(weights, logits, indices, tally, gate, scope, sequence, tokens_in_sequence)
    return weights.clone()


def _differentiable(weights, logits, indices, tally, *, gate="softmax", switch=0.0, sequence=0.0, tokens_in_sequence=None, z=0.0, scope="batch"):
    options = (gate, switch, sequence, tokens_in_sequence, z, scope)
    if torch.is_grad_enabled() and (weights.requires_grad or logits.requires_grad):
        return _Balance.apply(weights, logits, indices, tally, options)
    with torch._C._AutoDispatchBelowAutograd():
        return _operator(weights, logits, indices, tally, options)


def _fake(weights, logits, indices, tally, *, gate="softmax", sequence=0.0, tokens_in_sequence=None, scope="batch", **_):
    check(weights, logits, indices, tally, gate, scope, sequence, tokens_in_sequence)
    return torch.empty_like(weights)


def _fake_backward(grad, logits, *_):
    return torch.empty_like(grad), torch.empty_like(logits)


LIBRARY.impl("balance", _plain, "CompositeExplicitAutograd")
LIBRARY.impl("balance", _differentiable, "Autograd")
LIBRARY.impl("balance_backward", backward, "CompositeExplicitAutograd")
torch.library.register_fake("ftc::balance", _fake)
torch.library.register_fake("ftc::balance_backward", _fake_backward)
