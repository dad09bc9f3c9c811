"""Calibrated rounding of all regions of a program, in the order in which they run.

Each product is rounded for what it will read: x' , the values after everything before it was rounded. What it should give is what it gave, W x, so the
weights that are rounded are first moved to where that is met best (GPTAQ: Li et al. 2025, arXiv:2504.02692):

    argmin_V E|W x - V x'|^2  =  W + W (E[x x'^T] - E[x' x'^T]) E[x' x'^T]^-1

Experts are rounded for the tokens that chose them, without that move (the two streams may choose differently), and with a share of all tokens where few did.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ftc.capture.program import Program, Region
from ftc.capture.variants import Variant
from ftc.dialect.moe import middle
from ftc.dialect.quantized_linear import FP8_LARGEST
from ftc.errors import FtcError
from ftc.quantize.formats import Format
from ftc.quantize.rounding import DAMP, calibrated
from ftc.quantize.sites import Site, find_sites
from ftc.quantize.stream import walk
from ftc.quantize.trial import Store
from ftc.rewrite.calibration import Batches
from ftc.rewrite.edit import linear_operands
from ftc.rewrite.observe import _with_values

Tell = Callable[[str], None]
FEW_TOKENS = 64  # of an expert: it is rounded for so many of all tokens besides its own


def calibrate(
    program: Program, assignments: Mapping[str, Mapping[str, list[Format]]], batches: Batches, store: Store, sequential: bool = True, tell: Tell = lambda text: None,
    nearest: bool = False,
) -> None:  # fmt: skip
    """Put into `store` the values of weights (region -> weight -> formats), rounded for what they read on the text, and their static scales.

    With `sequential` each weight has one format and reads what the rounded program gives; otherwise each is rounded as if it were the only one.
    `nearest` rounds to nearest and only looks for static scales. The program is left as it is. FtcError for a scale that overflows.
    """
    names = [name for name, weights in assignments.items() if weights]

    def visit(name: str, streams: list[list]) -> list[list]:
        tell(f"calibrating {name}")
        work = _Region(program._regions[name], streams, assignments[name], store, nearest)
        return work.rounded() if sequential else work.alone()

    if not names:
        return
    with torch.no_grad():
        walk(program, batches, visit, names, streams=2 if sequential else 1)


class _Region:
    """One region on all batches: the original's calls, and those after rounding."""

    def __init__(self, region: Region, streams: list[list], weights: Mapping[str, list[Format]], store: Store, nearest: bool):
        self.region, self.weights, self.store, self.nearest = region, weights, store, nearest
        found = [[region.code.find(region, *call) for call in calls] for calls in streams]
        self.calls: list[list[tuple[Variant, list[Tensor]]]] = found
        self.functions: dict[int, tuple] = {}
        variant = found[0][0][0]
        self.sites = [site for site in find_sites(variant.captured.graph)[0] if any(name in weights for name in site.names)]
        self.exchanged: dict[str, Tensor] = {}

    def alone(self) -> list[list]:
        """Every weight in every format for the original's inputs; the original's results."""
        results, values = self._run(0)
        for group in _groups(self.sites):
            for site in group:
                self._round(site, values, values)
        return [results]

    def rounded(self) -> list[list]:
        """Every weight in its format, one group of products after the other; the results of both streams."""
        originals, before = self._run(0)
        for group in _groups(self.sites):
            _, now = self._run(1)
            for site in group:
                self._round(site, before, now)
        return [originals, self._run(1)[0]]

    def _run(self, stream: int) -> tuple[list, dict[str, list[Tensor]]]:
        """Results by batch, and what each site reads, by name of the node, of a stream's calls."""
        results, values = [], {}
        for variant, tensors in self.calls[stream]:
            names = _read_nodes(find_sites(variant.captured.graph)[0])
            if id(variant) not in self.functions:
                self.functions[id(variant)] = _with_values(variant, names)
            function, attributes, count = self.functions[id(variant)]

            def fetch(name: str, exchanged=self.exchanged if stream else {}) -> Tensor:
                return exchanged[name] if name in exchanged else self.region.fetch(name)

            found = function(None, *variant.attribute_values(attributes, fetch, tensors), *tensors)
            results.append(variant.structured(found[:count]))
            for name, value in zip(names, found[count:], strict=True):
                values.setdefault(name, []).append(value)
        return results, values

    def _round(self, site: Site, before: dict, now: dict) -> None:
        if site.kind == "experts":
            self._round_experts(site, now)
            return
        name, node = site.names[0], linear_operands(site.node)[0].name
        weight = self.region.fetch(name).detach()
        reads = _rows(now[node])
        self._scale_of(name, reads)
        wanted, hessian = weight, None
        if not self.nearest:
            hessian = reads.mT @ reads / len(reads)
            wanted = weight if now is before else _moved(weight, _rows(before[node]).mT @ reads / len(reads), hessian)
        self._put(name, wanted, hessian, weight)

    def _scale_of(self, name: str, reads: Tensor) -> None:
        scale = float(reads.abs().max()) / FP8_LARGEST
        if not torch.isfinite(torch.tensor(scale, dtype=torch.float32)):
            raise FtcError(f"what {self.region.ftc_name}.{name} reads is not finite on the calibration text, or overflows a scale of it; look for what is not finite in the model")
        self.store.scales[self.region.ftc_name, name] = max(scale, 1e-12)

    def _put(self, name: str, wanted: Tensor, hessian: Tensor | None, weight: Tensor) -> None:
        for format in self.weights.get(name, ()):
            stored = format.nearest(weight) if hessian is None else calibrated(wanted, hessian, format.weights_only())
            self.store.put(self.region.ftc_name, name, format, stored)
            self.exchanged[name] = format.decode(stored, weight.shape[-1], weight.dtype)

    def _round_experts(self, site: Site, now: dict) -> None:
        names = ["x", "indices", "weights", "gate_up", "down", "gate_up_bias", "down_bias"]
        arguments = dict(zip(names, site.node.args, strict=False)) | dict(site.node.kwargs)
        x, indices, shares = (torch.cat([v.flatten(0, -2) for v in now[arguments[word].name]]) for word in ("x", "indices", "weights"))
        fetched = {word: self.region.fetch(str(arguments[word].target)).detach() for word in names[3:] if arguments.get(word) is not None}
        gated = fetched["gate_up"].shape[1] != fetched["down"].shape[2]
        activation, constants = arguments.get("activation", "silu"), list(arguments.get("constants", []))
        for word, name in (("gate_up", site.names[0]), ("down", site.names[1])):
            for format in self.weights.get(name, ()):
                self.store.put(self.region.ftc_name, name, format, format.nearest(fetched[word]) if self.nearest else _rounded_experts(
                    format, fetched, word, x, indices, shares, arguments.get("weight_on_input", False), gated, activation, constants))  # fmt: skip
                self.exchanged[name] = format.decode(self.store.get(self.region.ftc_name, name, format), fetched[word].shape[-1], fetched[word].dtype)
            if word == "gate_up" and name in self.exchanged:
                fetched["gate_up"] = self.exchanged[name]


def _rounded_experts(format, fetched, word, x, indices, shares, on_input, gated, activation, constants):
    """All experts' matrices called `word`, each for its own tokens, stacked again."""
    from ftc.quantize.formats import Quantised

    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    reads = []
    for expert in range(fetched["down"].shape[0]):
        token, slot = torch.where(indices == expert)
        rows = x[token] * shares[token, slot, None] if on_input else x[token]
        if word == "down":
            bias = fetched["gate_up_bias"][expert] if "gate_up_bias" in fetched else None
            rows = middle(torch.nn.functional.linear(rows.to(x.dtype), fetched["gate_up"][expert], bias), gated, activation, constants)
        reads.append(rows.to(wide))
    every = torch.cat(reads)
    shared = every.mT @ every / max(len(every), 1)
    made = []
    for expert, rows in enumerate(reads):
        hessian = (rows.mT @ rows + FEW_TOKENS * shared) / (len(rows) + FEW_TOKENS)
        made.append(calibrated(fetched[word][expert], hessian, format.weights_only()))
    zero = None if made[0].zero is None else torch.stack([m.zero for m in made])
    data = [m.data.view(torch.uint8) if format.dtype == "fp8" else m.data for m in made]
    return Quantised(torch.stack(data).view(made[0].data.dtype), torch.stack([m.scale for m in made]), zero)


def _rows(values: list[Tensor]) -> Tensor:
    rows = torch.cat([value.flatten(0, -2) for value in values])
    return rows if rows.dtype == torch.float64 else rows.float()


def _moved(weight: Tensor, cross: Tensor, hessian: Tensor) -> Tensor:
    """The weights that give on x' most nearly what `weight` gives on x; `cross` E[x x'^T]."""
    damped = hessian + torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device) * (DAMP * hessian.diagonal().mean().clamp_min(1e-30))
    wide = weight.to(hessian.dtype)
    return (wide + torch.linalg.solve(damped, (wide @ (cross - hessian)).mT).mT).to(weight.dtype)


def _groups(sites: list[Site]) -> list[list[Site]]:
    """Sites that read the same, in the order of the graph."""
    groups: dict[object, list[Site]] = {}
    for site in sites:
        groups.setdefault(site.node.args[0] if site.kind != "experts" else site.node, []).append(site)
    return list(groups.values())


def _read_nodes(sites: list[Site]) -> list[str]:
    names = [argument.name for site in sites for argument in (site.node.args[:3] if site.kind == "experts" else site.node.args[:1])]
    return list(dict.fromkeys(names))
