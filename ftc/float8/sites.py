"""Products of a graph that could run in float8: where they stand, what they multiply, and what they are for.

    linear      aten.linear(x, W[, b]);  x @ W^T, x @ V, addmm(b, x, V) with a parameter W [F, D] or V [D, F]
    experts     ftc::moe and ftc::fused_moe, both products of every expert
    head        a product in the shell (the graph around the regions) from which the results come without another product between
    router      a product from which a choice of experts (topk, the indices or weights of ftc::moe) comes without another product between
"""

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from ftc.rewrite.edit import is_parameter, linear_operands

aten, ftc = torch.ops.aten, torch.ops.ftc
EXPERTS = {ftc.moe.default, ftc.fused_moe.default}
TRANSPOSES = {aten.t.default, aten.numpy_T.default, aten.transpose.int, aten.permute.default}
_CHOICES = {aten.topk.default, aten.sort.default, aten.argmax.default}
_ATTENTION = {aten.scaled_dot_product_attention.default}


@dataclass(frozen=True)
class Site:
    """A product x [..., k] W^T, W [n, k]. `weight`: the node of the parameter; `stored`: "FD" as in linear, "DF" where the parameter is W^T.
    `experts`: how many weights stand in one (0: a plain product); then k and n are those of the down projection."""

    node: fx.Node
    x: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    k: int
    n: int
    role: str = "product"
    stored: str = "FD"
    experts: int = 0

    @property
    def name(self) -> str:
        return str(self.weight.target)


def find_sites(graph: fx.Graph) -> list[Site]:
    """All products of activations and parameters, in the order of the graph."""
    shell = any(node.op == "call_module" or node.target is aten.embedding.default for node in graph.nodes)
    found = []
    for node in graph.nodes:
        operands = _operands(node)
        if operands is None:
            continue
        x, weight, bias, stored, experts = operands
        n, k = (int(s) for s in (weight.meta["val"].shape[-2:] if stored == "FD" else weight.meta["val"].shape[-2:][::-1]))
        found.append(Site(node, x, weight, bias, k, n, _role(node, shell), stored, experts))
    return found


def _operands(node: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node | None, str, int] | None:
    if node.op != "call_function" or not isinstance(node.meta.get("val"), Tensor):
        return None
    if node.target is aten.linear.default:
        x, weight, bias = linear_operands(node)
        return (x, weight, bias, "FD", 0) if is_parameter(weight) else None
    if node.target in EXPERTS:
        down = node.args[4]
        return (node.args[0], down, None, "FD", int(down.meta["val"].shape[0])) if is_parameter(down) else None
    bias = None
    if node.target in (aten.mm.default, aten.matmul.default):
        x, right = node.args
    elif node.target is aten.addmm.default and not node.kwargs:
        bias, x, right = node.args
        if not isinstance(bias, fx.Node) or bias.meta["val"].dim() != 1:
            return None
    else:
        return None
    if not isinstance(x, fx.Node) or is_parameter(x) or right.meta["val"].dim() != 2:
        return None
    if right.target in TRANSPOSES and is_parameter(right.args[0]):
        return x, right.args[0], bias, "FD", 0
    return (x, right, bias, "DF", 0) if is_parameter(right) else None


def _role(node: fx.Node, shell: bool) -> str:
    if node.target in EXPERTS:
        return "experts"
    seen, stack, head = {node}, [node], False
    while stack:
        current = stack.pop()
        for user in current.users:
            if user.target in _CHOICES or (user.target in EXPERTS and current in user.args[1:3]):
                return "router"
            if user.op == "output" or user.target in (aten.cross_entropy_loss.default, aten.nll_loss_nd.default):
                head = shell
                continue
            if user in seen or user.op == "call_module" or _operands(user) is not None or user.target in _ATTENTION:
                continue
            seen.add(user)
            stack.append(user)
    return "head" if head else "product"
