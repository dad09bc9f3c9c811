"""Which mask the masks of an attention add up to: none, plain causal, a sliding window, or a tensor.

Masks made of sizes and constants are evaluated: at the probed sizes, and at sizes just past every constant that could be a window or the width of
a buffer, so that a window larger than the probe cannot pass for plain causal attention.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from ftc.rewrite import probe
from ftc.rewrite.axes import Axes, Layout
from ftc.rewrite.outcome import Declined
from ftc.rewrite.probe import aten
from ftc.rewrite.recognise import Analysis, Builder, Trial, known_constant
from ftc.rewrite.recognise_attention import ABSORBS, NEVER, Grid, Mask

CAUSAL_MASK = torch.ops.ftc.causal_mask.default
LARGEST = 8194  # sizes up to which a mask made of constants is evaluated: just past a window of 8192


@dataclass
class Pattern:
    """A mask that depends on sizes only: "full", "causal" or "window" (of `window` keys), proved at all sizes that matter."""

    kind: str
    window: int | None = None


def canonical_mask(build: Builder, axes: Axes, mask: Mask, wanted: Layout) -> fx.Node:
    """The tensor of `mask`, broadcastable to dims that hold `wanted`: as it is where it fits, without the leading dims that it lacks."""
    layout, wanted = axes.refined(mask.layout), axes.refined(wanted)
    held = [place for place, group in enumerate(wanted) if set(group) & {axis for own in layout for axis in own}]
    if held and layout != wanted:
        wanted = wanted[held[0] :]
    return axes.arranged(build, mask.node, layout, wanted)


def fixed_pattern(analysis: Analysis, masks: list[Mask], grid: Grid) -> Pattern | None:
    """The pattern of masks that depend on sizes only; None where they are no plain pattern or one that cannot be settled."""
    if not masks:
        return Pattern("full")
    if not all(analysis.fixed(mask.node) for mask in masks):
        return None
    seen = []
    for trial in [*_trials(analysis), *_beyond(analysis, masks, grid)]:
        allowed = _allowed(analysis, masks, grid, trial)
        if allowed is None:
            return None
        seen.append(allowed)
    if not seen or not _settled(analysis, masks, grid, seen):
        return None
    return _common(seen)


def _trials(analysis: Analysis) -> list[Trial]:
    return list({tuple(trial.sizes.values()): trial for trial in analysis.trials}.values())


def _common(seen: list[Tensor]) -> Pattern | None:
    if all(bool(allowed.all()) for allowed in seen):
        return Pattern("full")
    largest = max(seen, key=lambda allowed: allowed.shape[0])
    for window in (None, int(largest[-1].sum())):
        if all(torch.equal(allowed, causal(*allowed.shape, window)) for allowed in seen):
            return Pattern("causal") if window is None else Pattern("window", window)
    return None


def causal(q_len: int, k_len: int, window: int | None) -> Tensor:
    """The boolean causal mask, as ftc::causal_mask defines it."""
    return torch.ops.ftc.causal_mask.default(q_len, k_len, window)


def _allowed(analysis: Analysis, masks: list[Mask], grid: Grid, trial: Trial) -> Tensor | None:
    """bool [T, S] of what the masks allow in a trial; None where they differ over batch or heads, or are no 0 / never masks."""
    rows, columns = (probe.concrete(size, trial.sizes) for size in grid.lengths())
    total = torch.ones(rows, columns, dtype=torch.bool)
    for mask in masks:
        try:
            value = _by_queries_and_keys(analysis.value(mask.node, trial), mask, grid)
        except (RuntimeError, IndexError, ValueError):
            return None
        if value is None:
            return None
        if mask.fill is not None:
            allowed = value.to(torch.bool) ^ mask.inverted
        else:
            if value.dtype == torch.bool or not value.is_floating_point():
                return None
            value = value * mask.factor
            allowed = value == 0
            if not bool((allowed | (value <= NEVER)).all()):
                return None
        total = total & allowed.expand(rows, columns)
    return total


def _by_queries_and_keys(value: Tensor, mask: Mask, grid: Grid) -> Tensor | None:
    """The value of a mask with its dims of queries and keys last, [T or 1, S or 1]; None where it differs over the others."""
    layout = grid.axes.refined(mask.layout)
    for group in (grid.queries, grid.keys):
        if group in layout:
            dim = layout.index(group)
            value, layout = value.movedim(dim, -1), [*layout[:dim], *layout[dim + 1 :], group]
        else:
            value, layout = value.unsqueeze(-1), [*layout, group]
    first = value[(slice(0, 1),) * (value.dim() - 2)]
    return first.reshape(first.shape[-2:]) if torch.equal(value, first.expand(value.shape)) else None


def _constants(masks: list[Mask]) -> set[int]:
    """Whole numbers in the expressions of the masks, sizes of their buffers, and numbers a float argument may hide."""
    found, seen, stack = set(), set(), [mask.node for mask in masks]

    def note(value) -> None:
        if isinstance(value, int | float) and not isinstance(value, bool) and 2 < abs(value) < 2**31:
            found.add(int(abs(value)))

    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        fx.node.map_aggregate((node.args, dict(node.kwargs)), note)
        if node.op == "get_attr":
            constant = known_constant(node)
            if constant is not None and constant.numel() == 1:
                note(constant.item())
            for size in node.meta["val"].shape[-2:]:
                note(int(size))
        stack.extend(node.all_input_nodes)
    return {number for number in found if number < 10_000_000}


def _symbols(grid: Grid) -> set:
    sizes = [size for size in grid.lengths() if isinstance(size, torch.SymInt)]
    return {symbol for size in sizes for symbol in size.node.shape_env.replace(size.node.expr).free_symbols}


def _beyond(analysis: Analysis, masks: list[Mask], grid: Grid) -> list[Trial]:
    """Trials whose queries and keys reach just past each constant of the masks; inputs are empty of memory."""
    symbols, env = _symbols(grid), probe.shape_env(analysis.graph)
    trials: list[Trial] = []
    if not symbols or env is None:
        return trials
    for number in sorted(_constants(masks)):
        for length in (number + 2, number + 1, number):
            sizes = {
                symbol: length if symbol in symbols else value for symbol, value in analysis.trials[0].sizes.items()
            }
            if length > LARGEST or not probe._allowed(env, sizes):
                continue
            trial = Trial(sizes, 0, _hollow(analysis.graph, sizes))
            try:
                for mask in masks:
                    analysis.value(mask.node, trial)
            except (RuntimeError, IndexError, ValueError):
                continue
            trials.append(trial)
            break
    return trials


def _hollow(graph: fx.Graph, sizes: probe.Sizes) -> dict[fx.Node, Tensor]:
    inputs = {}
    for node in graph.nodes:
        if node.op == "placeholder":
            val = node.meta["val"]
            inputs[node] = torch.zeros((), dtype=val.dtype).expand([probe.concrete(size, sizes) for size in val.shape])
    return inputs


def _settled(analysis: Analysis, masks: list[Mask], grid: Grid, seen: list[Tensor]) -> bool:
    """Whether no constant of the masks lies beyond the sizes that were evaluated and the sizes that can occur."""
    symbols, env = _symbols(grid), probe.shape_env(analysis.graph)
    reached = max(max(allowed.shape) for allowed in seen)
    ranges = [env.var_to_range.get(symbol) for symbol in symbols]
    unbounded = any(bounds is None or bounds.upper > reached for bounds in ranges)
    return not unbounded or all(
        # A buffer of this width was evaluated up to it, and beyond it the graph does not run.
        number < reached or (number == reached and number + 2 <= LARGEST)
        for number in _constants(masks)
    )


def mask_tensor(
    build: Builder, axes: Axes, masks: list[Mask], wanted: Layout, dtype: torch.dtype, at: fx.Node
) -> fx.Node:
    """One boolean or additive tensor for the masks, in their order. Raises Declined where none says the same."""
    analysis = build.analysis
    conditions = [mask for mask in masks if mask.fill is not None]
    additions = [mask for mask in masks if mask.fill is None]
    allowed: fx.Node | None = None
    for mask in conditions:
        node = canonical_mask(build, axes, mask, wanted)
        node = node if node.meta["val"].dtype == torch.bool else build(aten.ne.Scalar, node, 0)
        node = build(aten.logical_not.default, node) if mask.inverted else node
        allowed = node if allowed is None else build(aten.logical_and.default, allowed, node)
    total: fx.Node | None = None
    for mask in additions:
        node = canonical_mask(build, axes, mask, wanted)
        if node.meta["val"].dtype == torch.bool or not node.meta["val"].is_floating_point():
            node = build(aten.to.dtype, node, dtype)
        node = build(aten.mul.Tensor, node, mask.factor) if mask.factor != 1.0 else node
        total = node if total is None else build(aten.add.Tensor, total, node)
    if allowed is not None:
        fills = {mask.fill for mask in conditions}
        if len(fills) > 1:
            if not all(fill <= ABSORBS for fill in fills):
                raise Declined("masks with different fill values", at)
            fills = {min(fills)} if float("-inf") not in fills else {float("-inf")}
        (fill,) = fills
        fixed = all(analysis.fixed(mask.node) for mask in masks)
        if total is None and (fill == float("-inf") or (fixed and _no_empty_row(analysis, conditions))):
            return allowed
        if fill > ABSORBS:
            raise Declined(
                f"a row that is masked everywhere keeps its scores under the fill {fill:g}, and a mask tensor cannot say so",
                at,
            )
        zero = build(aten.scalar_tensor.default, 0.0, dtype=dtype, device=at.meta["val"].device)
        bottom = build(
            aten.scalar_tensor.default,
            max(fill, torch.finfo(dtype).min) if fill != float("-inf") else fill,
            dtype=dtype,
            device=at.meta["val"].device,
        )
        node = build(aten.where.self, allowed, zero, bottom)
        total = node if total is None else build(aten.add.Tensor, total, node)
    assert total is not None
    return _in_dtype(build, total, dtype)


def _no_empty_row(analysis: Analysis, conditions: list[Mask]) -> bool:
    for trial in _trials(analysis):
        total = None
        for mask in conditions:
            value = analysis.value(mask.node, trial).to(torch.bool) ^ mask.inverted
            total = value if total is None else total & value
        if not bool(total.any(-1).all()):
            return False
    return True


def _in_dtype(build: Builder, mask: fx.Node, dtype: torch.dtype) -> fx.Node:
    """The additive mask in the dtype of the queries; what overflows there becomes its smallest number, not an infinity."""
    own = mask.meta["val"].dtype
    if own == dtype:
        return mask
    if torch.finfo(own).min < torch.finfo(dtype).min:
        mask = build(aten.clamp_min.default, mask, torch.finfo(dtype).min)
    return build(aten.to.dtype, mask, dtype)
