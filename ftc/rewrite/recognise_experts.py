"""Recognising a mixture of experts behind its router, whatever it is spelled with.

The site is described by what goes in and what comes out, and by nothing in between: the token x that the router saw, the choice of experts (a topk over
as many scores as there are experts), the weights, the experts' parameters, and a result as wide as x. Loops with masks and index_add, gathered
weights with bmm, grouped products over sorted rows, and all experts computed and combined are then one function of these, and it either is

    y_n = sum_j w[n, j] f(x_n; expert i[n, j])        or        y_n = sum_j f(w[n, j] x_n; expert i[n, j])

for one of the known f, or is not. Which one is measured: on random values in float64 in which every expert is chosen, then proved with gradients.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, fx

from ftc.rewrite import probe
from ftc.rewrite.expert_families import Family, families
from ftc.rewrite.expert_layout import Layout, curves, layouts, slot_results
from ftc.rewrite.movement import CASTS, dropout_off, sources
from ftc.rewrite.outcome import Declined
from ftc.rewrite.probe import aten
from ftc.rewrite.recognise import PRODUCTS, VALUE_TOLERANCE, Analysis, Trial, sizes_of
from ftc.rewrite.shell_parts import ancestors, descendants

# Of the token: gates are tried where they are curved, where they are lines, and beyond the bounds of clamped ones.
MAGNITUDES = (1.0, 8.0, 64.0, 0.1)
CANONICAL = {torch.ops.ftc.moe.default, torch.ops.ftc.fused_moe.default}
MOST_RESULTS = 8  # nodes that are tried as the result: the sum, and what scales, casts or reshapes it


@dataclass
class Choice:
    """A choice of K among E scores: `scores` [.., E], and the nodes that hold the chosen experts [.., K]."""

    node: fx.Node
    scores: fx.Node
    num_experts: int
    top_k: int
    indices: fx.Node | None


@dataclass
class Site:
    """A mixture of experts: `token` holds x, `weights` w (with `dense`, [N, E] and zero for the others), `result` the sum."""

    choice: Choice
    token: fx.Node
    weights: fx.Node
    dense: bool
    result: fx.Node
    layout: Layout
    activation: str
    constants: list[float]
    weight_on_input: bool
    families: list[Family]
    interior: set[fx.Node] = field(default_factory=set)


def choice_at(analysis: Analysis, node: fx.Node) -> Choice | None:
    """The choice of experts that a topk, argmax or sort makes along the last dim of its scores; None for any other node."""
    if node.op != "call_function" or not isinstance(node.args[0] if node.args else None, fx.Node):
        return None
    scores = node.args[0]
    value = scores.meta.get("val")
    if not isinstance(value, Tensor) or value.dim() < 2 or not isinstance(value.shape[-1], int):
        return None
    experts = int(value.shape[-1])

    def argument(position: int, name: str, default: object) -> object:
        return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)

    items = {user.args[1]: user for user in node.users if user.op == "call_function" and getattr(user.target, "__name__", "") == "getitem"}
    if node.target is aten.topk.default:
        count, dim, largest = argument(1, "k", None), argument(2, "dim", -1), argument(3, "largest", True)
        fits = isinstance(count, int) and dim in (-1, value.dim() - 1) and largest
        return Choice(node, scores, experts, count, items.get(1)) if fits else None
    if node.target in (aten.argmax.default, aten.max.dim):
        dim = argument(1, "dim", None)
        index = node if node.target is aten.argmax.default else items.get(1)
        return Choice(node, scores, experts, 1, index) if dim in (-1, value.dim() - 1) and index is not None else None
    if node.target in (aten.sort.default, aten.argsort.default, aten.sort.stable, aten.argsort.stable):
        order = node if node.target in (aten.argsort.default, aten.argsort.stable) else items.get(1)
        for user in order.users if order is not None else ():
            if user.target is aten.slice.Tensor and user.args[1] in (-1, value.dim() - 1) and user.args[2] == 0:
                return Choice(node, scores, experts, int(user.args[3]), user)
    return None


def token_of(analysis: Analysis, choice: Choice) -> fx.Node | None:
    """The token that the router saw: what the nearest product with parameters above the scores multiplies, moves and casts taken off."""
    seen, queue = set(), [choice.scores]
    while queue:
        node = queue.pop(0)
        if node in seen or not analysis.active(node):
            continue
        seen.add(node)
        if node.target in PRODUCTS and "P" in frozenset().union(*(analysis.kind(used) for used in node.all_input_nodes)):
            active = [used for used in node.all_input_nodes if analysis.active(used)]
            return _below_moves(analysis, active[0]) if len(active) == 1 else None
        queue += node.all_input_nodes
    return None


def _below_moves(analysis: Analysis, node: fx.Node) -> fx.Node:
    """The node whose elements `node` holds in the same order, perhaps in another dtype or shape."""
    while True:
        above = sources(node) or ([node.args[0]] if node.target in CASTS else None)
        if above is None or len(above) != 1 or not analysis.active(above[0]) or _count(above[0]) != _count(node) or above[0].op == "placeholder":
            same_order = above is not None and len(above) == 1 and above[0].op == "placeholder" and _count(above[0]) == _count(node)
            return above[0] if same_order and sizes_of(above[0])[-1:] == sizes_of(node)[-1:] else node
        if sizes_of(above[0])[-1:] != sizes_of(node)[-1:]:
            return node
        node = above[0]


def _count(node: fx.Node) -> int:
    total = 1
    for size in sizes_of(node):
        total *= size
    return total


def find(analysis: Analysis, choice: Choice) -> Site | None:
    """The mixture behind a choice, None where the choice is of something else. Raises Declined where it looks like one and is none that is known."""
    token = token_of(analysis, choice)
    if token is None or not sizes_of(token):
        return None
    width = sizes_of(token)[-1]
    if not _for_each_token(choice, token):
        return None
    below = descendants([choice.node]) - {choice.node}
    declined: Declined | None = None
    tried = 0
    for result in analysis.graph.nodes:
        if result not in below or not _may_be_result(result, token, width):
            continue
        interior = _interior(result, token, choice)
        if any(node.target in CANONICAL for node in interior):
            return None
        parameters = {node for node in interior if _is_parameter(analysis, node)}
        if not parameters:
            continue
        try:
            found = families(parameters, choice.num_experts)
            next(layouts(found, int(width)))  # raises where there is none
        except Declined as reason:
            declined = reason
            continue
        tried += 1
        site = _measured(analysis, choice, token, result, interior, found)
        if site is not None:
            _check_private(site)
            return site
        declined = Declined("no known expert, weighed by any tensor behind the router, gives these values for all experts in order", result)
        if tried == MOST_RESULTS:
            break
    later = any(node in below and choice_at(analysis, node) is not None for node in analysis.graph.nodes)
    if declined is not None and not later:  # of several choices on the way (groups, then experts) the last one tells
        raise declined
    return None


def chooses_experts(analysis: Analysis, node: fx.Node) -> bool:
    """Whether a choice is made for each token, and what is as wide as the token comes of it and of parameters that are not in canonical spelling."""
    choice = choice_at(analysis, node)
    token = None if choice is None else token_of(analysis, choice)
    if token is None or not sizes_of(token) or not _for_each_token(choice, token):
        return False
    below = descendants([node]) - {node}
    for result in analysis.graph.nodes:
        if result in below and _may_be_result(result, token, sizes_of(token)[-1]):
            interior = _interior(result, token, choice)
            canonical = any(other.target in CANONICAL for other in interior)
            return not canonical and any(_is_parameter(analysis, other) for other in interior)
    return False


def _for_each_token(choice: Choice, token: fx.Node) -> bool:
    return _count(choice.scores) * sizes_of(token)[-1] == _count(token) * choice.num_experts


def _is_parameter(analysis: Analysis, node: fx.Node) -> bool:
    return node.op == "get_attr" and "P" in analysis.kind(node)


def _may_be_result(node: fx.Node, token: fx.Node, width: int) -> bool:
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.dim() < 2 or sizes_of(node)[-1] != width:
        return False
    narrow = torch.promote_types(value.dtype, token.meta["val"].dtype) == token.meta["val"].dtype
    return narrow and _count(node) == _count(token)


def _interior(result: fx.Node, token: fx.Node, choice: Choice) -> set[fx.Node]:
    """What stands between the token, the scores and the result: ancestors of the result down to both, and the parameters there."""
    return ancestors([result], (token, choice.scores)) - ancestors([choice.scores], (token,))


def _check_private(site: Site) -> None:
    """Every expert's parameter is read by this mixture alone, and what it computes goes nowhere else."""
    parameters = {node for family in site.families for node in family.nodes}
    targets = {node.target for node in parameters}
    for node in next(iter(parameters)).graph.nodes:
        if node.op == "get_attr" and node.target in targets and node not in parameters:
            raise Declined(f"{node.target} is read by something else as well", node)
    inside = _descendants_within(parameters, site.interior)
    for node in [*parameters, *inside]:
        for user in node.users:
            if user not in site.interior and node is not site.result:
                raise Declined(f"{user.name} reads what is between the experts' matrices", user)
    for node in site.interior:
        if node.target is aten.dropout.default and not dropout_off(node):
            raise Declined("dropout stands between the experts' matrices", node)


def _descendants_within(starts: set[fx.Node], inside: set[fx.Node]) -> set[fx.Node]:
    found, stack = set(), list(starts)
    while stack:
        for user in stack.pop().users:
            if user in inside and user not in found:
                found.add(user)
                stack.append(user)
    return found


# ---------------------------------------------------------------------------------------------------------------- measuring


def rounds(choice: Choice, num_tokens: int) -> int:
    """How often scores are drawn, so that every expert is chosen at least once."""
    return -(-choice.num_experts // max(1, num_tokens * choice.top_k))


def given_values(
    analysis: Analysis, token: fx.Node, choice: Choice, parameters: list[fx.Node], trial: Trial, turn: int, magnitude: float
) -> dict[fx.Node, Tensor]:
    """Random values for the token (of a magnitude), the scores and the parameters. Scores are exp of normal numbers, placed so that turn after turn
    all experts are chosen: some weights are near 0, as those are that a threshold drops."""
    given = {node: analysis._random(node, trial, magnitude if node is token else 1.0, 40 + turn) for node in (token, *parameters)}
    for node in parameters:
        if given[node].dim() >= 2:
            given[node] = given[node] / given[node].shape[-1] ** 0.5
    shape = [probe.concrete(size, trial.sizes) for size in choice.scores.meta["val"].shape]
    generator = torch.Generator().manual_seed(1_000 * trial.seed + turn)
    dtype = probe.LIFTED_DTYPES.get(choice.scores.meta["val"].dtype, choice.scores.meta["val"].dtype)
    rows = torch.randn(shape, generator=generator, dtype=dtype).exp().view(-1, choice.num_experts).sort(-1, descending=True).values
    order = torch.randperm(choice.num_experts, generator=torch.Generator().manual_seed(trial.seed))
    start = turn * rows.shape[0] * choice.top_k
    first = torch.arange(rows.shape[0])[:, None] * choice.top_k + start  # the row's best experts: the next ones in a fixed order
    places = order[(first + torch.arange(choice.num_experts)) % choice.num_experts]
    scores = torch.empty_like(rows).scatter(1, places, rows).view(shape)
    given[choice.scores] = scores
    return given


@dataclass
class _Turn:
    """One draw: what was given, the experts chosen, and the values of the result and of each candidate for the weights."""

    given: dict[fx.Node, Tensor]
    indices: Tensor
    expected: Tensor
    weights: list[Tensor]


def _measured(
    analysis: Analysis, choice: Choice, token: fx.Node, result: fx.Node, interior: set[fx.Node], found: list[Family]
) -> Site | None:
    """The site whose canonical form gives the values of `result` in one trial, on all experts."""
    trial, parameters = analysis.trials[0], [node for family in found for node in family.nodes]
    candidates = list(_weights(analysis, choice, interior, result))
    numbers = [
        float(number)
        for node in interior
        for number in (*node.args, *node.kwargs.values())
        if type(number) is float or (type(number) is int and "clamp" in str(node.target))
    ]
    width = int(sizes_of(token)[-1])
    with torch.no_grad():
        draw = partial(_turn, analysis, choice, token, result, candidates, parameters, trial)
        turns = [draw(turn, magnitude) for turn in range(rounds(choice, num_tokens(token, trial))) for magnitude in MAGNITUDES]
        for layout in layouts(found, width):
            for activation, constants in curves(layout.gated, numbers):
                expert = partial(_results, layout=layout, activation=activation, constants=constants)
                for (weights, dense), on_input in _fitting(turns, token, candidates, expert):
                    return Site(choice, token, weights, dense, result, layout, activation, constants, on_input, found, interior)
    return None


def _turn(analysis, choice, token, result, candidates, parameters, trial, turn, magnitude) -> _Turn:
    given = given_values(analysis, token, choice, parameters, trial, turn, magnitude)
    try:
        expected, *weights = analysis.evaluate([result, *(node for node, _ in candidates)], trial, given)
    except (RuntimeError, TypeError, IndexError, ValueError) as error:
        raise Declined(f"cannot be evaluated: {str(error).splitlines()[0]}", result) from error
    indices = given[choice.scores].reshape(-1, choice.num_experts).topk(choice.top_k).indices
    weights = [w.reshape(indices.shape[0], -1) for w in weights]
    weights = [w.gather(1, indices) if dense else w for w, (_, dense) in zip(weights, candidates, strict=True)]
    return _Turn(given, indices, expected.reshape(-1, expected.shape[-1]), weights)


def _results(turn: _Turn, token: fx.Node, layout: Layout, activation: str, constants: list[float], weights: Tensor | None) -> Tensor:
    x = turn.given[token].reshape(turn.indices.shape[0], -1)
    return slot_results(x, turn.indices, layout.stacked(turn.given), layout.gated, activation, constants, weights)


def _fitting(turns: list[_Turn], token: fx.Node, candidates: list, expert: Callable) -> Iterator[tuple[tuple[fx.Node, bool], bool]]:
    """The candidates for the weights with which an expert's results give the values, and whether they weigh its input."""
    unweighed: dict[int, Tensor] = {}

    def fits(place: int, on_input: bool) -> bool:
        for number, turn in enumerate(turns):  # mostly the first says no
            if on_input:
                total = expert(turn, token, weights=turn.weights[place]).sum(1)
            else:
                if number not in unweighed:
                    unweighed[number] = expert(turn, token, weights=None)
                total = (unweighed[number] * turn.weights[place][..., None]).sum(1)
            if not probe.relative_error(total, turn.expected) <= VALUE_TOLERANCE:
                return False
        return True

    for on_input in (False, True):
        yield from ((candidate, on_input) for place, candidate in enumerate(candidates) if fits(place, on_input))


def num_tokens(token: fx.Node, trial: Trial) -> int:
    count = 1
    for size in token.meta["val"].shape[:-1]:
        count *= probe.concrete(size, trial.sizes)
    return count


def _weights(analysis: Analysis, choice: Choice, interior: set[fx.Node], result: fx.Node) -> Iterator[tuple[fx.Node, bool]]:
    """(node, dense) that may hold the weights, nearest to the experts first: [.., K], and [.., E] with zeros."""
    rows = _count(choice.scores) // sizes_of(choice.scores)[-1]
    tainted = _descendants_within({node for node in interior if _is_parameter(analysis, node)}, interior)
    narrow, wide = [], []
    reads = interior | {choice.scores}
    for node in reversed(list(analysis.graph.nodes)):
        value = node.meta.get("val")
        if node not in reads or node in tainted or not isinstance(value, Tensor) or not value.is_floating_point() or value.dim() < 1:
            continue
        if not analysis.active(node):
            continue
        sizes = sizes_of(node)
        if _count(node) == rows * choice.top_k and sizes[-1] == choice.top_k and value.dim() >= 2:
            narrow.append(node)
        if _count(node) == rows * choice.num_experts and sizes[-1] == choice.num_experts and value.dim() >= 2:
            wide.append(node)
    yield from ((node, False) for node in narrow)
    if choice.top_k != choice.num_experts:
        yield from ((node, True) for node in wide)

