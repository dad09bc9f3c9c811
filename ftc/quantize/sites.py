"""The products of a graph whose weights can be quantised, and what stands in their place afterwards.

A site is a linear, a mixture of experts, or an embedding, over parameters that nothing but such sites reads. The output head and the embedding are told
by their size, in the graph that has both: as many rows as there are tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import fx

import ftc.dialect  # noqa: F401  registers the operators
from ftc.dialect.quantized_linear import DTYPES
from ftc.errors import FtcError
from ftc.quantize.formats import Format, Quantised, why_not
from ftc.quantize.lens import InputScale, Quantize, target_names
from ftc.rewrite.edit import Editor, is_parameter, linear_operands
from ftc.rewrite.outcome import Match, Miss, Outcome, location

aten = torch.ops.aten
LINEAR, EMBEDDING = aten.linear.default, aten.embedding.default
EXPERTS = (torch.ops.ftc.moe.default, torch.ops.ftc.fused_moe.default)
QUANTIZED_LINEAR = torch.ops.ftc.quantized_linear.default
QUANTIZED_EMBEDDING = torch.ops.ftc.quantized_embedding.default
QUANTIZED_MOE = torch.ops.ftc.quantized_moe.default
QUANTIZED = (QUANTIZED_LINEAR, QUANTIZED_EMBEDDING, QUANTIZED_MOE)


@dataclass(frozen=True)
class Site:
    """A node over quantisable weights. `kind`: "linear", "head", "experts" or "embedding"; `weights`: its get_attr nodes, two for experts."""

    kind: str
    node: fx.Node
    weights: tuple[fx.Node, ...]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(str(getattr(weight, "target", weight)) for weight in self.weights)

    def shape(self, at: int = 0) -> list[int]:
        return [int(size) for size in self.weights[at].meta["val"].shape]


def find_sites(graph: fx.Graph) -> tuple[list[Site], list[tuple[Site, str]]]:
    """The sites of a graph in its order, and those with a computed weight or one that is read elsewhere too, with the reason."""
    found, refused = [], []
    vocabulary = max((int(n.args[0].meta["val"].shape[0]) for n in graph.nodes if n.op == "call_function" and n.target is EMBEDDING), default=None)
    for node in graph.nodes:
        weights, kind = _weights(node, vocabulary)
        if kind is None:
            continue
        reason = next((r for r in map(_unusable, weights) if r is not None), None)
        if reason is None:
            found.append(Site(kind, node, weights))
        else:
            refused.append((Site(kind, node, weights), reason))
    return found, refused


def _weights(node: fx.Node, vocabulary: int | None) -> tuple[tuple[fx.Node, ...], str | None]:
    if node.op != "call_function":
        return (), None
    if node.target is LINEAR:
        weight = linear_operands(node)[1]
        head = vocabulary is not None and int(weight.meta["val"].shape[0]) == vocabulary
        return (weight,), "head" if head else "linear"
    if node.target is EMBEDDING and vocabulary is not None and node.args[0].meta["val"].shape[0] == vocabulary:
        return (node.args[0],), "embedding"
    if node.target in EXPERTS:
        return tuple(node.args[3:5]), "experts"
    return (), None


def _unusable(weight: fx.Node) -> str | None:
    if not is_parameter(weight):
        return "its weight is computed, not a parameter"
    targets = {LINEAR, EMBEDDING, *EXPERTS}
    readers = [user for other in weight.graph.nodes if other.op == "get_attr" and other.target == weight.target for user in other.users]
    if len(readers) > 1 or any(user.target not in targets for user in readers):
        return f"{weight.target} is read in {len(readers)} places" if len(readers) > 1 else f"{weight.target} is read by another operation"
    if not weight.meta["val"].is_floating_point() or weight.meta["val"].dtype.itemsize < 2:
        return f"{weight.target} is {weight.meta['val'].dtype}"
    return None


@dataclass
class Choice:
    """Formats by weight name, and what calibration made of one region or more: `planned` region -> weight -> values, `scales` region -> buffer -> value."""

    formats: Callable[[str, str, list[int]], Format | None]  # kind of site, name of the weight, its shape
    planned: Mapping[str, dict[str, Quantised]] | None = None
    scales: Mapping[str, Mapping[str, float]] | None = None
    misses: list[Miss] = field(default_factory=list)


def convert(graph: fx.Graph, choice: Choice) -> Outcome:
    """Quantise every site that `choice` gives a format, in place; what a format cannot take stays, as a miss with the reason. FtcError for a tied head or
    embedding that should get one."""
    outcome = Outcome(already=sum(node.target in QUANTIZED for node in graph.nodes))
    sites, refused = find_sites(graph)
    for site, reason in refused:
        if site.kind in ("head", "embedding") and any(choice.formats(site.kind, name, site.shape()) is not None for name in site.names):
            raise FtcError(f"the {site.kind} cannot be quantised: {reason} (a tied weight?); untie it first, or leave the option {site.kind} out")
        if site.kind == "linear":
            outcome.misses.append(Miss(site.node.name, reason, site.node.name, location(site.node)))
    for site in sites:
        formats = [choice.formats(site.kind, name, site.shape(at)) for at, name in enumerate(site.names)]
        if None in formats:
            continue
        if len(formats) == 2 and formats[0] != formats[1]:
            raise ValueError(f"the matrices of the experts {site.names} would have the formats {formats[0].name} and {formats[1].name}; give them one")
        reason = next((r for at, f in enumerate(formats) if (r := why_not(f, site.shape(at))) is not None), None)
        if reason is not None:
            outcome.misses.append(Miss(site.node.name, reason, site.node.name, location(site.node)))
            outcome.notes.append(f"{', '.join(site.names)} stays as it is: {reason}")
            continue
        place, detail = location(site.node), {"format": formats[0].name, "weight": ", ".join(site.names)}
        made = {"linear": _linear, "head": _linear, "embedding": _embedding, "experts": _experts}[site.kind](graph, site, formats[0], choice, outcome)
        site.node.replace_all_uses_with(made)
        graph.erase_node(site.node)
        for weight in site.weights:
            if not weight.users:
                graph.erase_node(weight)
        outcome.matches.append(Match(site.kind, (made.name,), detail, place))
    return outcome


def _stored(graph: fx.Graph, weight: fx.Node, format: Format, choice: Choice, outcome: Outcome) -> tuple[fx.Node, fx.Node, fx.Node | None]:
    """(data, scale, zero) in the place of a weight; the lens goes to the outcome."""
    shape, dtype = [int(s) for s in weight.meta["val"].shape], weight.meta["val"].dtype
    dtypes = (DTYPES[format.dtype], format.scale_dtype(dtype), torch.int8)
    shapes = (format.data_shape(shape), format.scale_shape(shape), format.scale_shape(shape))
    names = target_names(str(weight.target), format)
    outcome.lenses.append(Quantize(str(weight.target), format.name, tuple(shape), str(dtype).removeprefix("torch."), choice.planned))
    made = [_attribute(graph, *each, like=weight) for each in zip(names, shapes[: len(names)], dtypes[: len(names)], strict=True)]
    return (*made, None)[:3]


def _attribute(graph: fx.Graph, name: str, shape: list[int], dtype: torch.dtype, like: fx.Node) -> fx.Node:
    with graph.inserting_before(like):
        node = graph.get_attr(name)
    value = like.meta["val"]
    with value.fake_mode:
        node.meta["val"] = torch.empty(shape, dtype=dtype, device=value.device)
    if "stack_trace" in like.meta:
        node.meta["stack_trace"] = like.meta["stack_trace"]
    return node


def _linear(graph: fx.Graph, site: Site, format: Format, choice: Choice, outcome: Outcome) -> fx.Node:
    x, weight, bias = linear_operands(site.node)
    scale = None
    if format.activations == "static":
        name = f"{str(weight.target).rpartition('.')[0]}.input_scale".removeprefix(".")
        scale = _attribute(graph, name, [1], torch.float32, weight)
        outcome.lenses.append(InputScale(name, str(weight.target), choice.scales))
    stored = _stored(graph, weight, format, choice, outcome)
    shape = site.shape()
    return Editor(graph, site.node)(QUANTIZED_LINEAR, x, *stored, bias, scale, format.dtype, format.block(shape), shape[1], format.activations)


def _embedding(graph: fx.Graph, site: Site, format: Format, choice: Choice, outcome: Outcome) -> fx.Node:
    shape = site.shape()
    stored = _stored(graph, site.weights[0], format.weights_only(), choice, outcome)
    return Editor(graph, site.node)(QUANTIZED_EMBEDDING, site.node.args[1], *stored, format.dtype, format.block(shape), shape[1], site.weights[0].meta["val"].dtype)


def _experts(graph: fx.Graph, site: Site, format: Format, choice: Choice, outcome: Outcome) -> fx.Node:
    names = ["x", "indices", "weights", "gate_up", "down", "gate_up_bias", "down_bias"]
    given = dict.fromkeys(names) | dict(zip(names, site.node.args, strict=False)) | {k: v for k, v in site.node.kwargs.items() if k in names}
    kwargs = {k: v for k, v in site.node.kwargs.items() if k not in names}
    stored = [_stored(graph, weight, format, choice, outcome) for weight in site.weights]
    blocks = [format.block(site.shape(at)) for at in (0, 1)]
    inner, biases = site.shape(1)[-1], (given["gate_up_bias"], given["down_bias"])
    first = (given["x"], given["indices"], given["weights"])
    return Editor(graph, site.node)(QUANTIZED_MOE, *first, *stored[0], *stored[1], *biases, format.dtype, *blocks, inner, format.activations, **kwargs)
