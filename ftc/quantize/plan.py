"""From a pass's options and calibration text to a plan for each region: formats, values, and what was measured on the way."""

from __future__ import annotations

from collections.abc import Callable

from torch import fx

from ftc.errors import FtcError, FtcFailure
from ftc.quantize.budget import Chosen, fit_budget
from ftc.quantize.calibrate import calibrate
from ftc.quantize.formats import Format, why_not
from ftc.quantize.proof import prove
from ftc.quantize.sensitivity import Sensitivity, Unit, assignments, find_units, measure
from ftc.quantize.sites import Choice, convert
from ftc.quantize.trial import Formats, Store
from ftc.rewrite.calibration import Batches, held_out, num_tokens
from ftc.rewrite.outcome import Outcome

MOST_TOKENS = 2048  # that any width asks for: below it the second moments of an input of so many columns would lack rank


class Plan:
    """The pass as it acts on one region (or on several that have the same formats): `apply` by the plan, `prove` the pass's own."""

    contract = "lossy"

    def __init__(self, of, region: str, formats: Formats, store: Store, shared: dict, about: dict, notes: list[str]):
        self.name, self.version, self.inverse = of.name, of.version, of.inverse
        self.formats, self.shared = dict(formats), shared
        self.shared_as = tuple(sorted((weight, f.name) for weight, f in self.formats.items()))
        shared["values"][region] = {weight: store.get(region, weight, f) for weight, f in self.formats.items()}
        shared["scales"][region] = {
            f"{weight.rpartition('.')[0]}.input_scale".removeprefix("."): store.scales[region, weight] for weight, f in self.formats.items() if f.activations == "static"
        }
        self._about, self.notes = about, notes

    def kept_contract(self) -> str:
        return self.contract

    def apply(self, graph: fx.Graph) -> Outcome:
        outcome = convert(graph, Choice(lambda kind, name, shape: self.formats.get(name), self.shared["values"], self.shared["scales"]))
        outcome.notes += self.notes
        return outcome

    def prove(self, before: fx.Graph, after: fx.Graph, earlier: list[dict] | None = None) -> list[dict]:
        return prove(before, after, earlier)

    def about(self) -> dict:
        """JSON-ready, for the report."""
        return self._about

    def release(self) -> None:
        """Forget the values once the program has them."""
        self.shared["values"].clear()


def plan_formats(pass_, program, batches: Batches, tell: Callable[[str], None]) -> dict[str, Plan]:
    """Plans by region. FtcError for too little text; see `Quantize.calibrate`."""
    products, units = (find_units(program, by, pass_.wanted) for by in ("product", pass_.by))
    if not units:
        raise FtcError(f"pass {pass_.name} found no product over weights in the model's blocks")
    nearest = pass_.rounding == "nearest"
    text, apart = held_out(batches)
    chooses = pass_.dtype is None
    fit, other = held_out(text) if chooses or pass_.sensitivity else (text, apart)
    _check_text(pass_, units, batches, fit, nearest)
    sensitivity = chosen = None
    if chooses or pass_.sensitivity:
        sensitivity, _, loss = measure(program, units, pass_.candidates, fit, other, nearest, tell)
    if chooses:
        chosen = fit_budget(program, sensitivity, pass_.max_kl, fit, loss, apart, nearest, tell)
        choice, store = chosen.choice, chosen.store
        if not any(choice.values()):
            least, unit, name = min((kl, unit.name, name) for (unit, name), kl in sensitivity.kl.items())
            raise FtcFailure(f"pass {pass_.name}: nothing can be quantised within max_kl = {pass_.max_kl:g}: what loses least is {unit} in {name}, {least:.2e} nats a token")
    else:
        format = pass_.candidates[0]
        choice, store = {unit: format if unit.takes(format) else None for unit in products}, Store()
        calibrate(program, {r: {w: [f] for w, f in weights.items()} for r, weights in assignments(choice).items()}, text, store, nearest=nearest, tell=tell)
    return _plans(pass_, choice, store, sensitivity, chosen)


def _plans(pass_, choice: dict[Unit, Format | None], store: Store, sensitivity: Sensitivity | None, chosen: Chosen | None) -> dict[str, Plan]:
    shared = {"values": {}, "scales": {}}
    by_region: dict[str, list[Unit]] = {}
    for unit in choice:
        by_region.setdefault(unit.region, []).append(unit)
    found = {}
    for region, units in by_region.items():
        about = {"formats": {w: "as it was" if choice[u] is None else choice[u].name for u in units for w in u.weights}}
        about["bytes"] = [sum(u.num_bytes(None) for u in units), sum(u.num_bytes(choice[u]) for u in units)]
        if sensitivity is not None:
            rows = sensitivity.as_dict()
            about["sensitivity"] = rows | {"units": [row for row in rows["units"] if row["region"] == region]}
        if chosen is not None:
            about["budget"] = {"predicted": chosen.predicted, "measured": chosen.measured, "factor": chosen.factor, "repairs": chosen.repairs}
        formats = {w: choice[u] for u in units for w in u.weights if choice[u] is not None}
        refused = {w: reason for u in units for w, s in zip(u.weights, u.shapes, strict=True) for f in pass_.candidates if (reason := why_not(f, s)) is not None}
        notes = [f"{weight} {'stays as it is' if weight not in formats else 'is ' + formats[weight].name}: {reason}" for weight, reason in refused.items()]
        found[region] = Plan(pass_, region, formats, store, shared, about, notes)
    return found


def _check_text(pass_, units: list[Unit], batches: Batches, fit: Batches, nearest: bool) -> None:
    needed, there = 64 if nearest else min(max(unit.width for unit in units), MOST_TOKENS), num_tokens(fit)
    if there < needed:
        share = there / num_tokens(batches)
        raise FtcError(
            f"pass {pass_.name}: the calibration text has {num_tokens(batches):,} tokens, of which {there:,} are calibrated on and the others measured on; products "
            f"of these widths need {needed:,}, so give at least {int(needed / max(share, 1e-9)) + 1:,} tokens, or rounding = nearest"
        )
