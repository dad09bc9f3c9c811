"""Positions 0 .. T - 1 in a graph become the positions of tokens that continue B texts of different lengths.

What hangs on positions alone (rotary tables, learned positions) has a dim for the tokens and none for the sequences. It is computed for all
B T tokens in a row, so that every operator keeps its rank and its spelling, and folded to [B, T] where it meets what has a batch:

    cos(arange(T)[None] f)  [1, T, K]      ->      cos(positions[None] f)  [1, B T, K]      ->      x [B, T, D] * fold(.) [B, T, K]

Right only if each token's value hangs on its own position; that is measured, with positions far apart, whole and token by token.
"""

import operator
from dataclasses import dataclass

import sympy
import torch
from torch import Tensor, fx

import ftc.dialect  # noqa: F401  registers ftc::token_positions
from ftc.rewrite import probe
from ftc.rewrite.edit import Editor
from ftc.rewrite.outcome import Declined
from ftc.rewrite.probe import aten
from ftc.rewrite.recognise import fake_value
from ftc.rewrite.rope_tables import ancestors

_FILLS = {aten.full.default, aten.ones.default, aten.zeros.default}
_FARTHEST = (1_000_003, 100_003, 10_007, 1_009, 127, 31, 15, 7)  # where a table ends, the largest that it has


@dataclass(frozen=True)
class Texts:
    """The size symbols of a graph that continues texts: number of sequences, tokens given of each."""

    batch: sympy.Symbol
    tokens: sympy.Symbol

    @property
    def row(self) -> sympy.Expr:
        """All tokens in a row."""
        return self.batch * self.tokens


def expressions(value: object) -> list[sympy.Expr]:
    """The sizes of a tensor as sympy expressions."""
    return [size_expression(size) for size in value.shape] if isinstance(value, Tensor) else []


def size_expression(size: object) -> sympy.Expr:
    return size.node.shape_env.replace(size.node.expr) if isinstance(size, torch.SymInt) else sympy.Integer(size)


def has_batch(node: fx.Node, texts: Texts) -> bool:
    """Whether a dim of the node's value is the sequences'."""
    return any(texts.batch in expr.free_symbols and expr != texts.row for expr in expressions(node.meta.get("val")))


def token_dims(node: fx.Node, texts: Texts) -> list[int]:
    """The dims of the node's value that are the tokens'; Declined where one has a size made of their number."""
    found = []
    for dim, expr in enumerate(expressions(node.meta.get("val"))):
        if expr == texts.tokens:
            found.append(dim)
        elif texts.tokens in expr.free_symbols and expr != texts.row:
            raise Declined(f"dim {dim} has the size {expr}, not one place for each token", node)
    return found


class Positions:
    """Rewrites the positions of one graph, in place. `cached` and `new` are its nodes [B] that say where the texts stand."""

    def __init__(self, graph: fx.Graph, texts: Texts, cached: fx.Node, new: fx.Node):
        self.graph, self.texts = graph, texts
        first = next(n for n in graph.nodes if n.op == "placeholder" and has_batch(n, texts) and token_dims(n, texts) == [1])
        start = next(n for n in graph.nodes if n.op not in ("placeholder", "get_attr"))
        self.edit = Editor(graph, start)
        self.batch, self.tokens = self.edit(aten.sym_size.int, first, 0), self.edit(aten.sym_size.int, first, 1)
        self.row = self.edit(operator.mul, self.batch, self.tokens)
        self.flat: dict[fx.Node, int] = {}  # what hangs on positions alone, with its dim of tokens
        self.folded: dict[tuple[fx.Node, int], fx.Node] = {}  # by row and the dim that its tokens get
        self.positions: fx.Node | None = None
        self.made = {self.batch, self.tokens, self.row}
        self.cached, self.new = cached, new

    def rewrite(self) -> int:
        """Rewrite; returns how many roots (counts and slices of tables) there were."""
        roots = 0
        self._one_size()
        for node in list(self.graph.nodes):
            if node in self.made or node.op == "output":
                continue
            if node.op == "placeholder":
                self._input(node)
            elif node.op == "call_function" and isinstance(node.meta.get("val"), Tensor) and self._hangs_on_positions(node):
                roots += self._follow(node)
        self._infer(set(self.flat), follow=False)
        self._fold()
        self._infer({user for folded in self.folded.values() for user in folded.users}, follow=True)
        self._check_tokens_apart()
        return roots

    def _one_size(self) -> None:
        """Let all who read the number of tokens or sequences read it of one input, which keeps its form."""
        for node in list(self.graph.nodes):
            value = node.meta.get("val")
            if node.op == "call_function" and node not in self.made and isinstance(value, torch.SymInt):
                same = {self.texts.tokens: self.tokens, self.texts.batch: self.batch}.get(size_expression(value))
                if same is not None:
                    node.replace_all_uses_with(same)

    def _input(self, node: fx.Node) -> None:
        dims = token_dims(node, self.texts)
        if not dims or has_batch(node, self.texts):
            return
        if len(dims) > 1:
            raise Declined("it takes a mask of tokens by tokens as an input", node)
        self.flat[node] = dims[0]
        sizes = list(node.meta["val"].shape)
        sizes[dims[0]] = self.row.meta["val"]
        with node.meta["val"].fake_mode:
            node.meta["val"] = torch.empty(sizes, dtype=node.meta["val"].dtype, device=node.meta["val"].device)

    def _hangs_on_positions(self, node: fx.Node) -> bool:
        """Whether the value has a dim of tokens and comes from sizes, parameters and positions alone."""
        parents = node.all_input_nodes
        if self._is_data(node):
            return False
        return any(parent in self.flat for parent in parents) or bool(token_dims(node, self.texts))

    def _is_data(self, node: fx.Node) -> bool:
        if node in self.flat or node.op == "get_attr" or not isinstance(node.meta.get("val"), Tensor | tuple | list):
            return False
        if node.op == "placeholder" or self._of_all_tokens(node):
            return True
        return any(self._is_data(parent) for parent in node.all_input_nodes)

    def _of_all_tokens(self, node: fx.Node) -> bool:
        """Whether a dim counts the tokens of all sequences together, as where experts sort them: nobody's position in a text."""
        both = {self.texts.batch, self.texts.tokens}
        return node not in self.made and any(both <= expr.free_symbols for expr in expressions(node.meta.get("val")))

    def _follow(self, node: fx.Node) -> int:
        dims = token_dims(node, self.texts)
        if not dims:
            raise Declined("it hangs on the length of the text", node)
        if has_batch(node, self.texts) or len(dims) > 1:
            what = "repeated for the sequences before they meet them" if has_batch(node, self.texts) else "compared with each other"
            raise Declined(f"positions are {what}", node)
        self.flat[node] = dims[0]
        if any(parent in self.flat for parent in node.all_input_nodes) or node.target in _FILLS:
            self._lengthen(node)
            return 0
        if node.target is aten.slice.Tensor and not node.args[2]:
            self._replace(node, aten.index_select.default, node.args[0], dims[0], self._counted())
            return 1
        if not self._counts(node):
            raise Declined("it is made of the length of the text, and does not count its tokens", node)
        counted = self._counted()
        if node.meta["val"].dtype != torch.int64:
            counted = self.edit(aten.to.dtype, counted, node.meta["val"].dtype)
        self._replace(node, aten.alias.default, counted)
        return 1

    def _lengthen(self, node: fx.Node) -> None:
        def longer(item):
            if isinstance(item, fx.Node) and isinstance(item.meta.get("val"), torch.SymInt):
                expr = size_expression(item.meta["val"])
                if expr == self.texts.tokens:
                    return self.row
                if self.texts.tokens in expr.free_symbols:
                    raise Declined("it hangs on the length of the text", node)
            return item

        node.args = fx.node.map_aggregate(node.args, longer)
        node.kwargs = fx.node.map_aggregate(node.kwargs, longer)

    def _counts(self, node: fx.Node) -> bool:
        """Whether the value is 0 .. T - 1, for two lengths; the node has only sizes and numbers as arguments."""
        if len(expressions(node.meta["val"])) != 1 or any(isinstance(n.meta.get("val"), Tensor) for n in node.all_input_nodes):
            return False
        for length in (5, 9):
            sizes = {self.texts.tokens: length}
            args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), lambda n, s=sizes: probe.concrete(n.meta["val"], s))
            if node.target(*args, **kwargs).tolist() != list(range(length)):
                return False
        return True

    def _counted(self) -> fx.Node:
        if self.positions is None:
            self.positions = self.edit(torch.ops.ftc.token_positions.default, self.cached, self.new, self.tokens)
            self.made.add(self.positions)
            self.flat[self.positions] = 0
        return self.positions

    def _replace(self, node: fx.Node, target, *args) -> None:
        edit = Editor(self.graph, node)
        new = edit(target, *args)
        self.made.add(new)
        self.flat[new] = self.flat.pop(node)
        node.replace_all_uses_with(new)
        self.graph.erase_node(node)

    def _fold(self) -> None:
        """Where a row of tokens meets what has a batch, it gets one too."""
        for node, dim in list(self.flat.items()):
            for user in list(node.users):
                if user not in self.flat and user.op != "output" and isinstance(user.meta.get("val"), Tensor):
                    self._fold_for(node, dim, user)

    def _fold_for(self, node: fx.Node, dim: int, user: fx.Node) -> None:
        sizes, place = expressions(node.meta["val"]), expressions(user.meta["val"])
        behind = len(sizes) - dim  # dims from the tokens' on
        at = len(place) - behind
        if any(size != 1 for size in sizes[:dim]) or at < 1 or place[0] != self.texts.batch or place[at] != self.texts.tokens:
            raise Declined("positions do not meet [batch, ..., tokens, ...] in the way that broadcasting would fold them", user)
        rest = [node.meta["val"].shape[i] for i in range(dim + 1, len(sizes))]
        if (node, at) not in self.folded:
            anchor = node.next if node.op == "call_function" else self.edit.anchor
            edit = Editor(self.graph, anchor, node)
            self.folded[node, at] = edit(aten.reshape.default, node, [self.batch, *[1] * (at - 1), self.tokens, *rest])
        user.replace_input_with(node, self.folded[node, at])

    def _infer(self, changed: set[fx.Node], follow: bool) -> None:
        """The values of `changed` anew, with `follow` also of all that hangs on one of another size; Declined where a node does not take its operands any more."""
        changed = set(changed)
        for node in self.graph.nodes:
            if node.op != "call_function" or node not in changed:
                continue
            before = node.meta.get("val")
            try:
                node.meta["val"] = fake_value(self.graph, node)
            except (RuntimeError, ValueError, TypeError, IndexError) as error:
                raise Declined(f"it does not take tokens of several texts in a row: {str(error).splitlines()[0]}", node) from error
            if follow and (not isinstance(before, Tensor) or expressions(before) != expressions(node.meta["val"])):
                changed |= set(node.users)

    def _check_tokens_apart(self) -> None:
        ends = [n for n in self.flat if n.op == "call_function" and any(u not in self.flat for u in n.users)]
        if not ends:
            return
        for farthest in _FARTHEST:
            generator = torch.Generator().manual_seed(farthest)
            places = torch.randint(0, farthest, (6,), generator=generator)
            places[2] = farthest
            try:
                together = self._values(places)
                apart = [self._values(places[i : i + 1]) for i in range(len(places))]
                break
            except (IndexError, RuntimeError):  # past the last row of a table
                continue
        else:
            raise Declined("what hangs on positions cannot be computed for single tokens", ends[0])
        for end in ends:
            for number, single in enumerate(apart):
                dim = self.flat[end]
                error = probe.relative_error(single[end].double(), together[end].narrow(dim, number, 1).double())
                if not error <= 1e-12:
                    raise Declined("what is computed for a position hangs on the other positions, or on the length of the text", end)

    def _values(self, places: Tensor) -> dict[fx.Node, Tensor]:
        """Every row of tokens, in float64, with these positions; inputs that are rows themselves are random."""
        sizes = {self.texts.batch: 1, self.texts.tokens: len(places)}
        values: dict[fx.Node, object] = {}
        symbolic = [n for n in self.graph.nodes if n.op == "get_attr" and any(not e.is_number for e in expressions(n.meta["val"]))]
        shapes = {str(n.target): torch.Size(probe.concrete(s, sizes) for s in n.meta["val"].shape) for n in symbolic}
        wanted = ancestors([n for n in self.flat if n.op == "call_function"], {self.batch, self.tokens, self.row, self.positions})
        read = {str(n.target) for n in wanted if n.op == "get_attr"}
        # Weights that no position reads would take minutes to draw in a large model.
        shapes |= {str(n.target): torch.Size([1]) for n in self.graph.nodes if n.op == "get_attr" and str(n.target) not in read}
        parameters = probe.random_parameters(self.graph, 0, shapes, torch.float64)
        with probe.lifted_defaults(), torch.no_grad():
            for node in self.graph.nodes:
                if node is self.positions:
                    values[node] = places
                elif node not in wanted:
                    continue
                elif isinstance(node.meta.get("val"), torch.SymInt):
                    values[node] = probe.concrete(node.meta["val"], sizes)
                elif node.op == "placeholder":
                    values[node] = self._row_input(node, places)
                elif node.op == "get_attr":
                    values[node] = parameters[str(node.target)]
                else:
                    args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), values.__getitem__)
                    values[node] = probe.call(node, args, kwargs, lifted=True)
        return values

    def _row_input(self, node: fx.Node, places: Tensor) -> Tensor:
        shape = [probe.concrete(s, {}) if isinstance(s, int) else len(places) for s in node.meta["val"].shape]
        counts = places.double().view([-1 if i == self.flat[node] else 1 for i in range(len(shape))])
        value = torch.cos(counts * 0.37 + 1.0).expand(shape)
        return value if node.meta["val"].is_floating_point() else counts.expand(shape).to(node.meta["val"].dtype)
