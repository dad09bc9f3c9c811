"""upcycle: every gated MLP becomes a mixture of experts that are copies of it (Komatsuzaki et al. 2023, arXiv:2212.05055).

    mlp(x) = sum_s shard_s(x)                                       g shards of its middle, one after the other; g = 1: the MLP itself
    sum_s sum_(e in top_(k / g) of group s) w_e copy_e(x)           E / g copies of shard s are group s; the w_e of a token sum to 1 in each group
    = mlp(x)                                                        as long as the copies are equal

So logits keep their values whatever the router says, and the router can start random: a token's choice tells copies apart from the first step on. In
each group w = softmax over the chosen logits, computed in float32. The shards' groups are the virtual groups of He et al. 2024 (arXiv:2410.07524),
whose weight scaling is in the sum: the weights of a token add up to g, not to 1.

`drop` draws a part of each copy anew (drop-upcycling, Nakamura et al. 2025, arXiv:2502.19261): experts differ at once, and logits do not keep their values.
"""

import dataclasses
import operator
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import fx

import ftc.dialect  # noqa: F401  registers ftc::moe
from ftc.rewrite.certificate import compared
from ftc.rewrite.edit import Editor, is_parameter, linear_operands
from ftc.rewrite.lens_add import Add
from ftc.rewrite.lens_upcycle import Upcycle
from ftc.rewrite.outcome import Declined, Match, Outcome, location, operation
from ftc.rewrite.passes import Pass

aten = torch.ops.aten
GATED, MOE, FUSED = torch.ops.ftc.gated.default, torch.ops.ftc.moe.default, torch.ops.ftc.fused_moe.default
LINEAR = aten.linear.default


@dataclass(frozen=True)
class UpcycleMlp(Pass):
    """Dense to mixture; see the module's docstring."""

    experts: int = field(metadata={"help": "number of experts E of each MLP"})
    top_k: int = field(default=2, metadata={"help": "experts a token"})
    granularity: int = field(default=1, metadata={"help": "an expert has this part of the MLP's middle (2: a half); each part has its own group of experts"})
    drop: float = field(default=0.0, metadata={"help": "share of each expert's middle that is drawn anew; 0.5 in the paper on drop-upcycling, 0: exact"})
    # Width 128, 200 steps: 3.375 nats at 0.2, 3.350 at 2, 3.356 at 11, one seed: copies part sooner where tokens choose firmly from the start.
    router_scale: float = field(default=2.0, metadata={"help": "standard deviation of the router's first logits over a normed token"})
    seed: int = field(default=0, metadata={"help": "of the router's first weights, and of what drop draws"})

    name: ClassVar[str] = "upcycle"
    summary: ClassVar[str] = "gated MLPs become mixtures of experts that begin as their copies"
    contract: ClassVar[str] = "exact"
    inverse: ClassVar[bool] = False
    requires: ClassVar[tuple[str, ...]] = ("raise-mlp",)

    def __post_init__(self):
        if self.experts < 2:
            raise ValueError(f"experts = {self.experts} is no mixture; use 2 or more")
        if not 1 <= self.granularity or self.experts % self.granularity:
            raise ValueError(f"granularity = {self.granularity} does not divide experts = {self.experts}: every part of an MLP gets as many copies")
        if self.top_k > self.experts:
            raise ValueError(f"top_k = {self.top_k} is more than experts = {self.experts}")
        if self.top_k % self.granularity or self.top_k < 2 * self.granularity:
            raise ValueError(
                f"top_k = {self.top_k} must be 2 or more times granularity = {self.granularity}: each of its groups gives a token as many experts, and the "
                "weight of a single one is 1 whatever the router says, which would never be trained"
            )
        if not 0 <= self.drop < 1:
            raise ValueError(f"drop = {self.drop} must be 0 or more and below 1")
        if not self.router_scale > 0:
            raise ValueError(f"router_scale = {self.router_scale} must be more than 0: equal scores would choose the same experts for every token")

    def apply(self, graph: fx.Graph) -> Outcome:
        outcome = Outcome(already=sum(node.target in (MOE, FUSED) for node in graph.nodes))
        for gated in [node for node in graph.nodes if node.target is GATED]:
            try:
                self._upcycle(graph, gated, _parts(gated), outcome)
            except Declined as declined:
                outcome.misses.append(declined.miss(gated))
        return outcome

    def prove(self, before: fx.Graph, after: fx.Graph, earlier: list[dict] | None = None) -> list[dict]:
        """The rewritten graph with nothing drawn anew, against the original."""
        from ftc.rewrite.pipeline import copy_graph

        plain = dataclasses.replace(self, drop=0.0)
        return compared(before, after, plain.apply(copy_graph(before)).lenses, earlier)

    def _upcycle(self, graph: fx.Graph, gated: fx.Node, parts: "_Mlp", outcome: Outcome) -> None:
        middle, width = (int(size) for size in parts.up[0].weight.meta["val"].shape)
        if middle % self.granularity:
            raise Declined(f"its middle of {middle} cannot be cut into granularity = {self.granularity} parts", gated)
        place = location(gated)
        edit = Editor(graph, parts.down.node, gated)
        lenses = self._lenses(graph, parts)
        first = parts.up[0].weight
        rows = middle // self.granularity
        shapes = {"gate_up": [self.experts, 2 * rows, width], "down": [self.experts, width, rows], "gate_up_bias": [self.experts, 2 * rows], "down_bias": [self.experts, width]}
        made = {role: edit.attribute(lens.target, shapes[role], first) for role, lens in lenses.items()}
        router_name = lenses["down"].target.rpartition(".")[0] + ".router"
        router = edit.attribute(router_name, [self.experts, width], first)
        x = parts.up[0].x if parts.up[0].x.meta["val"].dim() == 2 else edit(aten.reshape.default, parts.up[0].x, [-1, width])
        weights, indices = self._route(edit, edit(LINEAR, x, router))
        optional = [made.get("gate_up_bias"), made.get("down_bias")]
        while optional and optional[-1] is None:
            optional.pop()
        moe = edit(MOE, x, indices, weights, made["gate_up"], made["down"], *optional, activation=gated.args[2])
        result = moe
        if parts.down.node.meta["val"].dim() != 2:
            sizes = [edit(aten.sym_size.int, parts.up[0].x, dim) for dim in range(parts.up[0].x.meta["val"].dim() - 1)]
            result = edit(aten.reshape.default, moe, [*sizes, width])
        parts.down.node.replace_all_uses_with(result)
        graph.eliminate_dead_code()
        outcome.lenses += [*lenses.values(), Add(router_name, lenses["gate_up"].target, "normal", (self.experts, width), (self.router_scale / width**0.5,), (), self.seed)]
        detail = {"experts": self.experts, "top_k": self.top_k, "width": rows, "router": router_name}
        outcome.matches.append(Match("mlp", (moe.name,), detail, place))

    def _route(self, edit: Editor, logits: fx.Node) -> tuple[fx.Node, fx.Node]:
        """(weights, indices) [N, K], float32 and int64, from logits [N, E]."""
        if logits.meta["val"].dtype.itemsize < 4:
            logits = edit(aten.to.dtype, logits, torch.float32)
        groups, size = self.granularity, self.experts // self.granularity
        if groups > 1:
            logits = edit(aten.reshape.default, logits, [-1, groups, size])
        chosen = edit(aten.topk.default, logits, self.top_k // groups)
        values, indices = (edit(operator.getitem, chosen, i) for i in (0, 1))
        weights = edit(aten.softmax.int, values, -1)
        if groups > 1:
            offsets = edit(aten.arange.start_step, 0, self.experts, size, device=logits.meta["val"].device)
            indices = edit(aten.add.Tensor, indices, edit(aten.unsqueeze.default, offsets, -1))
            weights, indices = (edit(aten.reshape.default, node, [-1, self.top_k]) for node in (weights, indices))
        return weights, indices

    def _lenses(self, graph: fx.Graph, parts: "_Mlp") -> dict[str, Upcycle]:
        up, down = parts.up, parts.down
        parent = str(down.weight.target).rsplit(".", 2)[0] if str(down.weight.target).count(".") > 1 else "mlp"
        taken = {str(node.target) for node in graph.nodes if node.op == "get_attr"}
        owner, number = f"{parent}.experts", 0
        while any(name.startswith(f"{owner}.") for name in taken):
            number += 1
            owner = f"{parent}.experts{number}"
        common = {"num_experts": self.experts, "shards": self.granularity, "drop": self.drop, "seed": self.seed}
        found = {
            "gate_up": Upcycle(tuple(str(p.weight.target) for p in up), f"{owner}.gate_up", **common),
            "down": Upcycle((str(down.weight.target),), f"{owner}.down", along_columns=True, **common),
        }
        if up[0].bias is not None:
            found["gate_up_bias"] = Upcycle(tuple(str(p.bias.target) for p in up), f"{owner}.gate_up_bias", **common)
        if down.bias is not None:
            found["down_bias"] = Upcycle((str(down.bias.target),), f"{owner}.down_bias", whole=True, **common | {"drop": 0.0})
        return found



@dataclass
class _Product:
    node: fx.Node
    x: fx.Node
    weight: fx.Node
    bias: fx.Node | None


@dataclass
class _Mlp:
    """The products of a gated MLP: gate and up, and what multiplies the middle."""

    up: list[_Product]
    down: _Product


def _parts(gated: fx.Node) -> _Mlp:
    """The products around a gate. Declined where they are no MLP over parameters of its own."""
    up = [_product(node) for node in gated.args[:2]]
    if up[0].x is not up[1].x:
        raise Declined("gate and up are products of different tensors", up[1].node)
    if (up[0].bias is None) != (up[1].bias is None):
        raise Declined("only one of gate and up has a bias", up[1].node)
    users = [user for user in gated.users if user.op == "call_function"]
    if len(gated.users) != 1 or users[0].target is not LINEAR or users[0].args[0] is not gated:
        raise Declined("the gate's result goes elsewhere than into one product", gated)
    down = _product(users[0])
    for product in up:
        if len(product.node.users) > 1:
            raise Declined(f"{product.node.name} is no product of this MLP alone", product.node)
    if len({p.weight.target for p in (*up, down)}) < 3:
        raise Declined("two of its matrices are the same parameter", down.node)
    return _Mlp(up, down)


def _product(node: fx.Node) -> _Product:
    if node.target is not LINEAR:
        raise Declined(f"{operation(node)} stands where a product is expected; put upcycle before passes that fuse products", node)
    x, weight, bias = linear_operands(node)
    for parameter in (weight, bias):
        if parameter is not None and (not is_parameter(parameter) or len(parameter.users) > 1):
            raise Declined(f"{parameter.name} is no parameter of this product alone", node)
    return _Product(node, x, weight, bias)
