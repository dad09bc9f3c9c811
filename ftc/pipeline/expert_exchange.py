"""`ftc::expert_parallel_moe` taken apart, so that its exchanges can run while something else computes.

    rows      which token goes where, and how many to each rank                                   (waits for the device)
    counts    all-to-all of the numbers of rows                      start, wait
    there     all-to-all of the rows, packed with their experts and weights    start, wait
    experts   the rank's own experts over the rows that came
    back      all-to-all of what they made                                     start, wait
    sum       by token, in the order of ranks

The backward operator likewise: y's gradient and x go there, x's and the weights' come back. Each step is one operator, so that sizes that only data
tell stay inside of them: a graph of these is static, and torch.compile takes it. The numbers of rows are read on the host once an exchange; what was
queued on the device before that read has to be done first, so a graph's order puts work of the other half behind the start of `counts`.

Legend: N tokens of this rank, D model, L experts of a rank, K experts a token, J = min(K, L), R rows sent, S rows received.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, fx

from ftc.dialect import expert_ranks as ranks
from ftc.dialect.library import LIBRARY
from ftc.dialect.ranks import place_on
from ftc.errors import FtcError
from ftc.pipeline.communication import BLOCKING, STARTS, Transfer, Writer
from ftc.rewrite.lockstep import arguments

ftc_ops, c10d = torch.ops.ftc, torch.ops._c10d_functional


def _operator(schema: str):
    """Register the decorated function as `ftc::schema`, opaque to tracing."""

    def register(function):
        LIBRARY.define(schema)
        LIBRARY.impl(schema.split("(")[0], function, "CompositeExplicitAutograd")
        return function

    return register


def _fake(name: str):
    return torch.library.register_fake(f"ftc::{name}")


def _some() -> int:
    return torch.library.get_ctx().new_dynamic_size()


@_operator("exchange_plan(Tensor indices, int num_local, int degree) -> (Tensor, Tensor, Tensor, Tensor)")
def exchange_plan(indices_NK: Tensor, num_local: int, degree: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`expert_ranks.dispatch` as tensors: token [R], expert [R, J], slot [R, J], and counts [degree] on the CPU."""
    plan = ranks.dispatch(indices_NK, num_local, degree)
    return plan.token_R, plan.expert_RJ, plan.slot_RJ, torch.tensor(plan.counts)


@_fake("exchange_plan")
def _(indices, num_local, degree):
    rows, width = _some(), min(indices.shape[1], num_local)
    wide = indices.new_empty(rows, width)
    return indices.new_empty(rows), wide, torch.empty_like(wide), torch.empty(degree, dtype=torch.int64)


@_operator("exchange_counts(Tensor counts, Tensor like) -> Tensor")
def exchange_counts(counts: Tensor, like: Tensor) -> Tensor:
    """The counts on the device of `like`, where a process group can send them; always a copy."""
    return torch.empty_like(counts, device=like.device).copy_(counts)


@_fake("exchange_counts")
def _(counts, like):
    return torch.empty_like(counts, device=like.device)


@_operator("exchange_read(Tensor counts) -> Tensor")
def exchange_read(counts: Tensor) -> Tensor:
    """Counts that came from the ranks, copied to the CPU; waits for the device."""
    return torch.empty_like(counts, device="cpu").copy_(counts)


@_fake("exchange_read")
def _(counts):
    return torch.empty_like(counts, device="cpu")


@_operator("exchange_pack(Tensor[] values, Tensor weights, Tensor token, Tensor expert, Tensor slot) -> Tensor")
def exchange_pack(values: list[Tensor], weights_NK: Tensor, token_R: Tensor, expert_RJ: Tensor, slot_RJ: Tensor) -> Tensor:
    """One message, uint8 [R, bytes]: the rows of each of `values` [N, D], their experts, and the weights of these."""
    return ranks.packed(*(value[token_R] for value in values), expert_RJ, weights_NK[token_R].gather(1, slot_RJ))


@_fake("exchange_pack")
def _(values, weights, token, expert, slot):
    width = sum(v.shape[1] * v.element_size() for v in values) + expert.shape[1] * (expert.element_size() + weights.element_size())
    return values[0].new_empty(token.shape[0], width, dtype=torch.uint8)


@_operator("exchange_pair(Tensor first, Tensor second) -> Tensor")
def exchange_pair(first: Tensor, second: Tensor) -> Tensor:
    """Two tensors of rows as one message, uint8 [S, bytes]."""
    return ranks.packed(first, second)


@_fake("exchange_pair")
def _(first, second):
    width = first.shape[1] * first.element_size() + second.shape[1] * second.element_size()
    return first.new_empty(first.shape[0], width, dtype=torch.uint8)


@_operator("exchange_unpack(Tensor message, int[] widths, ScalarType[] dtypes) -> Tensor[]")
def exchange_unpack(message: Tensor, widths: list[int], dtypes: list[torch.dtype]) -> list[Tensor]:
    """The tensors of a message, [rows, width] each."""
    likes = [torch.empty(0, width, dtype=dtype, device=message.device) for width, dtype in zip(widths, dtypes, strict=True)]
    return ranks.unpacked(message, *likes)


@_fake("exchange_unpack")
def _(message, widths, dtypes):
    return [message.new_empty(message.shape[0], width, dtype=dtype) for width, dtype in zip(widths, dtypes, strict=True)]


@_operator("exchange_start(Tensor message, Tensor sent, Tensor received, str group) -> Tensor")
def exchange_start(message: Tensor, sent: Tensor, received: Tensor, group: str) -> Tensor:
    """Begin the all-to-all of rows: `sent` and `received` [degree] on the CPU. The result is pending: `_c10d_functional.wait_tensor` makes it a value."""
    return c10d.all_to_all_single(message.contiguous(), received.tolist(), sent.tolist(), group)


@_fake("exchange_start")
def _(message, sent, received, group):
    return message.new_empty(_some(), *message.shape[1:])


_OWN = "Tensor gate_up, Tensor down, Tensor? gate_up_bias, Tensor? down_bias, str activation, float[] constants, bool weight_on_input"


@_operator(f"exchange_experts(Tensor rows, Tensor expert, Tensor weight, {_OWN}, bool fused) -> Tensor")
@torch.no_grad()
def exchange_experts(rows, expert, weight, gate_up, down, gate_up_bias, down_bias, activation, constants, weight_on_input, fused) -> Tensor:
    """The rank's own experts over the rows that came, [S, D]; there may be none."""
    options = {"activation": activation, "constants": list(constants), "weight_on_input": weight_on_input}
    tensors = (gate_up, down, gate_up_bias, down_bias)
    return ranks.own_experts(rows, expert, weight, tensors, options, fused) if len(rows) else torch.empty_like(rows)


@_fake("exchange_experts")
def _(rows, *_):
    return torch.empty_like(rows)


@_operator(
    f"exchange_experts_backward(Tensor grad, Tensor rows, Tensor expert, Tensor weight, {_OWN}, bool[] want, bool fused)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
@torch.no_grad()
def exchange_experts_backward(
    grad, rows, expert, weight, gate_up, down, gate_up_bias, down_bias, activation, constants, weight_on_input, want, fused
) -> tuple[Tensor, ...]:
    """Gradients of the rows, of their weights and of the rank's experts (empty where `want` says no)."""
    held = (gate_up, down, gate_up_bias, down_bias)
    if len(rows):
        function = ftc_ops.fused_moe_backward if fused else ftc_ops.moe_backward
        return function(grad, rows, expert, weight, *held, activation, list(constants), weight_on_input, want)
    found = [t.new_zeros(t.shape) if w else grad.new_empty(0) for t, w in zip(held, want[2:], strict=True)]
    return torch.empty_like(rows), torch.empty_like(weight), *found


@_fake("exchange_experts_backward")
def _(grad, rows, expert, weight, gate_up, down, gate_up_bias, down_bias, activation, constants, weight_on_input, want, fused):
    held = (rows, weight, gate_up, down, gate_up_bias, down_bias)
    return tuple(torch.empty_like(t) if w else grad.new_empty(0) for t, w in zip(held, want, strict=True))


@_operator("exchange_sum(Tensor rows, Tensor token, Tensor sent, int num_tokens, ScalarType dtype) -> Tensor")
def exchange_sum(rows_RD: Tensor, token_R: Tensor, sent: Tensor, num_tokens: int, dtype: torch.dtype) -> Tensor:
    """[N, D]: the rows added up by token, in float32 or wider, then `dtype`."""
    return ranks.summed(rows_RD, ranks.Dispatch(token_R, token_R, token_R, sent.tolist()), num_tokens).to(dtype)


@_fake("exchange_sum")
def _(rows, token, sent, num_tokens, dtype):
    return rows.new_empty(num_tokens, rows.shape[1], dtype=dtype)


@_operator("exchange_weights(Tensor grad, Tensor token, Tensor slot, Tensor weights) -> Tensor")
def exchange_weights(grad_RJ: Tensor, token_R: Tensor, slot_RJ: Tensor, weights_NK: Tensor) -> Tensor:
    """[N, K]: the gradients of the weights, back in the places they were taken from; zero where a token had no expert."""
    chosen = token_R[:, None] * weights_NK.shape[1] + slot_RJ
    return weights_NK.new_zeros(weights_NK.numel()).index_add(0, chosen.flatten(), grad_RJ.flatten()).view(weights_NK.shape)


@_fake("exchange_weights")
def _(grad, token, slot, weights):
    return torch.empty_like(weights, memory_format=torch.contiguous_format)


# ----------------------------------------------------------------------------------------------------------------- in graphs


def expected_rows(num_tokens: int, top_k: int, degree: int) -> int:
    """Rows that a rank sends where choices fall on all ranks alike: N n (1 - (1 - 1/n)^K), rounded up."""
    return math.ceil(num_tokens * degree * (1 - (1 - 1 / degree) ** top_k))


class _Exchange:
    """Writes the nodes of one exchange in place of `node`."""

    def __init__(self, graph: fx.Graph, node: fx.Node):
        self.write, self.given = Writer(graph, node), arguments(node)
        axis, degree = self.given["axis"], self.given["degree"]
        place = place_on(axis, degree)
        if place.group is None:
            raise FtcError(f"axis {axis!r} of this graph is bound to no process group; call ftc.parallel.bind(program, group, axis={axis!r}) first")
        self.group, self.degree = place.group, degree
        self.x, self.weights = self.given["x"], self.given["weights"]
        self.rows = expected_rows(*self.weights.meta["val"].shape, degree)
        self._plan()

    def like(self, *shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def _plan(self) -> None:
        write, local = self.write, self.given["down"].meta["val"].shape[0]
        top_k = self.weights.meta["val"].shape[1]
        wide, counts = self.like(self.rows, min(top_k, local)), self.like(self.degree)
        plan = write(ftc_ops.exchange_plan.default, self.given["indices"], local, self.degree, like=(self.like(self.rows), wide, wide, counts))
        self.token, self.expert, self.slot, self.sent = (write.item(plan, i) for i in range(4))
        own = write(ftc_ops.exchange_counts.default, self.sent, self.x, like=counts)
        pending = write(c10d.all_to_all_single.default, own, [1] * self.degree, [1] * self.degree, self.group, like=counts)
        self.received = write(ftc_ops.exchange_read.default, write(c10d.wait_tensor.default, pending, like=counts), like=counts)

    def move(self, message: fx.Node, back: bool = False) -> fx.Node:
        """All-to-all of rows: there, or back to where they came from."""
        counts = (self.received, self.sent) if back else (self.sent, self.received)
        pending = self.write(ftc_ops.exchange_start.default, message, *counts, self.group, like=message.meta["val"])
        return self.write(c10d.wait_tensor.default, pending, like=message.meta["val"])

    def there(self, *values: fx.Node) -> list[fx.Node]:
        """The rows of `values` that came, their experts and weights."""
        parts = [*values, self.expert, self.weights]
        widths = [self.expert.meta["val"].shape[1] if p is self.weights else p.meta["val"].shape[1] for p in parts]
        message = self.write(
            ftc_ops.exchange_pack.default, list(values), self.weights, self.token, self.expert, self.slot, like=self.message(parts, widths)
        )
        return self.unpacked(self.move(message), parts, widths)

    def message(self, parts: list[fx.Node], widths: list[int]) -> Tensor:
        width = sum(w * p.meta["val"].element_size() for p, w in zip(parts, widths, strict=True))
        return self.like(self.rows, width, dtype=torch.uint8)

    def unpacked(self, message: fx.Node, parts: list[fx.Node], widths: list[int]) -> list[fx.Node]:
        dtypes = [p.meta["val"].dtype for p in parts]
        likes = [self.like(self.rows, w, dtype=d) for w, d in zip(widths, dtypes, strict=True)]
        found = self.write(ftc_ops.exchange_unpack.default, message, widths, dtypes, like=likes)
        return [self.write.item(found, i) for i in range(len(parts))]

    def held(self) -> list:
        return [self.given.get(name) for name in ("gate_up", "down", "gate_up_bias", "down_bias")]

    def options(self) -> list:
        return [self.given.get("activation", "silu"), list(self.given.get("constants", ())), self.given.get("weight_on_input", False)]

    def summed(self, rows: fx.Node) -> fx.Node:
        value = self.x.meta["val"]
        return self.write(ftc_ops.exchange_sum.default, rows, self.token, self.sent, value.shape[0], value.dtype, like=value)


def _forward(graph: fx.Graph, node: fx.Node) -> None:
    exchange = _Exchange(graph, node)
    rows, expert, weight = exchange.there(exchange.x)
    fused = exchange.given.get("fused", False)
    done = exchange.write(
        ftc_ops.exchange_experts.default, rows, expert, weight, *exchange.held(), *exchange.options(), fused, like=rows.meta["val"]
    )
    exchange.write.replace(exchange.summed(exchange.move(done, back=True)))


def _backward(graph: fx.Graph, node: fx.Node) -> None:
    exchange = _Exchange(graph, node)
    write, given = exchange.write, exchange.given
    grad_rows, rows, expert, weight = exchange.there(given["grad"], exchange.x)
    asked = [True, True, *given["want"][2:]]  # ranks have to agree on what returns, and one may hold frozen experts alone
    likes = (rows.meta["val"], weight.meta["val"], *node.meta["val"][2:])
    found = write(
        ftc_ops.exchange_experts_backward.default, grad_rows, rows, expert, weight, *exchange.held(), *exchange.options(), asked, given["fused"],
        like=likes,
    )  # fmt: skip
    dx, dw = write.item(found, 0), write.item(found, 1)
    pair = write(ftc_ops.exchange_pair.default, dx, dw, like=exchange.message([dx, dw], [p.meta["val"].shape[1] for p in (dx, dw)]))
    dx, dw = exchange.unpacked(exchange.move(pair, back=True), [dx, dw], [p.meta["val"].shape[1] for p in (dx, dw)])
    own = [exchange.summed(dx), write(ftc_ops.exchange_weights.default, dw, exchange.token, exchange.slot, exchange.weights, like=node.meta["val"][1])]
    results = [*own, *(write.item(found, i) for i in range(2, 6))]
    for user in list(node.users):
        user.replace_all_uses_with(results[user.args[1]])
        graph.erase_node(user)
    graph.erase_node(node)


BLOCKING[ftc_ops.expert_parallel_moe.default] = _forward
BLOCKING[ftc_ops.expert_parallel_moe_backward.default] = _backward
STARTS[ftc_ops.exchange_start.default] = Transfer(lambda node: str(node.args[3]))
