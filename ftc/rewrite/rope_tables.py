"""Where a graph makes rotary tables: cos and sin of positions times frequencies, found by data flow, and their values.

    positions [.., T], frequencies [R/2]  ->  a product  ->  moved about  ->  cos, sin (or polar)  ->  times a number

A `Site` is one product with the tables made of it. Nothing is asked of names: positions are integers (or an arange), frequencies a
vector of floating numbers, and what makes them a site is that their product reaches cos and sin through data movement alone.
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from ftc.rewrite import probe
from ftc.rewrite.movement import CASTS, sources
from ftc.rewrite.outcome import Miss, location, operation
from ftc.rewrite.probe import aten

_TABLES = {aten.cos.default: 0, aten.sin.default: 0, aten.polar.default: 1}  # which argument is the angle
_PRODUCTS = {aten.mul.Tensor, aten.matmul.default, aten.bmm.default, aten.mm.default, aten.outer.default, aten.ger.default, aten.einsum.default}
_TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 2e-3}  # of ln f, for frequencies stored in few bits; else 1e-5
_ARANGES = {aten.arange.default, aten.arange.start, aten.arange.start_step}


@dataclass(frozen=True)
class Site:
    """One product of positions and frequencies. `chain`: the nodes that bring the frequencies to the product, in order, the last being
    its operand; `tables`: cos, sin or polar of it, each followed to its last product with a number; `scale`: those numbers multiplied;
    `fixed`: whether the frequencies depend on nothing but parameters, buffers and constants."""

    product: fx.Node
    positions: fx.Node
    frequencies: fx.Node
    chain: tuple[fx.Node, ...]
    roots: tuple[fx.Node, ...]
    tables: tuple[fx.Node, ...]
    scale: float
    fixed: bool

    @property
    def width(self) -> int:
        """R, the number of rotated elements of a head."""
        return 2 * int(self.frequencies.meta["val"].shape[0])

    def buffers(self) -> list[str]:
        """Names of the parameters and buffers that the frequencies are read from; their values are not in the graph."""
        above = ancestors([self.frequencies])
        return [str(node.target) for node in above if node.op == "get_attr" and "constant" not in node.meta]


def find_sites(graph: fx.Graph) -> tuple[list[Site], list[Miss]]:
    """The sites of a graph in its order, and what resembles one and is none."""
    order = {node: number for number, node in enumerate(graph.nodes)}
    products: dict[fx.Node, list[fx.Node]] = {}
    misses = []
    for node in graph.nodes:
        if node.op == "call_function" and node.target in _TABLES:
            tops = _climbed(node.args[_TABLES[node.target]])[0]
            if len(tops) == 1 and tops[0].target in _PRODUCTS:
                products.setdefault(tops[0], []).append(node)
    sites = []
    for product, roots in products.items():
        found = _site(product, roots, order)
        if isinstance(found, Miss):
            misses.append(found)
        elif found is not None:
            sites.append(found)
    return sites, misses


def _site(product: fx.Node, roots: list[fx.Node], order: dict[fx.Node, int]) -> Site | Miss | None:
    operands = [node for node in product.all_input_nodes if isinstance(node.meta.get("val"), Tensor)]
    if len(operands) != 2:
        return None
    for one, other in (operands, operands[::-1]):
        (tops, chain), (places, _) = _climbed(one), _climbed(other)
        if len(tops) != 1 or len(places) != 1 or not _is_vector(tops[0]):
            continue
        frequencies, positions = tops[0], places[0]
        if not _are_positions(positions):
            if any(_are_positions(node) for node in ancestors([positions])):
                reason = f"the positions go through {operation(positions)} before they meet the frequencies: scaled already"
                return Miss(product.name, reason, positions.name, location(positions))
            continue
        ends = [_end(root) for root in roots]
        added = next((user for node, _ in ends for user in _uses(node) if user.target is aten.add.Tensor), None)
        if added is not None:
            return Miss(product.name, "its cos and sin are added to something, which is no rotation", added.name, location(added))
        scales = {scale for _, scale in ends}
        if len(scales) > 1:
            return Miss(product.name, f"cos and sin are scaled by different numbers, {sorted(scales)}", product.name, location(product))
        above = ancestors([frequencies])
        fixed = not any(node.op in ("placeholder", "call_module") for node in above)
        chain = tuple(sorted(chain - {frequencies}, key=order.__getitem__))
        return Site(product, positions, frequencies, chain, tuple(roots), tuple(node for node, _ in ends), scales.pop(), fixed)
    return None


def _is_vector(node: fx.Node) -> bool:
    val = node.meta.get("val")
    return isinstance(val, Tensor) and val.is_floating_point() and val.dim() == 1 and isinstance(val.shape[0], int) and node.target not in _ARANGES


def _are_positions(node: fx.Node) -> bool:
    val = node.meta.get("val")
    if not isinstance(val, Tensor) or val.dim() == 0:
        return False
    counts = node.target is aten.arange.default or (node.target is aten.arange.start and node.args[0] == 0)
    return counts or not (val.is_floating_point() or val.is_complex() or val.dtype == torch.bool)


def _climbed(node: fx.Node) -> tuple[list[fx.Node], set[fx.Node]]:
    """The nodes that compute what movement and casts bring to `node`, and every node passed on the way, those included."""
    tops: dict[fx.Node, None] = {}
    seen, stack = set(), [node]
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        above = [node.args[0]] if node.target in CASTS else sources(node)
        if above is None or node.op != "call_function" or _stops(node):
            tops[node] = None
        else:
            stack += above
    return list(tops), seen


def _stops(node: fx.Node) -> bool:
    """Whether a node picks elements out of a table: what it gives is values of their own, not the table moved."""
    return node.target in (aten.index.Tensor, aten.index_select.default, aten.gather.default, aten.select.int)


def _end(root: fx.Node) -> tuple[fx.Node, float]:
    """The last of the products with a number that follow a table one after the other, and the numbers multiplied."""
    node, scale = root, 1.0
    while len(node.users) == 1:
        user = next(iter(node.users))
        if user.target is not aten.mul.Tensor or not isinstance(user.args[1], (int, float)):
            break
        node, scale = user, scale * user.args[1]
    return node, scale


def _uses(node: fx.Node) -> list[fx.Node]:
    """The first nodes below `node` that compute."""
    found, stack, seen = [], [node], set()
    while stack:
        for user in stack.pop().users:
            if user in seen:
                continue
            seen.add(user)
            if user.target in CASTS or sources(user) is not None:
                stack.append(user)
            else:
                found.append(user)
    return found


def ancestors(nodes: list[fx.Node], stop: set[fx.Node] | frozenset = frozenset()) -> list[fx.Node]:
    """`nodes` and everything above them, in the graph's order; not above `stop`."""
    seen, stack = set(), list(nodes)
    while stack:
        node = stack.pop()
        if node not in seen:
            seen.add(node)
            if node not in stop:
                stack += node.all_input_nodes
    return sorted(seen)


def evaluate(
    graph: fx.Graph,
    targets: list[fx.Node],
    given: dict[fx.Node, Tensor],
    named: dict[str, Tensor] | None = None,
    lifted: bool = False,
) -> list[Tensor]:
    """Values of `targets`, with the nodes `given` and the parameters and buffers `named` set; everything else is drawn at random.

    `lifted` as in `ftc.rewrite.probe`: in float64, pinned dtypes too."""
    sizes = probe.symbol_sizes(graph)[0]
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    kind = torch.float64 if lifted else None
    values = dict(zip(placeholders, probe.random_inputs(graph, sizes, 0, kind), strict=True)) | given
    with probe.lifted_defaults() if lifted else contextlib.nullcontext(), torch.no_grad():
        for node in ancestors(targets, set(given)):
            if node in values:
                continue
            if node.op == "get_attr":
                value = (named or {}).get(str(node.target), node.meta.get("constant"))
                assert value is not None, f"{node.target} has no value"
                values[node] = value.double() if lifted and value.is_floating_point() else value
                continue
            args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), values.__getitem__)
            values[node] = probe.call(node, args, kwargs, lifted)
    return [values[node] for node in targets]


def positions_up_to(graph: fx.Graph, site: Site, length: int, lifted: bool = False) -> Tensor:
    """Positions of the shape that the site's have at the first probed sizes, spread over 0 to length - 1, both included."""
    val = site.positions.meta["val"]
    shape = [probe.concrete(size, probe.symbol_sizes(graph)[0]) for size in val.shape]
    spread = torch.linspace(0, length - 1, shape[-1], dtype=torch.float64).round()
    spread[-1] = length - 1
    dtype = torch.float64 if lifted and val.is_floating_point() else val.dtype
    return spread.to(dtype).expand(shape).contiguous()


def without_tables(graph: fx.Graph, sites: list[Site]) -> fx.Graph:
    """What the graph computes of tables that are given: inputs in order, the tables after them, then each node when it is first needed, so
    that two graphs of the same computation have one hash."""
    new, mapping = fx.Graph(), {}
    for node in graph.nodes:
        if node.op == "placeholder":
            mapping[node] = new.node_copy(node)
    for number, table in enumerate(table for site in sites for table in site.tables):
        mapping[table] = new.placeholder(f"rope_table_{number}")
        mapping[table].meta["val"] = table.meta["val"]
    output = next(node for node in graph.nodes if node.op == "output")
    stack = list(reversed(output.all_input_nodes))
    while stack:
        missing = [used for used in stack[-1].all_input_nodes if used not in mapping]
        if stack[-1] not in mapping and missing:
            stack += reversed(missing)
            continue
        node = stack.pop()
        if node not in mapping:
            mapping[node] = new.node_copy(node, lambda n: mapping[n])
    new.output(tuple(mapping[node] for node in output.args[0]))
    return new


def theta_of(frequencies: torch.Tensor) -> float | None:
    """The theta of which the frequencies are the powers theta^(-2i/R); None where they are of none, so scaled or something else."""
    values, count = frequencies.double(), len(frequencies)
    tolerance = _TOLERANCE.get(frequencies.dtype, 1e-5)
    if count < 2 or not bool((values > 0).all()) or abs(float(values[0]) - 1) > tolerance:
        return None
    theta = math.exp(-float(values[-1].log()) * count / (count - 1))
    rounded = float(f"{theta:.6g}")  # as it was written, where the rounding of float32 allows
    theta = rounded if abs(rounded / theta - 1) < 1e-5 else theta
    return theta if fits_theta(frequencies, theta) else None


def fits_theta(frequencies: torch.Tensor, theta: float) -> bool:
    """Whether the frequencies are theta^(-2i/R), up to their rounding."""
    values = frequencies.double()
    if not bool((values > 0).all()):
        return False
    exponents = torch.arange(len(values), dtype=torch.float64) / len(values)
    return bool(((values.log() + exponents * math.log(theta)).abs() <= _TOLERANCE.get(frequencies.dtype, 1e-5)).all())
