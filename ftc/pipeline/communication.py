"""What in a graph is communication: a node that starts a transfer, and a node that waits for it; and blocking operators made into such pairs.

A collective of PyTorch's functional kind is such a pair already: `pending = all_gather_into_tensor(...)`, `value = wait_tensor(pending)`. Between the two
other work can run. Operators that do both at once (`ftc::expert_parallel_moe`, `ftc::synthetic_exchange`) are replaced by `lowered`.

A transfer runs on a *channel*: the process group, whose collectives follow one another, or the copy engine of the synthetic exchange.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import fx

from ftc.pipeline.merge_trace import Half, node_bytes

_c10d = torch.ops._c10d_functional
_FUNCTIONAL = (
    _c10d.all_reduce,
    _c10d.all_gather_into_tensor,
    _c10d.reduce_scatter_tensor,
    _c10d.all_to_all_single,
    _c10d.broadcast,
    _c10d.all_reduce_coalesced,
    _c10d.all_gather_into_tensor_coalesced,
    _c10d.reduce_scatter_tensor_coalesced,
)


@dataclass(frozen=True)
class Transfer:
    """Of an operator that starts a transfer: the channel, by its node, and the operator that waits for it."""

    channel: Callable[[fx.Node], str]
    wait: torch._ops.OpOverload = _c10d.wait_tensor.default


# The process group is the last argument of every functional collective.
STARTS: dict[torch._ops.OpOverload, Transfer] = {packet.default: Transfer(lambda node: str(node.args[-1])) for packet in _FUNCTIONAL}
# Of an operator that starts and waits in one: the function that writes the pair in its place, (graph, node) -> None.
BLOCKING: dict[torch._ops.OpOverload, Callable[[fx.Graph, fx.Node], None]] = {}


def is_start(node: fx.Node) -> bool:
    """Whether a node starts a transfer; what it returns may be read by a wait alone."""
    return node.op == "call_function" and node.target in STARTS


def is_wait(node: fx.Node) -> bool:
    return node.op == "call_function" and any(node.target is transfer.wait for transfer in STARTS.values())


def channel_of(start: fx.Node) -> str:
    """What a transfer runs on; those of one channel follow one another."""
    return STARTS[start.target].channel(start)


def start_of(wait: fx.Node) -> fx.Node | None:
    """The node that started what `wait` waits for; None where the graph was given the pending tensor."""
    node = wait.args[0]
    while node.op == "call_function" and node.target is operator.getitem:  # of a coalesced collective
        node = node.args[0]
    return node if is_start(node) else None


def moved_bytes(start: fx.Node) -> int:
    """Bytes that a transfer moves through a rank's link: what is sent or what comes back, whichever is more; a reduction of all counts twice."""
    whole = max(node_bytes(start), sum(node_bytes(operand) for operand in start.all_input_nodes))
    return 2 * whole if start.target in (_c10d.all_reduce.default, _c10d.all_reduce_coalesced.default) else whole


def lowered(half: Half) -> Half:
    """A copy of `half` in which every blocking operator is a start, a wait and what is computed around them.

    Same results bit for bit. FtcError where an operator's axis is not bound to a process group.
    """
    import ftc.pipeline.expert_exchange
    import ftc.pipeline.synthetic_exchange  # noqa: F401 - registers its operators as blocking ones

    new = half.copy()
    for node in list(new.graph.nodes):
        if node.op == "call_function" and node.target in BLOCKING:
            BLOCKING[node.target](new.graph, node)
    new.graph.eliminate_dead_code()
    new.graph.lint()
    return new


class Writer:
    """Adds nodes before one that is going to be replaced. Each is told what its value looks like (a tensor, or several, on the meta device)."""

    def __init__(self, graph: fx.Graph, before: fx.Node):
        self.graph, self.before = graph, before

    def __call__(self, target, *args, like, **kwargs) -> fx.Node:
        with self.graph.inserting_before(self.before):
            node = self.graph.call_function(target, args, kwargs)
        node.meta["val"] = like
        return node

    def item(self, node: fx.Node, index: int) -> fx.Node:
        return self(operator.getitem, node, index, like=node.meta["val"][index])

    def replace(self, value: fx.Node) -> None:
        """Put `value` in the place of the node; its value stays known by the node's."""
        value.meta["val"] = self.before.meta["val"]
        self.before.replace_all_uses_with(value)
        self.graph.erase_node(self.before)
