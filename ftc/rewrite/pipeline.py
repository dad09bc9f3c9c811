"""Applying passes to a program: on copies of its graphs, proved, and only then committed, weights with them."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import fx

from ftc.capture.captured import tidy
from ftc.capture.code import Code, ShellCode
from ftc.capture.fork import isolate
from ftc.capture.growth import add_region, check_place, remove_region
from ftc.capture.program import Program, Region, capture
from ftc.capture.variants import Hole, Variant
from ftc.errors import FtcError, FtcFailure
from ftc.rewrite.calibration import as_batches, held_out, kl_divergence, num_tokens
from ftc.rewrite.certificate import certify
from ftc.rewrite.graph_json import graph_hash, graph_to_dict
from ftc.rewrite.lens import Lens
from ftc.rewrite.opened import close_calls, has_calls, open_calls
from ftc.rewrite.outcome import Miss, Outcome
from ftc.rewrite.registry import Request, make, parse_passes
from ftc.rewrite.shard import divisions, for_wholes, placements
from ftc.rewrite.spill import give_back
from ftc.rewrite.weights import apply_lenses, check_unshared, lend_lenses, renew_keys


def rewrite(
    model, passes, example=None, *, inplace: bool = False, check: bool = True, calibration=None, tokenizer=None, tell: Callable[[str], None] | None = None
) -> Program:
    """Capture `model` (or take a Program) and apply passes in order, each with certificates.

    `passes` are names, (name, options) pairs or tables; see `parse_passes`. `example` as for `ftc.capture`; needed for a
    model, optional for a Program. A copy is rewritten that shares every untouched parameter, unless `inplace`.
    `calibration`: token ids [N, T], a list of batches or of sequences of ids, or texts with their `tokenizer`, for passes that look
    at what the model computes. `tell` hears what long work is at.
    `check=False` skips the numerical proof (the report says so). Raises FtcError for what the user can mend, among it a
    pass that finds no site (its nearest miss is named), and FtcFailure when a contract does not hold.
    """
    requests = parse_passes(passes)
    if calibration is not None:
        calibration = as_batches(calibration, tokenizer)
    if isinstance(model, Program):
        program = model if inplace else model.fork()
        if example is not None:
            program.run_example(example)
    else:
        if example is None:
            raise FtcError("rewriting a model needs an example of its inputs: example={'input_ids': ids}")
        program = capture(model, example, inplace=inplace)
    for request in requests:
        apply_request(program, request, check=check, calibration=calibration, tell=tell)
    return program


@dataclass
class Step:
    """One applied pass, as new variants of a code meet it: the same pass again, the same lenses, a certificate of its own."""

    request: Request
    entry: dict
    graphs: dict[str, dict]
    lenses: list[Lens]
    check: bool
    growth: dict = field(default_factory=lambda: Outcome().growth())

    def replay(self, code: Code, variant: Variant) -> None:
        """Apply the pass to a variant captured after it; its parameters must have the form that they have now."""
        change = _change(self.request, code, variant)
        if change.outcome.retired:
            raise FtcError(f"after pass {self.request.name} there is no such call of {code.name}: {change.outcome.retired}")
        before = itertools.takewhile(lambda step: step is not self, code.steps)
        earlier = [lens for step in before for lens in step.lenses]
        if not _follows(change, self.lenses, self.growth, earlier):
            raise FtcFailure(
                f"pass {self.request.name} changed the parameters of {code.name}, but does not match in the graph for inputs of "
                f"this structure ({_first_reason(change.outcome)}); this call cannot run on the rewritten weights"
            )
        if change.outcome.misses and getattr(self.request.pass_, "every_graph", False):
            raise FtcError(f"pass {self.request.name} cannot follow in {code.name} for inputs of this structure: {_first_reason(change.outcome)}")
        if change.changed and self.check:
            self.entry["certificates"].append(_certificate(self.request, code, change))
            _keep(self.graphs, change)
        change.commit()
        _worst(self.entry)


@dataclass
class _Change:
    """What a pass does to one variant, before it is committed."""

    variant: Variant
    before: fx.Graph
    after: fx.Graph
    outcome: Outcome
    changed: bool = field(init=False)

    def __post_init__(self):
        self.changed = bool(self.outcome.matches)

    def commit(self) -> None:
        if self.outcome.shares:
            self.variant.divide_sizes(self.outcome.shares)
        if not self.changed:
            return
        if self.outcome.from_one:
            self.variant.follow_inputs(self.after, self.outcome.from_one)
        dropped, count = set(self.outcome.dropped), _num_outputs(self.before)
        places = {old: new for new, old in enumerate(i for i in range(count) if i not in dropped)} | self.outcome.answers
        self.variant.outputs = tuple(
            (Hole(places[leaf.index]) if leaf.index in places else None) if isinstance(leaf, Hole) else leaf
            for leaf in self.variant.outputs
        )
        self.variant.captured.graph = self.after
        self.variant.captured.constants |= {
            node.target: node.meta["constant"] for node in self.after.nodes if node.op == "get_attr" and "constant" in node.meta
        }
        self.variant.rebuild()


def apply_request(
    program: Program, request: Request, check: bool = True, calibration=None, tell: Callable[[str], None] | None = None, planned: dict | None = None
) -> dict:
    """Apply one pass to every graph of the program, prove it, commit it; returns the report's entry for it.

    `planned`: the passes of regions by name, where they were calibrated before; the program is then only tried, and has what those make
    while a region runs. On any error the program is left as it was before this pass.
    """
    tell = tell or (lambda text: None)
    for name in getattr(request.pass_, "requires", ()):
        if name not in {entry["pass"] for entry in program._applied}:
            apply_request(program, make(name, {"expect": "any"}), check=check, calibration=calibration)
    start = time.perf_counter()
    if hasattr(request.pass_, "with_program"):
        request = Request(request.pass_.with_program(program), request.expect)
    trial = planned is not None
    if hasattr(request.pass_, "calibrate") and not trial:
        planned = request.pass_.calibrate(program, calibration, tell, check)
        give_back()
    own = _own_requests(program, request, planned or {})
    plan: dict[Code, list[_Change]] = {}
    for code in program.codes:
        plan[code] = [_change(own.get(code, request), code, variant) for variant in code.all_variants()]
    plan = _without_retired(program, request, plan)
    lenses = {code: _agreed_lenses(request, code, changes) for code, changes in plan.items()}
    grown = {code: next((c.outcome for c in changes if c.changed), Outcome()) for code, changes in plan.items()}
    counts = _count(program, plan)
    _check_expectation(request, counts, plan)
    wholes = {code: for_wholes(found, code.lenses) for code, found in lenses.items()}
    for code in plan:
        if lenses[code]:
            placements([*code.lenses, *wholes[code]])
            for host in _hosts(program, code):
                check_unshared(program, host, lenses[code], request.name)
        for region in grown[code].regions:
            check_place(program, region.name)
    entry = {
        "pass": request.name,
        "contract": request.pass_.kept_contract(),
        "options": request.options(),
        "expect": request.expect,
        "matches": counts["matches"],
        "already": counts["already"],
        "sites": counts["sites"],
        "misses": [vars(miss) | {"code": code.name} for code, changes in plan.items() for miss in _unique_misses(changes)],
        "inverse": request.pass_.inverse and all(lens.has_inverse for found in wholes.values() for lens in found),
        "lenses": {code.name: [lens.as_dict() for lens in found] for code, found in wholes.items() if found},
        "regions": {code.name: outcome.growth() for code, outcome in grown.items() if outcome.regions or outcome.gone},
        "moments": sorted({lens.moments for found in lenses.values() for lens in found}),
        "checked": check,
        "notes": {code.name: found for code, changes in plan.items() if (found := list(dict.fromkeys(n for c in changes for n in c.outcome.notes)))},
        "certificates": [],
    }
    if check:
        for code, changes in plan.items():
            tell(f"proving {code.name}")
            for change in changes:
                if change.changed:
                    entry["certificates"].append(_certificate(own.get(code, request), code, change))
        give_back()
    if planned and not trial:
        entry["plans"] = {name: pass_.about() for name, pass_ in planned.items()}
        entry["metric"] = _measured_loss(program, request, calibration, planned, tell)
    for code, changes in plan.items():
        kept = {id(change.variant) for change in changes}
        if len(kept) < len(code.all_variants()):
            code.keep_variants(kept)
        for change in changes:
            if check and change.changed:
                _keep(program._graphs, change)
            change.commit()
        code.steps.append(Step(own.get(code, request), entry, program._graphs, wholes[code], check, grown[code].growth()))
        if lenses[code]:
            for host in _hosts(program, code):
                move = lend_lenses if trial and isinstance(host, Region) else apply_lenses
                move(host, lenses[code] if host.divided else wholes[code])
            code.lenses += wholes[code]
            for host in _hosts(program, code):
                host.divided = divisions(code.lenses) if host.divided else {}
            if planned and not trial:
                give_back()
    if planned and not trial:
        for pass_ in planned.values():
            getattr(pass_, "release", lambda: None)()
    _grow(program, grown)
    if counts["matches"] and hasattr(request.pass_, "new_config") and getattr(program, "config", None) is not None:
        program.config = request.pass_.new_config(program.config)
    if any(lenses.values()):
        program.forget()
        renew_keys(program)
    entry["seconds"] = round(time.perf_counter() - start, 3)
    _worst(entry)
    program._applied.append(entry)
    return entry


def _own_requests(program: Program, request: Request, planned: dict) -> dict[Code, Request]:
    """Requests by code for regions with passes of their own; each such region gets a code of its own first, but for twins whose passes make one graph."""
    alike: dict[Code, set] = {}
    for region in program.regions:
        alike.setdefault(region.code, set()).add(getattr(planned.get(region.ftc_name), "shared_as", None))
    for name in planned:
        kinds = alike.get(program._regions[name].code, set())  # a code made by `isolate` is not among them
        if len(kinds) != 1 or None in kinds:
            isolate(program, name)
    return {program._regions[name].code: Request(pass_, request.expect) for name, pass_ in planned.items()}


def _measured_loss(program: Program, request: Request, calibration, planned: dict, tell: Callable[[str], None]) -> dict:
    """KL(original || rewritten) of a rewritten fork, on text that was not calibrated on. FtcFailure where it is past the pass's `max_kl`."""
    tell("measuring what is lost")
    fork = program.fork()
    apply_request(fork, request, check=False, planned=planned)
    _, apart = held_out(calibration)
    value, bound = kl_divergence(program, fork, apart), request.pass_.max_kl
    for region in fork.regions:
        region.around = None  # which holds weights that are about to be replaced
    give_back()
    if bound is not None and not value <= bound:
        raise FtcFailure(
            f"pass {request.name} loses {value:.4f} nats a token (KL to the original on text apart), more than max_kl = {bound:g}; the program was left as it "
            "was. Keep more of the cache, or heal it afterwards and set no bound here"
        )
    return {"name": "KL(original || rewritten), nats a token", "value": value, "bound": bound, "tokens": num_tokens(apart)}


def apply_to_graph(request: Request, graph: fx.Graph, name: str = "graph", check: bool = True) -> tuple[fx.Graph, Outcome, dict | None]:
    """Apply a pass to one graph: the rewritten copy, the outcome, and the certificate (None when nothing changed)."""
    after = copy_graph(graph)
    outcome = request.pass_.apply(after)
    tidy(after, keep_random=False)
    if not outcome.matches:
        return graph, outcome, None
    proof = certify(request.pass_, name, graph, after, outcome) if check else None
    return after, outcome, proof


def copy_graph(graph: fx.Graph) -> fx.Graph:
    """A copy with the same node names and meta."""
    new = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        mapping[node] = new.node_copy(node, lambda n: mapping[n])
    return new


def _change(request: Request, code: Code, variant: Variant) -> _Change:
    before = variant.captured.graph
    if has_calls(before) and not getattr(request.pass_, "sees_calls", False):
        after, calls = open_calls(before)
    else:
        after, calls = copy_graph(before), None
    outcome = request.pass_.apply(after)
    if outcome.matches:
        tidy(after, keep_random=False)
        after = close_calls(after, calls, before, outcome.dropped) if calls is not None else after
    return _Change(variant, before, after, outcome)


def _without_retired(program: Program, request: Request, plan: dict[Code, list[_Change]]) -> dict[Code, list[_Change]]:
    """The plan without graphs that have no place in the rewritten program; FtcError where nothing of it could be called then."""
    kept = {code: [change for change in changes if not change.outcome.retired] for code, changes in plan.items()}
    for code, changes in reversed(plan.items()):
        if changes and not kept[code]:
            reasons = dict.fromkeys(change.outcome.retired for change in changes)
            raise FtcError(f"pass {request.name} finds no graph of {code.name} that it could rewrite: {'; '.join(reasons)}")
    return kept


def _certificate(request: Request, code: Code, change: _Change) -> dict:
    return certify(request.pass_, code.name, change.before, change.after, change.outcome)


def _keep(graphs: dict[str, dict], change: _Change) -> None:
    for graph in (change.before, change.after):
        graphs.setdefault(graph_hash(graph), graph_to_dict(graph, change.variant.captured))


def _num_outputs(graph: fx.Graph) -> int:
    return len(next(node for node in graph.nodes if node.op == "output").args[0])


def _hosts(program: Program, code: Code) -> list:
    return [program] if isinstance(code, ShellCode) else [r for r in program.regions if r.code is code]


def _grow(program: Program, grown: dict[Code, Outcome]) -> None:
    """Add the regions that passes ask for and take away those that are gone, in place; capture what the new ones need."""
    for outcome in grown.values():
        for region in outcome.regions:
            add_region(program, **vars(region))
        for name in outcome.gone:
            remove_region(program, name)
    if any(outcome.regions for outcome in grown.values()):
        for variant in program.code.all_variants():
            program.code.ensure_regions(variant.captured)


def _agreed_lenses(request: Request, code: Code, changes: list[_Change]) -> list[Lens]:
    """The lenses of a code: every variant must ask for the same, and for the same regions, since they share the parameters."""
    if not changes:
        return []
    leading = next((change for change in changes if change.changed), changes[0]).outcome
    first, growth = leading.lenses, leading.growth()
    for change in changes:
        if not _follows(change, first, growth):
            raise FtcError(
                f"pass {request.name} would change the parameters of {code.name} differently for inputs of different structure "
                f"({_first_reason(change.outcome)}); rewrite with examples of the structures that you need"
            )
    return list(first)


def _follows(change: _Change, lenses: list[Lens], growth: dict, earlier: Sequence[Lens] | None = None) -> bool:
    """Whether a variant goes with what a pass does to the parameters: it asks for the same, or reads none that are consumed.

    With `earlier`, the lenses applied before, `lenses` are over whole weights where the graph may be of a rank's own sizes."""
    outcome = change.outcome
    asked = outcome.lenses if earlier is None else for_wholes(outcome.lenses, earlier)
    if asked == lenses and outcome.growth() == growth:
        return True
    read = {str(node.target) for node in change.before.nodes if node.op in ("get_attr", "call_module")}
    consumed = {name for lens in lenses for name in lens.sources} | set(growth["gone"])
    adds = bool(growth["added"]) or not all(lens.sources for lens in lenses)
    return not outcome.matches and not adds and not read & consumed


def _first_reason(outcome: Outcome) -> str:
    return outcome.misses[0].reason if outcome.misses else "no site was found"


def _count(program: Program, plan: dict[Code, list[_Change]]) -> dict:
    total = {"matches": 0, "already": 0, "sites": {}}
    for code, changes in plan.items():
        if not changes:
            continue
        best = max(changes, key=lambda c: (len(c.outcome.matches), c.outcome.already))
        hosts = _hosts(program, code)
        total["matches"] += len(best.outcome.matches) * len(hosts)
        total["already"] += best.outcome.already * len(hosts)
        for host in hosts:
            total["sites"][host.ftc_name] = {
                "matches": [{"kind": m.kind, "detail": _plain(m.detail), "location": m.location} for m in best.outcome.matches],
                "already": best.outcome.already,
                "misses": len(best.outcome.misses),
            }
    return total


def _plain(detail: dict) -> dict:
    return {k: v if isinstance(v, (bool, int, float, str, type(None))) else str(v) for k, v in detail.items()}


def _unique_misses(changes: list[_Change]) -> list[Miss]:
    return list(dict.fromkeys(miss for change in changes for miss in change.outcome.misses))


def _check_expectation(request: Request, counts: dict, plan: dict[Code, list[_Change]]) -> None:
    satisfied = counts["matches"] + counts["already"]
    misses = [(code, miss) for code, changes in plan.items() for miss in _unique_misses(changes)]
    expect = request.expect
    if misses and getattr(request.pass_, "every_graph", False):
        code, miss = misses[0]
        raise FtcError(
            f"pass {request.name} has to change every graph of the program, and cannot: {miss.anchor} in {code.name}: {miss.reason}, "
            f"at {miss.node} ({miss.location})"
        )
    if expect == "any" or (expect == "some" and satisfied):
        return
    if expect == "all":
        lacking = [name for name, site in counts["sites"].items() if site["misses"]]
        if satisfied and not lacking:
            return
        problem = f"matched in {satisfied} places, but not in every region that has such a site ({', '.join(lacking[:4]) or 'none has one'})"
    elif expect == "some":
        problem = "found no site"
    elif satisfied == expect:
        return
    else:
        problem = f"expected {expect} sites and found {satisfied}"
    if misses:
        code, miss = misses[0]
        near = f"nearest miss: {miss.anchor} in {code.name}: {miss.reason}, at {miss.node} ({miss.location})"
    else:
        near = "nothing in the model resembles one"
    raise FtcError(f"pass {request.name} {problem}; {near}. Set expect = \"any\" to go on without it, or see `ftc explain --pass {request.name}`")


def _worst(entry: dict) -> None:
    for key in ("max_output_error", "max_gradient_error"):
        entry[key] = max((c[key] for c in entry["certificates"]), default=0.0)


