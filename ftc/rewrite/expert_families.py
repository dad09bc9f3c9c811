"""The parameters of a mixture's experts: which of a graph's parameters belong together, one of each expert.

Experts are kept stacked, [E, ...], or each in its own module, whose names then differ in one number. Nothing else is read off a name.
"""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from ftc.rewrite.outcome import Declined


@dataclass(frozen=True)
class Family:
    """One parameter of every expert: `nodes` is one stacked parameter or one for each expert, in order; `shape` is that of one expert's."""

    nodes: tuple[fx.Node, ...]
    shape: tuple[int, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """The dotted names."""
        return tuple(str(node.target) for node in self.nodes)

    def value(self, values: dict[fx.Node, Tensor]) -> Tensor:
        """[E, ...] of given values."""
        return values[self.nodes[0]] if len(self.nodes) == 1 else torch.stack([values[node] for node in self.nodes])


def families(parameters: Iterable[fx.Node], num_experts: int) -> list[Family]:
    """The families among `parameters`, in the order of the graph. Raises Declined, with the first parameter that belongs to none."""
    numbered: dict[tuple, dict[int, fx.Node]] = defaultdict(dict)
    places: dict[fx.Node, list[tuple]] = {}
    for node in sorted(parameters):
        parts = str(node.target).split(".")
        places[node] = [(*parts[:at], None, *parts[at + 1 :], _shape(node)) for at, part in enumerate(parts) if part.isdigit()]
        for at, key in zip((at for at, part in enumerate(parts) if part.isdigit()), places[node], strict=True):
            numbered[key][int(parts[at])] = node
    # A name may hold several numbers (of a layer, of a step in a Sequential): the experts' is the one of which there are most.
    chosen: dict[tuple, dict[int, fx.Node]] = {}
    alone: list[fx.Node] = []
    for node, keys in places.items():
        key = max(keys, key=lambda key: len(numbered[key]), default=None)
        if key is None or len(numbered[key]) == 1:
            alone.append(node)
        else:
            chosen[key] = numbered[key]
    found = []
    for key, members in chosen.items():
        if sorted(members) == list(range(num_experts)):
            found.append(Family(tuple(members[expert] for expert in range(num_experts)), key[-1]))
        else:
            first = next(iter(members.values()))
            raise Declined(f"{len(members)} experts have a parameter as {first.target} is, and the router chooses among {num_experts}", first)
    for node in alone:
        shape = _shape(node)
        if len(shape) < 2 or shape[0] != num_experts:
            raise Declined(f"{node.target} {list(shape)} is no parameter of {num_experts} experts", node)
        found.append(Family((node,), shape[1:]))
    return sorted(found, key=lambda family: min(family.nodes))


def _shape(node: fx.Node) -> tuple[int, ...]:
    return tuple(int(size) for size in node.meta["val"].shape)
