"""balance: losses that spread tokens over experts, and a bias that does it without a loss, for every router of a captured model.

    w, i = router(x);  moe(x, i, w)      ->      moe(x, i, balance(w, logits, i, tally))            ftc::balance: w itself, with a gradient for the logits
    v, i = topk(s)                       ->      i = topk(s + bias).indices;  v = gather(s, i)      with `loss_free`, where the model has no such bias

Every step moves the bias of an expert by `loss_free`, up where it had less than the mean load, down where more (Wang et al. 2024, arXiv:2408.15664,
algorithm 1): `ftc.train.balance`. It begins at zero and the losses only add to gradients, so logits and loss of the first step keep their bits, and
with all coefficients at zero so do the gradients: that is what the certificate shows. What the coefficients add is in `ftc.dialect.balance`.
"""

import operator
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import fx

from ftc.dialect.balance import tally_size
from ftc.rewrite.certificate import compared
from ftc.rewrite.edit import Editor
from ftc.rewrite.lens_add import AddBuffer
from ftc.rewrite.outcome import Declined, Match, Outcome, location
from ftc.rewrite.passes import Expectation, Pass
from ftc.rewrite.router_site import Router, chain_to, find_router, is_balanced, is_mixture, tokens_node

aten, ftc = torch.ops.aten, torch.ops.ftc


def _help(text: str) -> dict:
    return {"help": text}


@dataclass(frozen=True)
class Balance(Pass):
    """Balance of experts in training; see the module's docstring."""

    switch: float = field(default=0.0, metadata=_help("coefficient of the Switch loss; 0.01 is the paper's"))
    scope: Literal["batch", "pool"] = field(default="batch", metadata=_help("what f of the Switch loss is counted over: a microbatch, or the last steps"))
    sequence: float = field(default=0.0, metadata=_help("coefficient of the same loss by sequence; 0.0001 in DeepSeek-V3"))
    z: float = field(default=0.0, metadata=_help("coefficient of the router z-loss; 0.001 in ST-MoE"))
    loss_free: float = field(default=0.0, metadata=_help("by how much a step moves the selection bias of an expert; 0.001 is the paper's; 0: no bias"))
    dead_after: int = field(default=100, metadata=_help("an expert without a token in so many steps is reported"))

    name: ClassVar[str] = "balance"
    summary: ClassVar[str] = "spreads tokens over experts in training: Switch, sequence and z losses, or a selection bias; counts the load"
    contract: ClassVar[str] = "bitwise"
    inverse: ClassVar[bool] = True
    requires: ClassVar[tuple[str, ...]] = ("raise-moe",)
    default_expect: ClassVar[Expectation] = "all"

    def __post_init__(self):
        for name in ("switch", "sequence", "z", "loss_free"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} = {getattr(self, name)} must be 0 or more")
        if self.dead_after < 1:
            raise ValueError(f"dead_after = {self.dead_after} is not a number of steps; use 1 or more")

    def apply(self, graph: fx.Graph) -> Outcome:
        outcome = Outcome()
        for moe in [node for node in graph.nodes if is_mixture(node)]:
            if is_balanced(moe):
                outcome.already += 1
                continue
            try:
                self._balance(graph, moe, outcome)
            except Declined as declined:
                outcome.misses.append(declined.miss(moe))
        return outcome

    def _balance(self, graph: fx.Graph, moe: fx.Node, outcome: Outcome) -> None:
        router = find_router(moe)
        tokens_BTD = tokens_node(router) if self.sequence else None
        biased = bool(self.loss_free) and router.bias is None
        chain = chain_to(router) if biased else []  # everything that may decline stands before the first edit
        if biased:
            _add_bias(graph, router, chain, outcome)
        edit = Editor(graph, moe, router.product)
        tally = _buffer(edit, router, "balance_tally", "float64", tally_size(router.experts), outcome)
        logits = router.logits
        if logits.meta["val"].dim() != 2:
            logits = edit(aten.reshape.default, logits, [-1, router.experts])
        options = {"gate": router.gate, "switch": float(self.switch), "sequence": float(self.sequence), "z": float(self.z), "scope": self.scope}
        if tokens_BTD is not None:
            length = tokens_BTD.meta["val"].shape[1]
            options["tokens_in_sequence"] = edit(aten.sym_size.int, tokens_BTD, 1) if isinstance(length, torch.SymInt) else int(length)
        weights = edit(ftc.balance.default, moe.args[2], logits, moe.args[1], tally, **options)
        moe.args = (*moe.args[:2], weights, *moe.args[3:])
        detail = {"gate": router.gate, "experts": router.experts, "top_k": int(weights.meta["val"].shape[1]), "router": str(router.weight.target)}
        detail["bias"] = "added" if biased else str(router.bias.target) if router.bias is not None else "none"
        outcome.matches.append(Match("router", (weights.name,), detail, location(moe)))

    def prove(self, before: fx.Graph, after: fx.Graph, earlier: list[dict] | None = None) -> list[dict]:
        """Outputs and gradients of the rewritten graph with all coefficients at zero against those of the original."""
        from ftc.rewrite.pipeline import copy_graph

        lenses = self.apply(copy_graph(before)).lenses
        silent = copy_graph(after)
        for node in silent.nodes:
            if node.target is ftc.balance.default:
                node.kwargs = node.kwargs | dict.fromkeys(("switch", "sequence", "z"), 0.0)
        return compared(before, silent, lenses, earlier)


def _buffer(edit: Editor, router: Router, word: str, dtype: str, size: int, outcome: Outcome, exact: bool = True) -> fx.Node:
    """A new buffer [size] beside the router's weight, and its lens."""
    owner = str(router.weight.target).rpartition(".")[0]
    taken = {node.target for node in edit.graph.nodes if node.op == "get_attr"}
    name, number = f"{owner}.{word}".removeprefix("."), 0
    while name in taken:
        number += 1
        name = f"{owner}.{word}_{number}".removeprefix(".")
    outcome.lenses.append(AddBuffer(name, str(router.weight.target), (size,), dtype, exact))
    node = edit.attribute(name, [size], router.weight)
    with node.meta["val"].fake_mode:
        node.meta["val"] = torch.empty([size], dtype=getattr(torch, dtype), device=node.meta["val"].device)
    return node


def _add_bias(graph: fx.Graph, router: Router, chain: list[fx.Node], outcome: Outcome) -> None:
    """Let the top-k choose by scores + bias; what it gives in values are those of the scores alone."""
    topk = router.topk
    edit = Editor(graph, topk)
    bias = _buffer(edit, router, "balance_bias", "float32", router.experts, outcome, exact=False)  # without what it learns, others are chosen
    plain = topk.args[0]
    copies = edit.copy(chain, {router.scores: edit(aten.add.Tensor, router.scores, bias)})
    chosen = edit(aten.topk.default, copies[plain], *topk.args[1:], **topk.kwargs)
    indices = edit(operator.getitem, chosen, 1)
    values = edit(aten.gather.default, plain, -1, indices)
    for user in list(topk.users):
        user.replace_all_uses_with(indices if user.args[1] == 1 else values)
        graph.erase_node(user)
    graph.erase_node(topk)
    for node in (values, indices, chosen):
        if not node.users:
            graph.erase_node(node)
