"""Regions run as they would be quantised, without a change to the program: their graphs converted on copies, their weights from a store of values.

That is the computation of the finished program, activations included, so what a trial loses is what the program will lose.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ftc.capture.captured import compile_graph, tidy
from ftc.capture.program import Program, Region
from ftc.capture.variants import Variant
from ftc.evaluate import logits_of
from ftc.quantize.formats import Format, Quantised
from ftc.quantize.lens import target_names
from ftc.quantize.sites import Choice, convert
from ftc.rewrite.calibration import Batches, num_tokens, pieces

Formats = Mapping[str, Format]  # by name of the weight
_KEPT_BYTES = 1 << 30  # of the original's distributions, beside which they are computed anew


@dataclass
class Store:
    """Values by (region, weight, name of the format without activations), and static scales by (region, weight)."""

    values: dict[tuple[str, str, str], Quantised] = field(default_factory=dict)
    scales: dict[tuple[str, str], float] = field(default_factory=dict)

    def put(self, region: str, weight: str, format: Format, stored: Quantised) -> None:
        self.values[region, weight, format.weights_only().name] = stored

    def get(self, region: str, weight: str, format: Format) -> Quantised:
        return self.values[region, weight, format.weights_only().name]

    def tensors(self, region: str, formats: Formats) -> dict[str, Tensor]:
        """What a converted graph of the region reads, by name."""
        found = {}
        for weight, format in formats.items():
            stored = self.get(region, weight, format)
            found |= dict(zip(target_names(weight, format), (t for t in (stored.data, stored.scale, stored.zero) if t is not None), strict=True))
            if format.activations == "static":
                found[f"{weight.rpartition('.')[0]}.input_scale".removeprefix(".")] = torch.tensor([self.scales[region, weight]], dtype=torch.float32, device=stored.data.device)
        return found


class Trials:
    """Runs a program with regions quantised one way or another, and says what is lost."""

    def __init__(self, program: Program, store: Store):
        self.program, self.store = program, store
        self.functions: dict[tuple, tuple] = {}

    @contextlib.contextmanager
    def running(self, assignment: Mapping[str, Formats]) -> Iterator[None]:
        """Within it the regions of `assignment` run with the weights that it names in the formats that it gives them."""
        before = {name: self.program._regions[name].around for name in assignment}
        try:
            for name, formats in assignment.items():
                self.program._regions[name].around = self._around(self.program._regions[name], dict(formats))
            yield
        finally:
            for name, function in before.items():
                self.program._regions[name].around = function

    def _around(self, region: Region, formats: dict[str, Format]):
        given: dict[str, Tensor] = {}

        def run(_, args, kwargs):
            variant, tensors = region.code.find(region, args, kwargs)
            function, attributes = self._function(variant, formats)
            if not given:
                given.update(self.store.tensors(region.ftc_name, formats))

            def fetch(name: str) -> Tensor:
                return given[name] if name in given else region.fetch(name)

            return variant.structured(function(None, *variant.attribute_values(attributes, fetch, tensors), *tensors))

        return run

    def _function(self, variant: Variant, formats: dict[str, Format]):
        from ftc.rewrite.pipeline import copy_graph

        key = (id(variant), tuple(sorted((weight, format.name) for weight, format in formats.items())))
        if key not in self.functions:
            graph = copy_graph(variant.captured.graph)
            convert(graph, Choice(lambda kind, name, shape: formats.get(name)))
            tidy(graph, keep_random=False)
            function, attributes, _ = compile_graph(graph, variant.captured.constants, f"{variant.name}_quantised")
            self.functions[key] = (function, attributes, variant)
        return self.functions[key][:2]


class Loss:
    """KL(original || quantised) in nats a token on some text; the original's distributions are kept where they are small."""

    def __init__(self, trials: Trials, batches: Batches):
        self.trials, self.batches = trials, pieces(trials.program, batches)
        self.tokens = num_tokens(batches)
        self._kept: list[Tensor] | None = None
        with self._eval(), torch.no_grad():
            first = logits_of(trials.program(**self.batches[0]))
            if first.shape[-1] * self.tokens * 4 <= _KEPT_BYTES:
                self._kept = [self._original(batch) for batch in self.batches]

    def _original(self, batch: dict) -> Tensor:
        return torch.log_softmax(logits_of(self.trials.program(**batch)).float(), -1)

    @contextlib.contextmanager
    def _eval(self) -> Iterator[None]:
        training = self.trials.program.training
        self.trials.program.eval()
        try:
            yield
        finally:
            self.trials.program.train(training)

    def of(self, assignment: Mapping[str, Formats]) -> float:
        """What an assignment of formats loses."""
        total = 0.0
        with self._eval(), torch.no_grad():
            for number, batch in enumerate(self.batches):
                ours = self._original(batch) if self._kept is None else self._kept[number]
                with self.trials.running(assignment):
                    theirs = torch.log_softmax(logits_of(self.trials.program(**batch)).float(), -1)
                for a, b in zip(ours.flatten(0, -2).split(256), theirs.flatten(0, -2).split(256), strict=True):
                    a, b = a.double(), b.double()
                    total += float((a.exp() * (a - b)).sum())
        return total / self.tokens
