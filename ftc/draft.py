"""A program's own modules for further tokens (add-mtp) as the draft of speculative decoding: hidden states in, draft logits out.

    look(ids)                     one run of the model: logits of every place, and what drafting starts from
    propose(look, ids)            further tokens, one module after the other (sequential) or all from one place (parallel)

Functions are cut out of the program's graph for calls without labels, so a loaded program drafts without the original code.
Shapes: T tokens, D width, V vocabulary; one text at a time.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from ftc.capture.captured import compile_graph, tidy
from ftc.capture.program import Program
from ftc.capture.results import extras, output_node, pruned
from ftc.capture.variants import Hole, Variant
from ftc.errors import FtcError
from ftc.evaluate import logits_of


@dataclass(frozen=True)
class Look:
    """One run of the model over T tokens: `logits` [T, V]; `hidden` [1, T, D] for sequential modules, or `heads`: logits
    [T, V] of each parallel head."""

    logits: Tensor
    hidden: Tensor | None
    heads: list[Tensor]


class Drafter:
    """Drafts with the modules of `program`. Raises FtcError when it has none."""

    def __init__(self, program: Program):
        if not isinstance(program, Program) or not any(name.startswith("mtp.") for name in program._regions):
            raise FtcError("the model has no modules that draft; rewrite it with add-mtp, train it, and keep them with mtp-draft")
        self.program = program
        self._functions: dict[tuple[fx.Graph, str], Callable] = {}
        places = self._places(self._find(torch.zeros(1, 2, dtype=torch.long, device=self._device))[0])
        self.depth = sum(name.startswith("mtp_logits_") for name in places)
        self.is_sequential = "mtp_hidden_0" in places

    @property
    def _device(self) -> torch.device:
        return next(self.program.parameters()).device

    @torch.no_grad()
    def look(self, ids: Sequence[int]) -> Look:
        """Run the model over `ids`."""
        variant, tensors = self._find(torch.tensor([list(ids)], device=self._device))
        places = self._places(variant)
        names = ["mtp_hidden_0"] if self.is_sequential else [f"mtp_logits_{k}" for k in range(1, self.depth + 1)]
        wanted = [leaf.index for leaf in variant.outputs if isinstance(leaf, Hole)] + [places[name] for name in names]
        function, attributes, order = self._cached(variant, "look", lambda: _selected(variant, wanted))
        results = function(self.program, *variant.attribute_values(attributes, self.program.fetch, tensors), *tensors)
        given = {place: results[order[place]] for place in wanted}
        logits = logits_of(variant.structured(given))[0]
        more = [given[places[name]] for name in names]
        return Look(logits, more[0], []) if self.is_sequential else Look(logits, None, [t[0] for t in more])

    @torch.no_grad()
    def propose(self, look: Look, ids: Sequence[int], count: int | None = None) -> list[int]:
        """Up to `depth` further tokens after `ids`, whose last token is the one that the model itself chose next.

        `look` must have seen all tokens but that last one; what it has seen beyond them is ignored.
        """
        count, seen = min(count or self.depth, self.depth), len(ids) - 1
        if not self.is_sequential:
            return [int(heads[seen - 1].argmax()) for heads in look.heads[:count]]
        known, hidden = list(ids), look.hidden[:, :seen]
        for k in range(1, count + 1):
            variant, tensors = self._find(torch.tensor([ids[:seen]], device=self._device))
            function, attributes, _ = self._cached(variant, f"step {k}", lambda v=variant, k=k: _step(v, self._places(v), k))
            following = torch.tensor([known[k : k + seen]], device=self._device)
            given = variant.attribute_values(attributes, self.program.fetch, tensors)
            hidden, logits = function(self.program, *given, *tensors, hidden, following)
            known.append(int(logits[0, -1].argmax()))
        return known[len(ids) :]

    def _find(self, ids: Tensor) -> tuple[Variant, list[Tensor]]:
        return self.program.code.find(self.program, (), {"input_ids": ids})

    def _places(self, variant: Variant) -> dict[str, int]:
        return extras(variant.captured.graph)

    def _cached(self, variant: Variant, what: str, make: Callable):
        key = (variant.captured.graph, what)
        if key not in self._functions:
            self._functions[key] = make()
        return self._functions[key]


def _selected(variant: Variant, wanted: list[int]):
    graph, order = pruned(variant.captured.graph, wanted)
    function, attributes, _ = compile_graph(graph, variant.captured.constants, f"{variant.name}_look")
    return function, attributes, order


def _step(variant: Variant, places: dict[str, int], k: int):
    """The k-th module as a function of the model's inputs, the hidden states before it and the tokens that it reads."""
    original = variant.captured.graph
    results = output_node(original).args[0]
    graph, mapping = fx.Graph(), {}
    for node in original.nodes:
        if node.op == "placeholder":
            mapping[node] = graph.node_copy(node)
    for name in (f"mtp_hidden_{k - 1}", f"mtp_next_{k}"):
        node = results[places[name]]
        mapping[node] = graph.placeholder(name)
        mapping[node].meta = dict(node.meta)
    for node in original.nodes:
        if node not in mapping and node.op != "output":
            mapping[node] = graph.node_copy(node, lambda n: mapping[n])
    graph.output(tuple(mapping[results[places[name]]] for name in (f"mtp_hidden_{k}", f"mtp_logits_{k}")))
    tidy(graph)
    function, attributes, _ = compile_graph(graph, variant.captured.constants, f"{variant.name}_draft_{k}")
    return function, attributes, None
