"""insert-kv-cache: attention over the tokens of a call becomes attention over a paged cache and those tokens.

    before   y[0 .. T-1] = f(x[0 .. T-1])                                          causal: y[t] hangs on x[0 .. t]
    after    y[c .. c+n-1] = f'(x[c .. c+n-1]; cache of c tokens), and the cache holds c + n

One graph is prefill (a chunk of any length) and decode (one token) for sequences of different lengths, each continued from where it stands.
The cache is no argument: the graph reads and writes tensors named `ftc_cache.*`, which `ftc.cache.PagedCache` puts beside the parameters. Positions
0 .. T-1 become those of the tokens given (`ftc.rewrite.token_positions`). All graphs of a program follow or none.

The proof compares texts whole, before, with the same texts in random chunks, after (`ftc.rewrite.continuation`); there are no gradients
through a cache that is written in place.
"""

import math
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import torch
from torch import fx

import ftc.dialect  # noqa: F401  registers ftc::paged_attention
from ftc.dialect import fp8_latent
from ftc.rewrite import continuation
from ftc.rewrite.continuation import STATE, longer_texts, texts_of
from ftc.rewrite.edit import Editor
from ftc.rewrite.lockstep import arguments
from ftc.rewrite.outcome import Declined, Match, Outcome, location
from ftc.rewrite.passes import Pass
from ftc.rewrite.token_positions import Positions, Texts, size_expression

aten, dialect = torch.ops.aten, torch.ops.ftc
SDPA, SOFTCAP, LATENT = aten.scaled_dot_product_attention.default, dialect.softcap_attention.default, dialect.latent_attention.default
PAGED = {dialect.paged_attention.default, dialect.paged_latent_attention.default}
LOSSES = {aten.cross_entropy_loss.default, dialect.chunk_cross_entropy.default}
QUANTISED = {"fp8": torch.float8_e4m3fn, "int8": torch.int8}
# Largest |difference| over the largest |output| of a graph with random weights: e4m3 keeps 4 bits of a number, int8 steps of 1/127 of a row's largest.
BOUNDS = {"fp8": 0.1, "int8": 0.03}


@dataclass(frozen=True)
class InsertKvCache(Pass):
    """Grouped-query attention caches keys and values; latent attention caches the latent and the rotated key that all heads share."""

    block_size: int = field(default=16, metadata={"help": "tokens in one block of the cache"})
    dtype: Literal["model", "fp8", "int8"] = field(default="model", metadata={"help": "what the cache stores: the model's dtype, or e4m3 or int8 with scales"})

    max_tokens: int | None = field(default=None, metadata={"help": "longest text, where the model's positions end; read off the model"})

    name: ClassVar[str] = "insert-kv-cache"
    summary: ClassVar[str] = "attention over a paged cache: prefill and decode graphs from the model's definition"
    contract: ClassVar[str] = "exact"
    inverse: ClassVar[bool] = True
    requires: ClassVar[tuple[str, ...]] = ("raise-norm", "raise-rope", "raise-attention", "raise-mla", "raise-mlp")
    every_graph: ClassVar[bool] = True

    def __post_init__(self):
        if self.block_size < 1:
            raise ValueError(f"block_size = {self.block_size} is not a number of tokens; use 1 or more")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ValueError(f"max_tokens = {self.max_tokens} is not a length; use 1 or more, or leave it out")

    def kept_contract(self) -> str:
        return "exact" if self.dtype == "model" else "lossy"

    def with_program(self, program) -> "InsertKvCache":
        """Capture what holds for texts of any length where the example was short: a graph made below a window's length knows no window."""
        ends = [n for n in (longer_texts(program), self.max_tokens) if n is not None]
        return replace(self, max_tokens=min(ends, default=None))

    def apply(self, graph: fx.Graph) -> Outcome:
        outcome = Outcome()
        cached = [node for node in graph.nodes if node.target in PAGED]
        try:
            if cached:
                raise Declined("the model is cached already", cached[0])
            texts = self._texts(graph, outcome)
            if texts is not None:
                self._rewrite(graph, texts, outcome)
        except Declined as declined:
            outcome.misses.append(declined.miss(declined.node))
            outcome.matches.clear()
        return outcome

    def prove(self, before: fx.Graph, after: fx.Graph, earlier: list[dict] | None = None) -> list[dict]:
        """Whole texts against random chunks of them; see `ftc.rewrite.continuation`."""
        return continuation.prove(before, after, self.block_size, BOUNDS.get(self.dtype), self.max_tokens)

    def _texts(self, graph: fx.Graph, outcome: Outcome) -> Texts | None:
        """The sizes of the graph; None where it is one of training or of short texts only, which the cached program leaves out."""
        for node in graph.nodes:
            training = node.target in LOSSES or (node.target in (SDPA, SOFTCAP, LATENT) and arguments(node).get("dropout_p", 0.0))
            training = training or (node.target is aten.dropout.default and node.args[1] and node.args[2])
            if training:
                outcome.retired = f"it is a graph of training ({location(node)})"
                return None
        texts = texts_of(graph, self.max_tokens)
        if isinstance(texts, str):
            outcome.retired = texts
            return None
        return texts

    def _rewrite(self, graph: fx.Graph, texts: Texts, outcome: Outcome) -> None:
        sites = [node for node in graph.nodes if node.target in (SDPA, SOFTCAP, LATENT)]
        state = {name: _shared(graph, name, texts) for name in ("block_table", "cached", "new")}
        for number, node in enumerate(sites):
            site = _Latent(self, graph, node, texts, state, number) if node.target is LATENT else _Heads(self, graph, node, texts, state, number)
            outcome.matches.append(site.rewrite())
        graph.eliminate_dead_code()
        for name in ("cached", "new"):  # dead where there was no attention
            if state[name]._erased:
                state[name] = _shared(graph, name, texts)
        positions = Positions(graph, texts, state["cached"], state["new"])
        if positions.rewrite():
            outcome.matches.append(Match("positions", (positions.positions.name,), {"roots": 1}, location(positions.positions)))
        graph.eliminate_dead_code()
        outcome.follow_inputs = True
        outcome.from_one = (texts.batch, texts.tokens)
        if not outcome.matches:
            outcome.matches.append(Match("tokens apart", (), {}, "each token by itself"))


def _shared(graph: fx.Graph, name: str, texts: Texts) -> fx.Node:
    like = next(node for node in graph.nodes if node.op == "placeholder")
    size = next(s for n in graph.nodes if n.op == "placeholder" for s in n.meta["val"].shape if size_expression(s) == texts.batch)
    return _state(graph, name, [size, 1] if name == "block_table" else [size], torch.int32, like)


def _state(graph: fx.Graph, name: str, shape: list, dtype: torch.dtype, like: fx.Node) -> fx.Node:
    """A tensor of the cache. Blocks and columns of the table count 1 in the graph; how many there are is known when one is made."""
    first = next(node for node in graph.nodes if node.op != "placeholder")
    with graph.inserting_before(first):
        node = graph.get_attr(STATE + name)
    value = like.meta["val"]
    with value.fake_mode:
        node.meta["val"] = torch.empty(shape, dtype=dtype, device=value.device)
    return node


class _Site:
    """One attention of a graph."""

    def __init__(self, options: InsertKvCache, graph: fx.Graph, node: fx.Node, texts: Texts, state: dict[str, fx.Node], number: int):
        self.options, self.graph, self.node, self.texts, self.state, self.number = options, graph, node, texts, state, number
        self.bound = arguments(node)
        self.edit = Editor(graph, node)

    def cache(self, word: str, shape: list[int], dtype: torch.dtype) -> fx.Node:
        return _state(self.graph, f"{word}_{self.number}", [1, self.options.block_size, *shape], dtype, self.node.all_input_nodes[0])

    def window(self) -> int | None:
        """The window of a causal attention, None where it sees everything before; Declined where it is not causal."""
        mask, causal = self.bound.get("attn_mask"), self.bound.get("is_causal", False)
        if mask is None:
            if not causal:
                raise Declined("attention is not causal", self.node)
            return None
        if causal or not isinstance(mask, fx.Node) or mask.target is not dialect.causal_mask.default:
            raise Declined("its mask is not known to be causal or a window: it comes from an input (padding?), or is made of something else", self.node)
        lengths = [size_expression(n.meta["val"] if isinstance(n, fx.Node) else n) for n in mask.args[:2]]
        if any(length != self.texts.tokens for length in lengths):
            raise Declined(f"its mask is of {lengths[0]} by {lengths[1]}, not of tokens by tokens", self.node)
        return arguments(mask).get("window")

    def check(self, node: fx.Node, dim: int) -> None:
        shape = node.meta["val"].shape
        if size_expression(shape[0]) != self.texts.batch or size_expression(shape[dim]) != self.texts.tokens:
            raise Declined("it attends to something other than the tokens of the call", self.node)

    def replaced(self, new: fx.Node, kind: str, detail: dict) -> Match:
        self.node.replace_all_uses_with(new)
        self.graph.erase_node(self.node)
        return Match(kind, (new.name,), detail | {"block_size": self.options.block_size, "cache": self.options.dtype}, location(new))

    def shared(self) -> list[fx.Node]:
        return [self.state[name] for name in ("block_table", "cached", "new")]


class _Heads(_Site):
    """Attention whose keys and values are cached."""

    def rewrite(self) -> Match:
        query, key, value = self.bound["query"], self.bound["key"], self.bound["value"]
        window = self.window()
        for node in (query, key, value):
            self.check(node, 2)
        (groups, width), (others, value_width) = ((int(n.meta["val"].shape[1]), int(n.meta["val"].shape[3])) for n in (key, value))
        if groups != others:
            raise Declined(f"it has {groups} key heads and {others} value heads", self.node)
        dtype = QUANTISED.get(self.options.dtype, key.meta["val"].dtype)
        caches = [self.cache("key", [groups, width], dtype), self.cache("value", [groups, value_width], dtype)]
        scales = [self.cache(f"{word}_scale", [groups], torch.float32) for word in ("key", "value")] if self.options.dtype in QUANTISED else [None, None]
        scale = self.bound.get("scale")
        named = {"scale": 1 / math.sqrt(width) if scale is None else scale, "window": window, "softcap": self.bound.get("softcap")}
        new = self.edit(dialect.paged_attention.default, query, key, value, *caches, *self.shared(), *scales, **named)
        elements = groups * (width + value_width)
        return self.replaced(new, "attention", {"elements": elements, "window": window})


class _Latent(_Site):
    """Latent attention: the latent and the rotated shared key are cached."""

    def rewrite(self) -> Match:
        if self.options.dtype == "int8":
            raise Declined("a latent cache is stored in the model's dtype or as fp8; int8 is for keys and values", self.node)
        if self.window() is not None:
            raise Declined("latent attention over a window cannot be cached: the cached operator has none", self.node)
        names = ("q_nope", "q_pe", "latent", "k_pe", "kv_b")
        operands = [self.bound[name] for name in names]
        for node, dim in zip(operands, (2, 2, 1, 1), strict=False):
            self.check(node, dim)
        latent, rope = (int(node.meta["val"].shape[-1]) for node in operands[2:4])
        packed = self.options.dtype == "fp8"
        width, dtype = (fp8_latent.row_bytes(latent, rope), torch.uint8) if packed else (latent + rope, operands[2].meta["val"].dtype)
        cache = self.cache("latent", [width], dtype)
        named = {"groups": self.bound["groups"], "scale": self.bound["scale"]}
        new = self.edit(dialect.paged_latent_attention.default, *operands, cache, *self.shared(), **named)
        return self.replaced(new, "latent attention", {"elements": latent + rope, "latent": latent, "rope": rope})
