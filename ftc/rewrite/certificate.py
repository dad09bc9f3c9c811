"""Certificates: one graph against another on random values, outputs and gradients, and a record that can be run again.

Error is max|difference| over max(max|reference|, 1e-3 x the largest gradient in the region). `exact` allows 1e-12 in
float64 (pinned casts lifted on both sides) and 1e-5 in float32. Where rounding alone exceeds that (always in bfloat16 and
float16; in float32 where true values nearly cancel) both graphs are held against the lifted float64 result, and the
rewritten one may be at most twice as far from it as the original is; the trial then records `own_rounding`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence

import torch
from torch import fx

from ftc.errors import FtcFailure
from ftc.rewrite import probe
from ftc.rewrite.alignment import Alignment, align
from ftc.rewrite.certificate_ranks import Layout, errors_on_ranks, fitting_sizes, on_any_ranks
from ftc.rewrite.graph_json import graph_hash
from ftc.rewrite.lens import Lens, lens_from_dict
from ftc.rewrite.outcome import Outcome
from ftc.rewrite.spill import gradients

BOUNDS = {torch.float64: 1e-12, torch.float32: 1e-5}
_NAMES = {torch.float64: "float64", torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}
_LOW_PRECISION_FLOOR = 2.0**-8


def certify(pass_, code_name: str, before: fx.Graph, after: fx.Graph, outcome: Outcome) -> dict:
    """Compare `after` (parameters through the outcome's lenses) with `before` and return the certificate.

    Outputs that the outcome drops are not compared, nor is what is new; its layout says how ranks divide inputs and outputs.
    Raises FtcFailure when the contract does not hold.
    """
    hashes = {"before": graph_hash(before), "after": graph_hash(after)}
    lenses, growth = outcome.lenses, outcome.growth() | {"uncalled": list(outcome.uncalled)}
    if hasattr(pass_, "prove"):
        trials = pass_.prove(before, after)
    else:
        trials = _compared(_aligned(before, after, outcome.dropped, growth), lenses, outcome.layout)
    record = {
        "pass": pass_.name,
        "version": getattr(pass_, "version", 1),
        "code": code_name,
        "contract": pass_.kept_contract(),
        "matches": len(outcome.matches),
        **hashes,
        "lenses": [lens.as_dict() for lens in lenses],
        "dropped_outputs": list(outcome.dropped),
        "regions": growth,
        **({"layout": outcome.layout.as_dict()} if outcome.layout is not None else {}),
        "trials": trials,
        "max_output_error": max(t["output_error"] for t in trials if t["lifted"]),
        "max_gradient_error": max(t["gradient_error"] for t in trials if t["lifted"]),
        "torch": torch.__version__,
    }
    failed = [t for t in trials if not holds(record["contract"], t)]
    if failed:
        worst = failed[0]
        raise FtcFailure(
            f"pass {pass_.name} does not keep its contract ({record['contract']}) on {code_name}: in {worst['dtype']} the output error is "
            f"{worst['output_error']:.2e} and the gradient error {worst['gradient_error']:.2e} against a bound of {worst['bound']:.0e}; "
            "the program was left as it was"
        )
    return record


def compared(before: fx.Graph, after: fx.Graph, lenses: Sequence[Lens], earlier: Sequence[dict] | None = None) -> list[dict]:
    """Trials of `after`, its parameters through `lenses`, against `before`, for passes that prove in their own way; those of `earlier` once
    more where they are given."""
    pair = _aligned(before, after, (), {})
    if earlier is None:
        return _compared(pair, lenses, None)
    trials = [{k: t[k] for k in ("seed", "sizes", "dtype", "lifted")} for t in earlier]
    for trial in trials:
        run_trial(pair, lenses, trial, None)
    return trials


def _compared(pair: Alignment, lenses: Sequence[Lens], layout: Layout | None) -> list[dict]:
    """The trials of graph against graph: two assignments of sizes in float64, one in the model's dtype."""
    before, trials = pair.before, []
    own = model_dtype(before)
    for number, size in enumerate(probe.symbol_sizes(before)):
        values = fitting_sizes(pair, layout, ordered_sizes(before, size))
        trials.append({"seed": number, "sizes": values, "dtype": "float64", "lifted": True})
        if number == 0 and own != torch.float64:
            trials.append({"seed": number, "sizes": values, "dtype": _NAMES[own], "lifted": False})
    for trial in trials:
        run_trial(pair, lenses, trial, layout)
    return trials


def rerun(certificate: dict, before: fx.Graph, after: fx.Graph, pass_=None) -> list[dict]:
    """The certificate's trials measured anew on two graphs; does not raise when they fail.

    `pass_` is needed where the pass proves in its own way (`prove`)."""
    if hasattr(pass_, "prove"):
        return pass_.prove(before, after, certificate["trials"])
    lenses = [lens_from_dict(d) for d in certificate["lenses"]]
    trials = [{k: t[k] for k in ("seed", "sizes", "dtype", "lifted")} for t in certificate["trials"]]
    layout = Layout.from_dict(certificate.get("layout"))
    pair = _aligned(before, after, certificate["dropped_outputs"], certificate.get("regions", {}))
    for trial in trials:
        run_trial(pair, lenses, trial, layout)
    return trials


def _aligned(before: fx.Graph, after: fx.Graph, dropped: Sequence[int], growth: dict) -> Alignment:
    added = [region["name"] for region in growth.get("added", ())]
    return align(before, after, dropped, added, [*growth.get("gone", ()), *growth.get("uncalled", ())])


def holds(contract: str, trial: dict) -> bool:
    """Whether a measured trial keeps the contract. NaN never does."""
    if contract == "bitwise":
        return trial["output_error"] == 0 and trial["gradient_error"] == 0
    return trial["output_error"] <= trial["bound"] and trial["gradient_error"] <= trial["bound"]


def run_trial(pair: Alignment, lenses: Sequence[Lens], trial: dict, layout: Layout | None = None) -> None:
    """Measure one trial; writes `output_error`, `gradient_error` and `bound` into it."""
    if on_any_ranks(pair.before, pair.after):
        _run_trial_on_ranks(pair, lenses, trial, layout)
        return
    dtype, lifted, seed = _DTYPES[trial["dtype"]], trial["lifted"], trial["seed"]
    before = pair.before
    sizes = dict(zip(symbols_in_order(before), trial["sizes"], strict=True))
    kind = torch.float64 if lifted else None
    inputs = probe.random_inputs(before, sizes, seed, kind)
    parameters = probe.random_parameters(before, seed, dtype=kind)
    reference_out, reference_grad = _evaluate(before, inputs, dict(parameters), seed, lifted, pair.kept_before)
    moved = parameters
    with torch.no_grad():
        for lens in lenses:
            moved = lens.forward(moved)
    del parameters
    moved = moved | _own_constants(pair.after, moved)
    given = _inputs_after(pair, inputs, trial, kind)
    out, grads = _evaluate(pair.after, given, moved, seed, lifted, pair.kept_after)
    del moved
    grads = _gradients_before(pair, grads)
    with torch.no_grad():
        for lens in reversed(lenses):
            grads = lens.pull_back(grads)
    trial["output_error"], trial["gradient_error"] = _errors(out, reference_out, grads, reference_grad)
    bound = trial["bound"] = BOUNDS.get(dtype, 0.0)
    if lifted or max(trial["output_error"], trial["gradient_error"]) <= bound:
        return
    # Rounding alone exceeds the bound where true values nearly cancel (the gradients of queries and keys of one token are
    # zero), so the question is whether the rewritten graph is as near to the lifted result as the original is.
    wide_inputs = [i.double() if i.is_floating_point() else i for i in inputs]
    wide = probe.random_parameters(before, seed)
    for name in [name for name, value in wide.items() if value.is_floating_point()]:
        wide[name] = wide[name].double()  # one at a time: a region may be large
    true_out, true_grad = _evaluate(before, wide_inputs, wide, seed, True, pair.kept_before)
    own = max(_errors(reference_out, true_out, reference_grad, true_grad))
    trial["output_error"], trial["gradient_error"] = _errors(out, true_out, grads, true_grad)
    trial["own_rounding"] = own
    trial["bound"] = max(2 * max(own, 0.0 if bound else _LOW_PRECISION_FLOOR), bound)


def _own_constants(graph: fx.Graph, known: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Constants that a pass gave to a graph."""
    return {
        str(node.target): node.meta["constant"]
        for node in graph.nodes
        if node.op == "get_attr" and "constant" in node.meta and str(node.target) not in known
    }


def _run_trial_on_ranks(pair: Alignment, lenses: Sequence[Lens], trial: dict, layout: Layout | None) -> None:
    """The same for graphs that run on ranks: the worst of all ranks."""
    dtype, lifted = _DTYPES[trial["dtype"]], trial["lifted"]
    sizes = dict(zip(symbols_in_order(pair.before), trial["sizes"], strict=True))
    case = (pair, lenses, layout, sizes, trial["seed"], torch.float64 if lifted else None)
    reference, found = errors_on_ranks(*case)

    def worst(expected: list) -> tuple[float, float]:
        pairs = [_errors(r[0], e[0], r[1], e[1]) for e, ranks in zip(expected, found, strict=True) for r in ranks]
        return max(o for o, _ in pairs), max(g for _, g in pairs)

    trial["output_error"], trial["gradient_error"] = worst(reference)
    bound = trial["bound"] = BOUNDS.get(dtype, 0.0)
    if lifted or max(trial["output_error"], trial["gradient_error"]) <= bound:
        return
    true, _ = errors_on_ranks(*case, wide=True)
    own = max(max(_errors(r[0], t[0], r[1], t[1])) for r, t in zip(reference, true, strict=True))
    trial["output_error"], trial["gradient_error"] = worst(true)
    trial["own_rounding"] = own
    trial["bound"] = max(2 * max(own, 0.0 if bound else _LOW_PRECISION_FLOOR), bound)


def _inputs_after(pair: Alignment, inputs: Sequence[torch.Tensor], trial: dict, kind) -> list[torch.Tensor]:
    """The inputs of `before` where they go in `after`; what new regions give is drawn at random."""
    if None not in pair.inputs:
        return [inputs[place] for place in pair.inputs]
    sizes = dict(zip(symbols_in_order(pair.after), trial["sizes"], strict=True))
    fresh = probe.random_inputs(pair.after, sizes, trial["seed"] + 1_000, kind)
    return [new if place is None else inputs[place] for place, new in zip(pair.inputs, fresh, strict=True)]


def _gradients_before(pair: Alignment, grads: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
    """Gradients of inputs under their numbers in `before`; those of new inputs are left out."""
    if pair.inputs == list(range(len(pair.inputs))):
        return grads  # as they are: those of a large region are in a file
    places = {f"input:{number}": place for number, place in enumerate(pair.inputs)}
    kept = {n: g for n, g in grads.items() if n not in places}
    return kept | {f"input:{place}": grads[n] for n, place in places.items() if place is not None and n in grads}


def _evaluate(graph: fx.Graph, inputs, parameters, seed: int, lifted: bool, keep):
    """Outputs and the gradients of a fixed random functional of them, by name; inputs' gradients under 'input:i'."""
    leaves = {}
    for name, value in parameters.items():
        if value.is_floating_point() and value.dtype.itemsize > 1 and not name.startswith("_constant_"):
            leaves[name] = parameters[name] = value.detach().requires_grad_()
    given = []
    for number, value in enumerate(inputs):
        if value.is_floating_point():
            value = leaves[f"input:{number}"] = value.detach().requires_grad_()
        given.append(value)
    with torch.enable_grad():  # whoever calls under no_grad still gets a proof about gradients
        return _differentiate(graph, given, parameters, leaves, seed, lifted, keep)


def _differentiate(graph: fx.Graph, given, parameters, leaves: dict, seed: int, lifted: bool, keep):
    outputs = probe.run(graph, given, parameters, lifted=lifted)
    outputs = [outputs[i] for i in keep]
    total = None
    for number, out in enumerate(outputs):
        if out.is_floating_point() and out.requires_grad:
            generator = torch.Generator().manual_seed(seed * 77 + number)
            weight = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.dtype)
            term = (out * weight).sum().double()
            total = term if total is None else total + term
    if total is None:
        return [o.detach() for o in outputs], {n: torch.zeros_like(t) for n, t in leaves.items()}
    return [o.detach() for o in outputs], gradients(total, leaves)


# Of the largest gradient of the region: what a gradient that is zero may come to by rounding.
_ZERO = {dtype: 64 * torch.finfo(dtype).eps for dtype in (torch.float64, torch.float32)}


def _errors(out, reference_out, grads: dict, reference_grads: dict) -> tuple[float, float]:
    largest = max((probe.largest(g) for g in reference_grads.values() if g.numel()), default=0.0)
    output_error = max((probe.relative_error(a, b, largest) for a, b in zip(out, reference_out, strict=True)), default=0.0)
    gradient_error = 0.0
    for name, reference in reference_grads.items():
        found = grads.get(name)  # what is gone gives no gradient
        found = torch.zeros_like(reference) if found is None else found
        if _is_zero(found, reference, largest):
            continue
        gradient_error = max(gradient_error, probe.relative_error(found, reference, largest))
    return output_error, gradient_error


def _is_zero(found: torch.Tensor, reference: torch.Tensor, largest: float) -> bool:
    """Whether a gradient is zero to rounding by a float64 reference, and what was found as well: that of queries and keys where a single token attends to
    itself. Two roundings of zero say nothing of each other's size."""
    if reference.dtype != torch.float64 or found.dtype not in _ZERO or not reference.numel():
        return False
    return probe.largest(reference) <= _ZERO[torch.float64] * largest and probe.largest(found) <= _ZERO[found.dtype] * largest


def symbols_in_order(graph: fx.Graph) -> list:
    """The graph's size symbols in the order in which its placeholders show them."""
    found: dict = {}
    env = probe.shape_env(graph)
    for node in graph.nodes:
        if node.op == "placeholder":
            for size in node.meta["val"].shape:
                if isinstance(size, torch.SymInt):
                    found |= dict.fromkeys(sorted(env.replace(size.node.expr).free_symbols, key=str))
    return list(found)


def ordered_sizes(graph: fx.Graph, sizes: dict) -> list[int]:
    """An assignment of sizes as a list, in the order of `symbols_in_order`."""
    return [int(sizes[symbol]) for symbol in symbols_in_order(graph)]


def model_dtype(graph: fx.Graph) -> torch.dtype:
    """The floating dtype of most of the graph's parameters, else of its inputs; float32 where there are none."""
    counts: dict[torch.dtype, int] = {}
    for op in ("get_attr", "placeholder"):
        for node in graph.nodes:
            value = node.meta.get("val")
            if node.op == op and isinstance(value, torch.Tensor) and value.dtype in _NAMES and not _is_scale(node):
                counts[value.dtype] = counts.get(value.dtype, 0) + int(max(value.numel(), 1) if not isinstance(value.numel(), torch.SymInt) else 1)
        if counts:
            return max(counts, key=counts.get)
    return torch.float32


def _is_scale(node: fx.Node) -> bool:
    """Whether a parameter is read by quantised products alone: their scales have a dtype of their own."""
    return node.op == "get_attr" and bool(node.users) and all(str(user.target).startswith("ftc.quantized_") for user in node.users)


def digest(record: object) -> str:
    """sha256 of a JSON-ready record in canonical form."""
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
