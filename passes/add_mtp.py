"""add-mtp: modules that predict the tokens after the next one, and their loss, on any captured decoder.

Sequential (DeepSeek-V3 report, 2024, section 2.2, equations 21 to 25), depth k = 1 .. D, for every position i:

    h_i^k = Block_k(M_k [RMSNorm(h_i^(k-1)); RMSNorm(Emb(t_(i+k)))])        h^0: what leaves the model's last block
    p(t_(i+k+1)) = softmax(Head(Norm_k(h_i^k)))                             embedding and head are the model's own
    loss = L^0 + weight / D * sum_k L^k,    L^k = sum_i -log p(t_(i+k+1)) / (number of labels of L^0)

Parallel (Gloeckle et al. 2024): h^k = Block_k(what enters the model's last block), for all k alike.

`target = "model"` trains the modules towards what the model itself says there, softmax of its logits at i + k without a gradient,
in place of the label: -sum_v p(v) log p^k(v). That is what a draft is asked for, and it wastes nothing on what neither can know.

Block_k has the code of the model's last block and Norm_k stands for everything between it and the head, both with parameters
of their own that begin as copies. The next-token loss and the logits keep their bits: that is what the certificate shows.
A call without labels does not compute the modules; `program.with_extras` returns their logits.
"""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import fx

from ftc.capture.results import add_results, name_result, output_node
from ftc.rewrite.edit import Editor, is_parameter
from ftc.rewrite.lens_add import Add
from ftc.rewrite.loss_terms import LossTerm, find_loss_term
from ftc.rewrite.outcome import Declined, Match, NewRegion, Outcome, location
from ftc.rewrite.passes import Pass
from ftc.rewrite.shell_parts import ShellParts, ancestors, descendants, find_parts
from ftc.rewrite.shifted_labels import continues, labels_of, shifted

aten = torch.ops.aten
NAME = "mtp"
EPS = 1e-6
# How the projection begins, over [hidden; embedding] of unit mean square: as the embedding of the newest token with some of the
# hidden states. 60 steps of benchmarks/mtp.py, one seed: 60% accepted and 18.9% right, against 46% and 17.4% for (1, 1).
SCALES = (0.25, 1.0)


def is_mtp(name: str) -> bool:
    """Whether a region or parameter belongs to the modules that this pass adds."""
    return name.startswith(f"{NAME}.")


@dataclass(frozen=True)
class AddMtp(Pass):
    """Multi-token prediction; see the module's docstring."""

    depth: int = field(default=1, metadata={"help": "how many tokens after the next one are predicted"})
    kind: Literal["sequential", "parallel"] = field(default="sequential", metadata={"help": "DeepSeek-V3's modules or Meta's heads"})
    weight: float = field(default=0.3, metadata={"help": "of the mean of the added losses, where the model returns the loss"})
    init: Literal["copy", "random"] = field(default="copy", metadata={"help": "blocks begin as the last block, or with matrices drawn anew"})
    target: Literal["labels", "model"] = field(default="labels", metadata={"help": "what they learn: the text, or the model's own distribution"})
    end_of_text: int | None = field(default=None, metadata={"help": "token id between documents; nothing is predicted across it"})
    seed: int = field(default=0, metadata={"help": "for init = 'random'"})

    name: ClassVar[str] = "add-mtp"
    summary: ClassVar[str] = "modules that predict further tokens, trained beside the next-token loss, which keeps its bits"
    contract: ClassVar[str] = "bitwise"
    inverse: ClassVar[bool] = True
    sees_calls: ClassVar[bool] = True
    trained_by: ClassVar[str] = "mtp"

    def __post_init__(self):
        if self.depth < 1:
            raise ValueError(f"depth = {self.depth} is not a number of modules; use 1 or more")
        if not self.weight >= 0:
            raise ValueError(f"weight = {self.weight} must be 0 or more")

    def apply(self, graph: fx.Graph) -> Outcome:
        outcome = Outcome(already=sum(n.op == "call_module" and is_mtp(str(n.target)) for n in graph.nodes))
        is_shell = any(n.op == "call_module" or n.target is aten.embedding.default for n in graph.nodes)
        if outcome.already or not is_shell:
            return outcome
        try:
            parts = find_parts(graph)
            if str(parts.hidden.meta["val"].shape[:2]) != str(parts.ids.meta["val"].shape):
                raise Declined("the hidden states are not [batch, tokens, width] for token ids [batch, tokens]", parts.hidden)
            term = find_loss_term(graph, parts.loss) if parts.loss is not None else None
            _Modules(self, graph, parts, outcome).add(term)
        except Declined as declined:
            outcome.misses.append(declined.miss(output_node(graph)))
        return outcome


class _Modules:
    """Adds the modules to one graph; the outcome gets their parameters, regions and results."""

    def __init__(self, options: AddMtp, graph: fx.Graph, parts: ShellParts, outcome: Outcome):
        self.options, self.graph, self.parts, self.outcome = options, graph, parts, outcome
        self.edit = Editor(graph, output_node(graph), parts.head)
        end = parts.logits if parts.loss is None else parts.loss
        inner = descendants([parts.hidden]) & ancestors([end]) - {parts.hidden, parts.loss}
        self.exit = sorted(inner)  # from the last block to the logits, or to what the cross-entropy takes
        self.own = _parameter_nodes(inner & ancestors([parts.head]) - {parts.head})

    def add(self, term: LossTerm | None) -> None:
        labels = ok = None
        sequential = self.options.kind == "sequential"
        results = {"mtp_hidden_0": self.parts.hidden} if term is None and sequential else {}
        if term is not None:
            labels = labels_of(self.edit, self.parts, term)
            ok = continues(self.edit, self.parts, labels, term.ignore_index, self.options.end_of_text)
        hidden = self.parts.hidden
        for k in range(1, self.options.depth + 1):
            if sequential:
                following = self.edit(aten.roll.default, self.parts.ids, [-k], [1])
            hidden = self._block(k, self._combined(k, hidden, following) if sequential else self.parts.trunk)
            exits = self.edit.copy(self.exit, self._own_norm(k) | {self.parts.hidden: hidden})
            if term is None:
                results |= {f"mtp_next_{k}": following, f"mtp_hidden_{k}": hidden} if sequential else {}
                results[f"mtp_logits_{k}"] = exits[self.parts.logits]
            else:
                labels = shifted(self.edit, labels, ok, term.ignore_index)
                ahead = k if self.options.target == "model" else 0
                results[f"mtp_loss_{k}"] = term.again(self.edit, exits, self._like_the_terms(labels, term), ahead)
        if term is not None:
            results["mtp_total_loss"] = self._total(term, list(results.values()))
        places = add_results(self.graph, results)
        if term is not None:
            self.outcome.answers = {term.place: places["mtp_total_loss"]}
            name_result(self.graph, "next_token_loss", term.place)
        detail = {"depth": self.options.depth, "kind": self.options.kind, "block": str(self.parts.last.target)}
        self.outcome.matches.append(Match("mtp", tuple(n.name for n in results.values()), detail, location(self.parts.head)))

    def _combined(self, k: int, hidden: fx.Node, following: fx.Node) -> fx.Node:
        """M_k [RMSNorm(h); RMSNorm(Emb(t_(i+k)))]"""
        lookup = self.parts.embedding
        with self.graph.inserting_before(self.edit.anchor):
            embedded = self.graph.node_copy(lookup)
        embedded.replace_input_with(lookup.args[1], following)
        embedded = self._cast(embedded, hidden)
        widths = tuple(int(node.meta["val"].shape[-1]) for node in (hidden, embedded))
        normed = []
        for word, node, width in zip(("hidden", "embedding"), (hidden, embedded), widths, strict=True):
            gain = self._parameter(f"{NAME}.{k - 1}.norm_{word}.weight", (width,), "ones")
            normed.append(self.edit(aten.rms_norm.default, node, [width], gain, EPS))
        shape = (widths[0], sum(widths))
        if self.options.init == "random":
            matrix = self._parameter(f"{NAME}.{k - 1}.proj.weight", shape, "normal", scales=(sum(widths) ** -0.5,))
        else:
            matrix = self._parameter(f"{NAME}.{k - 1}.proj.weight", shape, "identity", scales=SCALES, widths=widths)
        return self.edit(aten.linear.default, self.edit(aten.cat.default, normed, -1), matrix)

    def _cast(self, node: fx.Node, like: fx.Node) -> fx.Node:
        dtype = like.meta["val"].dtype
        return node if node.meta["val"].dtype == dtype else self.edit(aten.to.dtype, node, dtype)

    def _parameter(self, name: str, shape: tuple[int, ...], fill: str, like: fx.Node | None = None, **options) -> fx.Node:
        like = like or self.parts.embedding.args[0]
        self.outcome.lenses.append(Add(name, str(like.target), fill, shape, seed=self.options.seed, **options))
        return self.edit.attribute(name, shape, like)

    def _block(self, k: int, entering: fx.Node) -> fx.Node:
        """A call like that of the last block, of a region of its own; returns its hidden states."""
        last, name = self.parts.last, f"{NAME}.{k - 1}.block"
        self.outcome.regions.append(NewRegion(name, str(last.target), self.options.init, self.options.seed))
        replaced = self.edit.copy([last], {self.parts.trunk: entering})
        replaced[last].target = name
        chain, node = [], self.parts.hidden
        while node is not last:  # what picks the hidden states out of the block's results
            chain.append(node)
            node = node.args[0]
        return self.edit.copy(chain[::-1], replaced)[self.parts.hidden]

    def _own_norm(self, k: int) -> dict[fx.Node, fx.Node]:
        """The parameters between the last block and the head, once more, and what is computed from them."""
        parameters = [node for node in self.own if node.op == "get_attr"]
        names = [str(node.target) for node in parameters]
        one_module = len({name.rpartition(".")[0] for name in names}) == 1
        replaced = {}
        for node, name in zip(parameters, names, strict=True):
            new = f"{NAME}.{k - 1}.norm.{name.rpartition('.')[2]}" if one_module else f"{NAME}.{k - 1}.{name}"
            replaced[node] = self._parameter(new, tuple(node.meta["val"].shape), "copy", like=node)
        return self.edit.copy([node for node in self.own if node.op != "get_attr"], replaced)

    def _like_the_terms(self, labels: fx.Node, term: LossTerm) -> fx.Node:
        return labels if term.labels.meta["val"].dim() == 2 else self.edit(aten.reshape.default, labels, [-1])

    def _total(self, term: LossTerm, losses: list[fx.Node]) -> fx.Node:
        added = losses[0]
        for loss in losses[1:]:
            added = self.edit(aten.add.Tensor, added, loss)
        scaled = self.edit(aten.mul.Tensor, added, self.options.weight / len(losses))
        return self.edit(aten.add.Tensor, term.result, scaled)


def _parameter_nodes(nodes: set[fx.Node]) -> list[fx.Node]:
    """What `nodes` read that depends on parameters alone, in order: parameters, and nodes computed from them."""
    around = {parent for node in nodes for parent in node.all_input_nodes} - nodes
    found = set()
    for node in around:
        above = ancestors([node])
        if any(is_parameter(n) for n in above) and all(n.op == "get_attr" or n.op == "call_function" for n in above):
            found |= {n for n in above if any(is_parameter(m) for m in ancestors([n]))}
    return sorted(found)
