"""`ftc::expert_parallel_moe`: `ftc::moe` where each rank of an axis holds a part of the experts, and tokens of its own (Lepikhin et al. 2020,
GShard, arXiv:2006.16668).

    y_n = sum_r f_r(x_n),     f_r(x) = sum over the experts e of rank r that the token chose of  w_e f(x; e)

    dispatch    a token goes once to every rank that holds an expert it chose, with its numbers and weights there
    experts     each rank runs `ftc::moe` (or `ftc::fused_moe`) over the rows that came, with its own experts
    return      f_r(x_n) goes back to where the token lives, which adds up

The gradient goes the same way: x and dy are dispatched, dx and dw return, and what an expert's weights get is the sum over the tokens of *all* ranks,
as it would be on one process; nothing is left to add up over the axis. Dispatched rows are not kept for the backward pass, which sends them again: how
many they are depends on the data, and at worst they are `degree` times the tokens. `together` is the plain form, of all ranks in one process.

Legend: N tokens of this rank, D model, E experts in all, L = E / degree experts of a rank, K experts a token, J = min(K, L), R rows sent or received.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ftc.dialect import moe
from ftc.dialect.collectives import JOINT_DEFINITIONS
from ftc.dialect.library import LIBRARY
from ftc.dialect.ranks import Place, place_on
from ftc.errors import FtcError

NAME = "expert_parallel_moe"
LIBRARY.define(f"{NAME}({moe.ARGUMENTS}, bool fused=False, str axis, int degree) -> Tensor")
LIBRARY.define(
    f"{NAME}_backward({moe.BACKWARD_ARGUMENTS}, bool fused, str axis, int degree) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


# -------------------------------------------------------------------------------------------------------------- which row goes where


@dataclass(frozen=True)
class Dispatch:
    """The rows that a rank sends, those to the first rank first. `token_R`: whose row; `expert_RJ`: its experts as the receiver numbers them, L where
    there is none; `slot_RJ`: which of the token's K choices that was; `counts`: rows to each rank."""

    token_R: Tensor
    expert_RJ: Tensor
    slot_RJ: Tensor
    counts: list[int]


def dispatch(indices_NK: Tensor, num_local: int, degree: int) -> Dispatch:
    """Where the tokens with these experts go: rank r holds experts r L to (r + 1) L - 1, and E stands for none. Waits for the device."""
    owner_NK = indices_NK // num_local
    chosen_RN = torch.stack([(owner_NK == rank).any(-1) for rank in range(degree)])
    rank_R, token_R = chosen_RN.nonzero(as_tuple=True)
    mine_RK = owner_NK[token_R] == rank_R[:, None]
    expert_RK = torch.where(mine_RK, indices_NK[token_R] - rank_R[:, None] * num_local, num_local)
    expert_RK, slot_RK = expert_RK.sort(-1)  # "none" is the largest, so it is what is cut off
    width = min(indices_NK.shape[1], num_local)
    return Dispatch(token_R, expert_RK[:, :width].contiguous(), slot_RK[:, :width].contiguous(), chosen_RN.sum(1).tolist())


def summed(rows_RD: Tensor, sent: Dispatch, num_tokens: int) -> Tensor:
    """[N, D]: the rows added up by token, in the order of ranks (each rank has a token once, so no two threads meet), in float32 or wider."""
    out = rows_RD.new_zeros(num_tokens, rows_RD.shape[1], dtype=torch.promote_types(rows_RD.dtype, torch.float32))
    for token, rows in zip(sent.token_R.split(sent.counts), rows_RD.split(sent.counts), strict=True):
        out = out.index_add(0, token, rows.to(out.dtype))
    return out


def own_experts(x, expert, weights, tensors: Sequence[Tensor | None], options: dict, fused: bool) -> Tensor:
    """The rows that came through this rank's experts."""
    return getattr(torch.ops.ftc, "fused_moe" if fused else "moe")(x, expert, weights, *tensors, **options)


# ------------------------------------------------------------------------------------------------------------------- the ranks' messages


def packed(*tensors: Tensor) -> Tensor:
    """Tensors [R, ...] of any dtypes as one message, uint8 [R, bytes]."""
    return torch.cat([t.contiguous().view(torch.uint8).reshape(len(t), t.shape[1] * t.element_size()) for t in tensors], 1)


def unpacked(message: Tensor, *likes: Tensor) -> list[Tensor]:
    """The tensors of a message, of the widths and dtypes of `likes`."""
    found = [message.new_empty(len(message), like.shape[1], dtype=like.dtype) for like in likes]
    for tensor, part in zip(found, message.split([like.shape[1] * like.element_size() for like in likes], 1), strict=True):
        tensor.view(torch.uint8).copy_(part)  # a view of the part itself may begin between two numbers
    return found


class Exchange:
    """Sends rows to the ranks of an axis and takes theirs: `there`, and `back` to where they came from."""

    def __init__(self, counts: list[int], place: Place, device: torch.device):
        import torch.distributed as dist
        from torch.distributed.distributed_c10d import _resolve_process_group

        self._group = _resolve_process_group(place.group)
        self.sent = counts
        given, taken = torch.tensor(counts, device=device), torch.empty(len(counts), dtype=torch.int64, device=device)
        dist.all_to_all_single(taken, given, group=self._group)
        self.received: list[int] = taken.tolist()

    def there(self, message: Tensor) -> Tensor:
        """The rows that the ranks sent here, by sender."""
        return self._move(message, self.sent, self.received)

    def back(self, message: Tensor) -> Tensor:
        """What the ranks made of the rows sent, in the order of sending."""
        return self._move(message, self.received, self.sent)

    def _move(self, message: Tensor, sent: list[int], received: list[int]) -> Tensor:
        import torch.distributed as dist

        out = message.new_empty(sum(received), *message.shape[1:])
        dist.all_to_all_single(out, message.contiguous(), received, sent, group=self._group)
        return out


# --------------------------------------------------------------------------------------------------------------------- on real ranks


def _place(axis: str, degree: int) -> Place:
    place = place_on(axis, degree)
    if place.group is None:
        raise FtcError("ftc::expert_parallel_moe was run on one simulated rank alone; run the graph with ftc.rewrite.lockstep")
    return place


@torch.no_grad()
def forward(
    x, indices, weights, gate_up, down, gate_up_bias=None, down_bias=None, *, activation="silu", constants=(), weight_on_input=False,
    fused=False, axis, degree,
) -> Tensor:  # fmt: skip
    """`ftc::moe` of this rank's tokens through the experts of all ranks of `axis`, of which the tensors are this rank's. A collective.

    x [N, D]; indices [N, K] among all E experts, E for none; weights [N, K]; gate_up [L, 2F or F, D], down [L, D, F] and biases: the rank's experts. N
    may differ by rank, and be 0. Returns [N, D] in the dtype of x: each rank's sum over its experts in that dtype, these added up in float32 or wider.
    Mutates nothing. FtcError where the axis is not bound to `degree` ranks.
    """
    place, (experts, *rest) = _place(axis, degree), (gate_up, down, gate_up_bias, down_bias)
    options = {"activation": activation, "constants": list(constants), "weight_on_input": weight_on_input}
    sent = dispatch(indices, down.shape[0], degree)
    exchange = Exchange(sent.counts, place, x.device)
    message = (x[sent.token_R], sent.expert_RJ, weights[sent.token_R].gather(1, sent.slot_RJ))
    rows, expert, weight = unpacked(exchange.there(packed(*message)), *message)
    done = own_experts(rows, expert, weight, (experts, *rest), options, fused) if len(rows) else rows
    return summed(exchange.back(done), sent, len(x)).to(x.dtype)


@torch.no_grad()
def backward(
    grad, x, indices, weights, gate_up, down, gate_up_bias, down_bias, activation, constants, weight_on_input, want, fused, axis, degree
) -> tuple[Tensor, ...]:
    """Gradients of x, weights, gate_up, down and biases; empty where `want` says no. Those of the experts hold all ranks' tokens. A collective."""
    place, held = _place(axis, degree), (gate_up, down, gate_up_bias, down_bias)
    sent = dispatch(indices, down.shape[0], degree)
    exchange = Exchange(sent.counts, place, x.device)
    message = (grad[sent.token_R], x[sent.token_R], sent.expert_RJ, weights[sent.token_R].gather(1, sent.slot_RJ))
    grad_rows, rows, expert, weight = unpacked(exchange.there(packed(*message)), *message)
    operator = torch.ops.ftc.fused_moe_backward if fused else torch.ops.ftc.moe_backward
    if len(rows):
        # Ranks have to agree on what returns, and one of them may hold frozen experts alone: both gradients always do.
        asked = [True, True, *want[2:]]
        dx, dw, *found = operator(grad_rows, rows, expert, weight, *held, activation, list(constants), weight_on_input, asked)
    else:
        dx, dw = rows, weight
        found = [t.new_zeros(t.shape) if w else grad.new_empty(0) for t, w in zip(held, want[2:], strict=True)]
    dx_R, dw_R = unpacked(exchange.back(packed(dx, dw)), dx, dw)
    chosen = sent.token_R[:, None] * weights.shape[1] + sent.slot_RJ  # of a slot without an expert the gradient is zero
    dweights = weights.new_zeros(weights.numel()).index_add(0, chosen.flatten(), dw_R.flatten()).view(weights.shape)
    own = (summed(dx_R, sent, len(x)).to(x.dtype), dweights)
    return (*(g if w else grad.new_empty(0) for g, w in zip(own, want[:2], strict=True)), *found)


def _fake(x, indices, weights, gate_up, down, gate_up_bias=None, down_bias=None, *, activation="silu", constants=(), degree, **_) -> Tensor:
    experts = gate_up.new_empty(gate_up.shape[0] * degree, *gate_up.shape[1:])  # a token may choose more than one rank holds
    moe.check(x, indices, weights, experts, down.new_empty(down.shape[0] * degree, *down.shape[1:]), activation, list(constants))
    return x.new_empty(x.shape)


def _fake_backward(grad, x, indices, weights, gate_up, down, gate_up_bias, down_bias, activation, constants, weight_on_input, want, *_):
    tensors = (x, weights, gate_up, down, gate_up_bias, down_bias)
    return tuple(t.new_empty(t.shape) if w else grad.new_empty(0) for t, w in zip(tensors, want, strict=True))


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, indices, weights, gate_up, down, gate_up_bias, down_bias, options, where):
        ctx.save_for_backward(x, indices, weights, gate_up, down, gate_up_bias, down_bias)
        ctx.options, ctx.where = options, where
        with torch._C._AutoDispatchBelowAutograd():
            return torch.ops.ftc.expert_parallel_moe(x, indices, weights, gate_up, down, gate_up_bias, down_bias, **options, **where)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        want = [ctx.needs_input_grad[i] for i in (0, 2, 3, 4, 5, 6)]
        found = torch.ops.ftc.expert_parallel_moe_backward(grad, *ctx.saved_tensors, *ctx.options.values(), want, *ctx.where.values())
        x, weights, *experts = (g if w else None for g, w in zip(found, want, strict=True))
        return x, None, weights, *experts, None, None


def _differentiable(
    x, indices, weights, gate_up, down, gate_up_bias=None, down_bias=None, *, activation="silu", constants=(), weight_on_input=False,
    fused=False, axis, degree,
) -> Tensor:  # fmt: skip
    tensors = (x, indices, weights, gate_up, down, gate_up_bias, down_bias)
    options = {"activation": activation, "constants": list(constants), "weight_on_input": weight_on_input}
    where = {"fused": fused, "axis": axis, "degree": degree}
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        return _Function.apply(*tensors, options, where)
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.ftc.expert_parallel_moe(*tensors, **options, **where)


LIBRARY.impl(NAME, forward, "CompositeExplicitAutograd")
LIBRARY.impl(NAME, _differentiable, "Autograd")
LIBRARY.impl(f"{NAME}_backward", backward, "CompositeExplicitAutograd")
torch.library.register_fake(f"ftc::{NAME}", _fake)
torch.library.register_fake(f"ftc::{NAME}_backward", _fake_backward)


# ---------------------------------------------------------------------------------------------------------------------- the plain form


def together(ranks: list[dict]) -> list[Tensor]:
    """The operator on all ranks at once, from each one's arguments by name: the same dispatch, experts and sums, with rows handed over in memory.

    Differentiable: an expert's weights get the gradients of all ranks' tokens."""
    degree, num_local = len(ranks), ranks[0]["down"].shape[0]
    sent = [dispatch(rank["indices"], num_local, degree) for rank in ranks]
    done: list[list[Tensor]] = []  # by receiver, then by sender
    for receiver, rank in enumerate(ranks):
        options = {name: rank[name] for name in ("activation", "constants", "weight_on_input") if name in rank}
        experts = [rank["gate_up"], rank["down"], rank.get("gate_up_bias"), rank.get("down_bias")]
        rows = [_rows(other, plan, receiver) for other, plan in zip(ranks, sent, strict=True)]
        x, expert, weight = (torch.cat(parts) for parts in zip(*rows, strict=True))
        out = own_experts(x, expert, weight, experts, options, rank.get("fused", False))
        done.append(list(out.split([plan.counts[receiver] for plan in sent])))
    return [
        summed(torch.cat([done[receiver][sender] for receiver in range(degree)]), plan, len(rank["x"])).to(rank["x"].dtype)
        for sender, (rank, plan) in enumerate(zip(ranks, sent, strict=True))
    ]


def _rows(rank: dict, sent: Dispatch, receiver: int) -> tuple[Tensor, Tensor, Tensor]:
    """What a rank sends to another: rows, experts, weights."""
    token, expert, slot = (t.split(sent.counts)[receiver] for t in (sent.token_R, sent.expert_RJ, sent.slot_RJ))
    return rank["x"][token], expert, rank["weights"][token].gather(1, slot)


JOINT_DEFINITIONS[NAME] = together
