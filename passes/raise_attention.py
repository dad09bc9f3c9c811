"""raise-attention: every spelling of softmax attention becomes `aten.scaled_dot_product_attention`.

    softmax(q k' * scale + mask) v                    = scaled_dot_product_attention(q, k, v, mask, scale=scale)
    softmax(cap * tanh(q k' * scale / cap) + mask) v  = softcap_attention(q, k, v, mask, scale=scale, softcap=cap)

with q [B, H, T, K], k [B, G, S, K], v [B, G, S, V] before any repetition of key-value heads, `is_causal` or `ftc.causal_mask` where the masks
are that and nothing else, and the scale a number. The pass reads a hypothesis off the graph between the two products of a softmax
(`ftc.rewrite.recognise_attention`), builds the canonical nodes, and keeps them only if values and gradients are proved equal.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from dataclasses import replace as with_fields
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

import ftc.dialect  # noqa: F401  registers ftc::softcap_attention
from ftc.rewrite.axes import Axes, Layout
from ftc.rewrite.movement import cone, index_maps, realise, widens
from ftc.rewrite.outcome import Declined, Match, location
from ftc.rewrite.probe import aten
from ftc.rewrite.raising import RaisePass
from ftc.rewrite.recognise import Analysis, Builder, replace, sizes_of
from ftc.rewrite.recognise_attention import (
    DIVIDE,
    MULTIPLY,
    SOFTMAXES,
    Grid,
    Mask,
    Scores,
    read_scores,
    read_weighted,
    split_batch,
    strip_scale,
)
from ftc.rewrite.recognise_mask import CAUSAL_MASK, Pattern, fixed_pattern, mask_tensor

SDPA = aten.scaled_dot_product_attention.default
SOFTCAP = torch.ops.ftc.softcap_attention.default


@dataclass(frozen=True)
class RaiseAttention(RaisePass):
    """The pass."""

    name: ClassVar[str] = "raise-attention"
    summary: ClassVar[str] = "softmax attention in any spelling becomes aten.scaled_dot_product_attention"
    canonical: ClassVar[frozenset] = frozenset({SDPA, SOFTCAP})

    def make_ready(self, analysis: Analysis) -> None:
        """Written-out softmaxes become one node."""
        for node in list(analysis.graph.nodes):
            if not node._erased and node.target is aten.exp.default and analysis.active(node):
                _normalise_softmax(analysis, node)

    def is_anchor(self, analysis: Analysis, node: fx.Node) -> bool:
        """A softmax, or a fused call."""
        return node.target in SOFTMAXES | self.canonical

    def raise_at(self, analysis: Analysis, anchor: fx.Node) -> Match | None:
        """The attention around a softmax; a fused call that is not quite canonical."""
        if anchor.target in self.canonical:
            return _tidy(analysis, anchor, Builder(analysis, anchor))
        try:
            return _raise_softmax(analysis, anchor)
        except Declined:
            if feeds_topk(anchor):
                return None
            raise


def feeds_topk(node: fx.Node, depth: int = 12) -> bool:
    """Whether scores are sorted or selected by value: a router's, not an attention's."""
    selects = {aten.topk.default, aten.argmax.default, aten.sort.default, aten.multinomial.default, aten.max.dim}
    above = node.args[0]
    for _ in range(4):  # a softmax over what was selected
        if isinstance(above, fx.Node) and above.target in selects:
            return True
        above = above.args[0] if isinstance(above, fx.Node) and above.args else None
    seen, queue = set(), [(node, 0), *((used, 0) for used in node.all_input_nodes[:1])]
    while queue:
        current, steps = queue.pop()
        if current.target in selects:
            return True
        if steps < depth and current not in seen:
            seen.add(current)
            elementwise = [
                user
                for user in current.users
                if user.target not in (aten.linear.default, aten.matmul.default, aten.addmm.default)
            ]
            queue.extend((user, steps + 1) for user in elementwise if user.op != "output")
    return False


# ---------------------------------------------------------------------------------------------------- softmax written out


def _normalise_softmax(analysis: Analysis, exponential: fx.Node) -> None:
    """exp(x - m) / sum(exp(x - m)), or exp(log_softmax(x)), becomes softmax(x)."""
    shift = exponential.args[0]
    candidates = [shift]
    if shift.target in (
        aten.sub.Tensor,
        aten.log_softmax.int,
        aten._log_softmax.default,
        aten.special_log_softmax.default,
    ):
        candidates.insert(0, shift.args[0])
    results = [exponential]
    for user in exponential.users:
        results += [user, *user.users]
    shape = sizes_of(exponential)
    targets = {aten.exp.default, *MULTIPLY, *DIVIDE}
    results = [node for node in results if node.target in targets and sizes_of(node) == shape]
    for result in dict.fromkeys(reversed(results)):
        for source in candidates:
            if not analysis.active(source) or sizes_of(source) != shape:
                continue
            for dim in range(-1, -len(shape) - 1, -1):
                build = Builder(analysis, result)
                new = build.cast(build(aten.softmax.int, source, dim), result.meta["val"].dtype)
                if analysis.differs(result, new, [source], (1.0, 8.0), quick=True) is None:
                    if analysis.differs(result, new, [source], (1.0, 8.0)) is None:
                        replace(analysis, result, new)
                        return
                build.undo()


# ------------------------------------------------------------------------------------------------------------ hypothesis


@dataclass
class Attention:
    """A hypothesis: the arguments of the canonical call, k and v perhaps still repeated. q [B, H, T, K], k [B, H or G, S, K], v [B, H or G, S, V]."""

    q: fx.Node
    k: fx.Node
    v: fx.Node
    mask: fx.Node | None
    is_causal: bool
    scale: float
    softcap: float | None
    dropout: float


def _raise_softmax(analysis: Analysis, softmax: fx.Node) -> Match:
    """The match for the attention around a softmax; Declined where there is none."""
    scores = read_scores(analysis, softmax)
    weighted = read_weighted(scores, softmax)
    build = Builder(analysis, weighted.node, softmax)
    axes, width = scores.axes, (scores.product.summed,)
    batch = split_batch(axes, scores.batch, scores.query)
    heads = [batch[:1], batch[1:]]
    if len(batch) > 2 and not all(axes.is_static(axis) for axis in batch[1:]):
        raise Declined("the numbers of heads are not static", scores.product.node)
    q, by_q = strip_scale(build, scores.query.node)
    k, by_k = strip_scale(build, scores.key.node)
    q = axes.arranged(build, q, scores.query.layout, [*heads, scores.queries, width])
    k = axes.arranged(build, k, scores.key.layout, [*heads, scores.keys, width])
    v = axes.arranged(build, weighted.values.node, weighted.values.layout, [*heads, scores.keys, (weighted.width,)])
    inner = scores.inner * by_q * by_k if scores.capped else scores.scale * by_q * by_k
    cap = scores.scale if scores.capped else None
    if scores.capped and cap <= 0:
        raise Declined("a soft cap that is not positive", softmax)
    hypothesis = Attention(q, k, v, None, False, inner * cap if cap else inner, cap, weighted.dropout)
    hypothesis = _with_masks(build, hypothesis, scores, [*heads, scores.queries, scores.keys])
    hypothesis = _unrepeated(build, hypothesis)

    def as_before(new: fx.Node) -> fx.Node:
        return axes.arranged(build, new, [*heads, scores.queries, (weighted.width,)], weighted.out)

    return _prove(analysis, build, hypothesis, weighted.node, as_before, softmax)


def _with_masks(build: Builder, hypothesis: Attention, scores: Scores, wanted: Layout) -> Attention:
    """The hypothesis with the masks of the scores, `wanted` being the layout of a mask tensor."""
    analysis, masks, axes = build.analysis, scores.masks, scores.axes
    fixed = [mask for mask in masks if analysis.fixed(mask.node)]
    rest = [mask for mask in masks if not analysis.fixed(mask.node)]
    pattern = fixed_pattern(analysis, fixed, scores.grid)
    if any("A" in analysis.kind(mask.node) for mask in masks):
        raise Declined("the mask depends on the activations", scores.product.node)
    dtype = hypothesis.q.meta["val"].dtype
    if pattern is not None and not rest:
        if pattern.kind == "full":
            return hypothesis
        if pattern.kind == "causal":
            return with_fields(hypothesis, is_causal=True)
        return with_fields(hypothesis, mask=_causal_mask(build, hypothesis, pattern))
    if pattern is not None and fixed:
        masks = list(rest)
        if pattern.kind != "full":
            node = _causal_mask(build, hypothesis, pattern)
            masks.append(Mask(node, [scores.queries, scores.keys], fill=_common_fill(fixed, rest)))
    return with_fields(hypothesis, mask=mask_tensor(build, axes, masks, wanted, dtype, hypothesis.q))


def _causal_mask(build: Builder, hypothesis: Attention, pattern: Pattern) -> fx.Node:
    lengths = build.size(hypothesis.q, 2), build.size(hypothesis.k, 2)
    return build(CAUSAL_MASK, *lengths, pattern.window, device=hypothesis.q.meta["val"].device)


def _common_fill(fixed: list[Mask], rest: list[Mask]) -> float:
    """The number that a mask made of the fixed ones gives the scores: that of the others where they have one."""
    fills = [mask.fill for mask in rest if mask.fill is not None]
    own = [mask.fill if mask.fill is not None else float("-inf") for mask in fixed]
    if fills:
        return fills[0]
    return min(max(own), -1e30) if any(value > float("-inf") for value in own) else float("-inf")


# --------------------------------------------------------------------------------------------------- key-value heads


def _unrepeated(build: Builder, hypothesis: Attention) -> Attention:
    """k and v before the repetition of their heads, and all three through as little data movement as says the same."""
    analysis = build.analysis
    heads, groups = (sizes_of(node)[1] for node in (hypothesis.q, hypothesis.k))
    cones = {name: cone(analysis, getattr(hypothesis, name)) for name in ("q", "k", "v")}
    repeat = 1
    if isinstance(hypothesis.k.meta["val"].shape[1], int) and groups > 1 and sizes_of(hypothesis.v)[1] == groups:
        repeat = math.gcd(
            _repetition(analysis, hypothesis.k, cones["k"]), _repetition(analysis, hypothesis.v, cones["v"])
        )
    found = {}
    for name, step in (("q", 1), ("k", repeat), ("v", repeat)):
        node = getattr(hypothesis, name)

        def wanted(maps: dict, node: fx.Node = node, step: int = step) -> Tensor:
            return maps[node][:, ::step]

        shape = build.shape(node)
        shape[1] = shape[1] // step if isinstance(shape[1], int) else shape[1]
        moved = realise(build, wanted, cones[name], shape)
        if moved is None:
            moved = node if step == 1 else build(aten.slice.Tensor, node, 1, 0, 2**63 - 1, step)
        found[name] = moved
    return with_fields(hypothesis, **_one_dtype(build, found, hypothesis.v.meta["val"].dtype))


def _repetition(analysis: Analysis, node: fx.Node, above) -> int:
    """The largest number of neighbouring heads of `node` [B, H, S, K] that hold the same elements, at every size."""
    heads = node.meta["val"].shape[1]
    for repeat in sorted((r for r in range(2, heads + 1) if heads % r == 0), reverse=True):
        same = True
        for trial in analysis.trials[::2]:
            held = index_maps(analysis, above, trial)[node]
            grouped = held.unflatten(1, (heads // repeat, repeat))
            same = same and bool((grouped == grouped[:, :, :1]).all())
        if same:
            return repeat
    return 1


def _one_dtype(build: Builder, found: dict[str, fx.Node], dtype: torch.dtype) -> dict[str, fx.Node]:
    """One dtype for q, k and v: that of their sources where all three agree, else that of the values."""
    sources = {name: _uncast(node) for name, node in found.items()}
    own = {node.meta["val"].dtype for node in sources.values()}
    if len(own) == 1:
        return sources
    return {name: build.cast(node, dtype) for name, node in found.items()}


def _uncast(node: fx.Node) -> fx.Node:
    while widens(node):
        node = node.args[0]
    return node


# ------------------------------------------------------------------------------------------------------------------ proof


def _call(build: Builder, hypothesis: Attention) -> fx.Node:
    heads, groups = (sizes_of(node)[1] for node in (hypothesis.q, hypothesis.k))
    gqa = not (heads == groups)
    mask = hypothesis.mask
    if mask is not None and mask.meta["val"].dtype not in (torch.bool, hypothesis.q.meta["val"].dtype):
        mask = build(aten.to.dtype, mask, hypothesis.q.meta["val"].dtype)
    arguments = (hypothesis.q, hypothesis.k, hypothesis.v, mask, hypothesis.dropout, hypothesis.is_causal)
    if hypothesis.softcap is None:
        return build(SDPA, *arguments, scale=hypothesis.scale, enable_gqa=gqa)
    return build(SOFTCAP, *arguments, scale=hypothesis.scale, softcap=hypothesis.softcap, enable_gqa=gqa)


def _borders(analysis: Analysis, hypothesis: Attention) -> list[fx.Node]:
    roots = [root for node in (hypothesis.q, hypothesis.k, hypothesis.v) for root in cone(analysis, node).roots]
    return [
        root
        for root in dict.fromkeys(roots)
        if isinstance(root.meta["val"], Tensor) and root.meta["val"].is_floating_point()
    ]


def _prove(
    analysis: Analysis,
    build: Builder,
    hypothesis: Attention,
    old: fx.Node,
    as_before: Callable[[fx.Node], fx.Node],
    softmax: fx.Node,
) -> Match:
    """The match, where the hypothesis, brought to the layout of `old`, equals it. Declined where it does not."""
    try:
        canonical = _call(build, hypothesis)
        new = as_before(canonical)
    except (RuntimeError, ValueError, TypeError) as error:
        raise Declined(f"no attention takes these operands: {str(error).splitlines()[0]}", old) from error
    if new.meta["val"].dim() != old.meta["val"].dim():
        raise Declined("the result has another shape", old)
    new = build.cast(new, old.meta["val"].dtype)
    reason = analysis.differs(old, new, _borders(analysis, hypothesis))
    if reason is not None:
        build.undo()
        raise Declined(f"the attention that was read off is not the one computed: {reason}", old)
    replace(analysis, old, new)
    return Match("attention", (canonical.name,), _detail(hypothesis), location(softmax))


def _detail(hypothesis: Attention) -> dict[str, Any]:
    q, k = hypothesis.q.meta["val"], hypothesis.k.meta["val"]
    mask = "causal" if hypothesis.is_causal else "none" if hypothesis.mask is None else "tensor"
    detail = {"heads": _static(q.shape[1]), "kv_heads": _static(k.shape[1]), "scale": hypothesis.scale, "mask": mask}
    if hypothesis.mask is not None and hypothesis.mask.target is CAUSAL_MASK:
        detail |= {"mask": "window", "window": hypothesis.mask.args[2]}
    return detail | ({"softcap": hypothesis.softcap} if hypothesis.softcap else {})


def _static(size: Any) -> Any:
    return int(size) if isinstance(size, int) else str(size)


# ---------------------------------------------------------------------------------- attention that is one node already


def _tidy(analysis: Analysis, node: fx.Node, build: Builder) -> Match | None:
    """A canonical call for one that is nearly so: repeated heads, a mask that is plain causal, a scale left out. None where it is canonical."""
    schema = [argument.name for argument in node.target._schema.arguments]
    given = (
        {"attn_mask": None, "dropout_p": 0.0, "is_causal": False}
        | dict(zip(schema, node.args, strict=False))
        | dict(node.kwargs)
    )
    q, k, v = given["query"], given["key"], given["value"]
    if q.meta["val"].dim() != 4:
        return None
    width = q.meta["val"].shape[-1]
    scale = given.get("scale")
    scale = float(scale) if scale is not None else float(width) ** -0.5
    q, by_q = strip_scale(build, q)
    k, by_k = strip_scale(build, k)
    hypothesis = Attention(
        q, k, v, None, bool(given["is_causal"]), scale * by_q * by_k, given.get("softcap"), float(given["dropout_p"])
    )
    mask = given["attn_mask"]
    if mask is not None:
        hypothesis = _with_known_mask(build, hypothesis, mask)
    hypothesis = _unrepeated(build, hypothesis)
    heads, groups = (sizes_of(part)[1] for part in (hypothesis.q, hypothesis.k))
    same_inputs = (hypothesis.q, hypothesis.k, hypothesis.v, hypothesis.mask) == (
        given["query"],
        given["key"],
        given["value"],
        mask,
    )
    explicit = given.get("scale") is not None and bool(given.get("enable_gqa", False)) == (heads != groups)
    if same_inputs and explicit and hypothesis.is_causal == bool(given["is_causal"]):
        return None
    new = _call(build, hypothesis)
    reason = analysis.differs(node, new, _borders(analysis, hypothesis))
    if reason is not None:
        build.undo()
        raise Declined(f"the attention that was read off is not the one computed: {reason}", node)
    replace(analysis, node, new)
    return Match("attention", (new.name,), _detail(hypothesis), location(node))


def _with_known_mask(build: Builder, hypothesis: Attention, mask: fx.Node) -> Attention:
    analysis, q, k = build.analysis, hypothesis.q, hypothesis.k
    if not analysis.fixed(mask):
        return with_fields(hypothesis, mask=mask)
    axes = Axes(analysis)
    batch, heads, queries, _ = axes.of(q)
    layout = [batch, heads, queries, (axes.new(k, 2),)]
    boolean = mask.meta["val"].dtype == torch.bool
    read = Mask(mask, layout[4 - mask.meta["val"].dim() :], fill=float("-inf") if boolean else None)
    pattern = fixed_pattern(analysis, [read], Grid(axes, queries, layout[3]))
    if pattern is None or hypothesis.is_causal:
        return with_fields(hypothesis, mask=mask)
    if pattern.kind == "full":
        return hypothesis
    if pattern.kind == "causal":
        return with_fields(hypothesis, is_causal=True)
    if mask.target is CAUSAL_MASK:
        return with_fields(hypothesis, mask=mask)
    return with_fields(hypothesis, mask=_causal_mask(build, hypothesis, pattern))
