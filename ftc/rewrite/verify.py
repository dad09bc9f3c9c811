"""Verifying a saved program from its files alone: every certificate is run again and its record compared.

What no check from the files can find: a folder that somebody wrote anew as a whole, with true certificates of another
program. Keep the digest that `ftc.json` ends in, or compare it with the one that was published.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import fx

from ftc.errors import FtcError
from ftc.files import MARKER
from ftc.rewrite import certificate as certificates
from ftc.rewrite import probe
from ftc.rewrite.continuation import is_state
from ftc.rewrite.graph_json import graph_from_dict, graph_hash
from ftc.rewrite.lens import lens_from_dict
from ftc.rewrite.lens_add import Add, AddBuffer
from ftc.rewrite.shard import divisions
from ftc.rewrite.store import digest, file_sha, load, read_about, read_json

_NOISE = 64.0  # rounding differs between machines and thread counts; an error may, by this factor
_FLOOR = 1e-2  # of the bound: below it two errors are both nothing


@dataclass(frozen=True)
class Row:
    """One check: its name, its kind (file, graph, certificate, chain, weights, program), and what was found."""

    name: str
    kind: str
    ok: bool
    detail: str


@dataclass
class Verification:
    """What `verify` found; `str()` is a table for people."""

    folder: str
    results: list[Row] = field(default_factory=list)
    tell: Callable[[str], None] = lambda name: None  # hears the name of each check as it begins

    @property
    def ok(self) -> bool:
        """Whether every check held."""
        return bool(self.results) and all(row.ok for row in self.results)

    @property
    def rows(self) -> list[dict]:
        """The checks as dicts name, kind, ok, detail."""
        return [asdict(row) for row in self.results]

    def as_dict(self) -> dict:
        """JSON-ready."""
        return {"folder": self.folder, "ok": self.ok, "rows": self.rows}

    def add(self, name: str, kind: str, check: Callable[[], tuple[bool, str]]) -> bool:
        """Run one check; what it raises is a failure."""
        self.tell(name)
        try:
            ok, detail = check()
        except Exception as error:  # whatever a tampered file provokes is a finding
            ok, detail = False, f"{type(error).__name__}: {error}" if not isinstance(error, FtcError) else str(error)
        self.results.append(Row(name, kind, bool(ok), detail))
        return bool(ok)

    def section(self, name: str, checks: Callable[[], None]) -> None:
        """Run several checks; when the record cannot even be taken apart, that is one failure."""
        try:
            checks()
        except Exception as error:
            self.results.append(Row(name, "file", False, f"it cannot be read: {type(error).__name__}: {error}"))

    def __str__(self) -> str:
        from rich.console import Console
        from rich.table import Table

        failed = [row for row in self.results if not row.ok]
        verdict = "verified" if self.ok else f"FAILED: {len(failed)} of {len(self.results)} checks"
        table = Table(title=f"{self.folder}: {verdict}")
        for column in ("check", "kind", "ok", "detail"):
            table.add_column(column, overflow="fold")
        shown = [row for row in self.results if not row.ok or row.kind not in ("file", "graph")]
        for row in shown:
            table.add_row(row.name, row.kind, "yes" if row.ok else "NO", row.detail)
        console = Console(file=io.StringIO(), width=120)
        console.print(table, markup=False)
        return console.file.getvalue()


def verify(folder: str | Path, tell: Callable[[str], None] | None = None) -> Verification:
    """Check a folder that `program.save` wrote; see docs/certificates.md for what is checked.

    Never raises for a damaged or tampered program: `ok` is False and the rows say why. Raises FtcError only when `folder`
    is no program at all. `tell` hears the name of each check as it begins.
    """
    folder = Path(folder)
    about = read_about(folder)
    found = Verification(str(folder), tell=tell or (lambda name: None))
    found.section("files", lambda: _check_files(found, folder, about))
    graphs = _check_graphs(found, folder)
    applied, codes = [], []

    def read() -> tuple[bool, str]:
        applied.extend(read_json(folder / "certificates.json")["applied"])
        codes.extend(read_json(folder / "variants.json")["codes"])
        return True, f"{len(applied)} passes, {len(codes)} codes"

    found.add("certificates and variants", "file", read)
    for number, entry in enumerate(applied):
        found.section(f"{number + 1}. pass", lambda n=number, e=entry: _check_entry(found, n, e, graphs))
    found.section("chains", lambda: _check_chains(found, codes, applied, graphs))
    found.section("program", lambda: _check_program(found, folder))
    return found


def _check_files(found: Verification, folder: Path, about: dict) -> None:
    found.add(MARKER, "file", lambda: (about.get("digest") == digest(about), "its own digest"))
    files = about.get("files")
    if not isinstance(files, dict):
        found.add("files", "file", lambda: (False, "ftc.json lists no files"))
        return
    needed = {"variants.json", "certificates.json", *(row["file"] for row in about.get("tensors", {}).values())}
    found.add("list of files", "file", lambda: (needed <= set(files), "weights, variants and certificates are listed"))
    for name, sha in files.items():

        def check(name=name, sha=sha) -> tuple[bool, str]:
            if not (folder / name).is_file():
                return False, "missing"
            return file_sha(folder / name) == sha, "sha256"

        found.add(name, "file", check)


def _check_graphs(found: Verification, folder: Path) -> dict[str, fx.Graph]:
    graphs: dict[str, fx.Graph] = {}
    for path in sorted((folder / "graphs").glob("*.json")):

        def check(path=path) -> tuple[bool, str]:
            graph = graph_from_dict(read_json(path))
            graphs[path.stem] = graph
            actual = graph_hash(graph)
            return actual == path.stem, "computes its name" if actual == path.stem else f"its hash is {actual[:12]}"

        found.add(path.stem[:12], "graph", check)
    return graphs


def _check_entry(found: Verification, number: int, entry: dict, graphs: dict[str, fx.Graph]) -> None:
    def summary() -> tuple[bool, str]:
        records = entry["certificates"]
        if not entry["checked"]:
            return False, "applied with check=False: nothing was proved"
        own = _as_applied(entry)
        back = own is not None and own.inverse and all(lens.get("exact", True) for found in entry["lenses"].values() for lens in found)
        for name, said in (("contract", own.kept_contract()), ("inverse", back)) if own is not None else ():
            if said != entry[name]:
                return False, f"{name} is {entry[name]}, the pass says {said}"
        for key in ("max_output_error", "max_gradient_error"):
            worst = max((c[key] for c in records), default=0.0)
            if entry[key] != worst:
                return False, f"{key} is {entry[key]}, its certificates say {worst}"
        counted = sum(len(site["matches"]) for site in entry["sites"].values())
        if entry["matches"] != counted:
            return False, f"{entry['matches']} matches are claimed, {counted} are listed"
        if entry["matches"] and not records:
            return False, "it matched and has no certificate"
        return True, f"{entry['matches']} matches, {len(records)} certificates"

    name = f"{number + 1}. {entry.get('pass') if isinstance(entry, dict) else entry}"
    found.add(name, "pass", summary)
    known: dict[str, tuple[bool, str]] = {}
    for record in entry.get("certificates", ()) if isinstance(entry, dict) else ():

        def check(record=record) -> tuple[bool, str]:
            same = json.dumps(record | {"code": None}, sort_keys=True)  # train and eval mode often have one graph
            if same not in known:
                known[same] = _rerun(entry, record, graphs)
            return known[same]

        found.add(f"{name} on {record.get('code')}", "certificate", check)


def _rerun(entry: dict, record: dict, graphs: dict[str, fx.Graph]) -> tuple[bool, str]:
    for side in ("before", "after"):
        if record[side] not in graphs:
            return False, f"the graph {side} ({str(record[side])[:12]}) is missing"
    if (
        record["pass"] != entry["pass"]
        or record["contract"] != entry["contract"]
        or record["contract"] not in ("bitwise", "exact", "lossy")
    ):
        return (
            False,
            f"it is a certificate of {record['pass']} ({record['contract']}), not of {entry['pass']} ({entry['contract']})",
        )
    before, after = graphs[record["before"]], graphs[record["after"]]
    double = certificates.model_dtype(before) == torch.float64  # the lifted trials are in the model's dtype
    if not any(t["lifted"] for t in record["trials"]) or (all(t["lifted"] for t in record["trials"]) and not double):
        return False, "it lacks a trial in float64 or in the model's dtype"
    cls = _pass_class(entry["pass"])
    if hasattr(cls, "prove"):
        from ftc.rewrite.registry import make

        trials = certificates.rerun(record, before, after, make(entry["pass"], dict(entry["options"])).pass_)
        if [(t["sizes"], t["dtype"]) for t in trials] != [(t["sizes"], t["dtype"]) for t in record["trials"]]:
            return False, "the recorded trials are not those of the pass"
    else:
        trials = certificates.rerun(record, before, after)
    for old, new in zip(record["trials"], trials, strict=True):
        problem = _compare(record["contract"], old, new)
        if problem:
            return False, f"in {new['dtype']} with seed {new['seed']}: {problem}"
    for key, part in (("max_output_error", "output_error"), ("max_gradient_error", "gradient_error")):
        worst = max(t[part] for t in record["trials"] if t["lifted"])
        if record[key] != worst:
            return False, f"{key} is {record[key]}, its trials say {worst}"
    problem = _reapply(entry, record, before)
    if problem:
        return False, problem
    output, gradient = (max(t[k] for t in trials if t["lifted"]) for k in ("output_error", "gradient_error"))
    return True, f"{record['contract']}: output {output:.1e}, gradient {gradient:.1e} in float64, {len(trials)} trials"


def _compare(contract: str, old: dict, new: dict) -> str | None:
    """What is wrong with a recorded trial, seen beside the one measured now; None when nothing is."""
    if not certificates.holds(contract, new):
        return f"output error {new['output_error']:.1e}, gradient error {new['gradient_error']:.1e}, bound {new['bound']:.0e}"
    if not certificates.holds(contract, old):
        return f"the recorded errors ({old['output_error']}, {old['gradient_error']}) break the contract"
    exact = new["dtype"] in ("float64", "float32")
    if old["bound"] != new["bound"] if exact else not new["bound"] / 4 <= old["bound"] <= new["bound"] * 4:
        return f"the recorded bound is {old['bound']}, it should be {new['bound']}"
    for key in ("output_error", "gradient_error"):
        low, high = sorted((float(old[key]), float(new[key])))
        if not math.isfinite(high) or low < 0 or high > max(_NOISE * low, _FLOOR * new["bound"]):
            return f"the recorded {key} is {old[key]}, measured now {new[key]:.1e}"
    return None


def _reapply(entry: dict, record: dict, before: fx.Graph) -> str | None:
    """Apply the pass to the graph again and count; None when it agrees, or the pass is not installed here."""
    from ftc.rewrite.pipeline import _change
    from ftc.rewrite.registry import make

    cls = _pass_class(entry["pass"])
    if cls is None or getattr(cls, "version", 1) != record["version"] or hasattr(cls, "calibrate"):
        return None
    request = make(entry["pass"], dict(entry["options"]))
    change = _change(request, None, SimpleNamespace(captured=SimpleNamespace(graph=before)))
    if len(change.outcome.matches) != record["matches"]:
        return f"{record['matches']} matches are recorded, the pass finds {len(change.outcome.matches)}"
    if [lens.as_dict() for lens in change.outcome.lenses] != [lens_from_dict(d).as_dict() for d in record["lenses"]]:
        return "the recorded lenses are not those of the pass"
    recorded = record.get("regions", {})
    if any(recorded.get(key, value) != value for key, value in change.outcome.growth().items()):
        return "the recorded regions, added or gone, are not those of the pass"
    return None


def _as_applied(entry: dict):
    """The pass with the options of an entry, None where it is not installed here. What a pass promises may hang on its options."""
    from ftc.rewrite.registry import make

    return None if _pass_class(entry["pass"]) is None else make(entry["pass"], dict(entry["options"])).pass_


def _pass_class(name: str):
    from ftc.rewrite.registry import classes

    return classes().get(name)


def _check_chains(found: Verification, codes: list[dict], applied: list[dict], graphs: dict[str, fx.Graph]) -> None:
    for code in codes:
        for number, variant in enumerate(code.get("variants", ())):

            def check(code=code, variant=variant) -> tuple[bool, str]:
                graph, steps = variant["start"], 0
                if [step["pass"] for step in code["steps"]] != [entry["pass"] for entry in applied]:
                    return False, "its passes are not those of certificates.json"
                for entry in applied:
                    for record in entry["certificates"]:
                        if record["code"] == code["name"] and record["before"] == graph:
                            graph, steps = record["after"], steps + 1
                            break
                if graph != variant["captured"]["graph"]:
                    return (
                        False,
                        f"the certificates end in graph {graph[:12]}, the program runs {variant['captured']['graph'][:12]}",
                    )
                if graph not in graphs:
                    return False, f"graph {graph[:12]} is missing"
                return True, f"{steps} certificates from the captured graph to the one that runs"

            found.add(f"{code.get('name')}, variant {number + 1}", "chain", check)


def _check_program(found: Verification, folder: Path) -> None:
    program = None

    def loads() -> tuple[bool, str]:
        nonlocal program
        program = load(folder)
        _check_shapes(program)
        return True, f"{sum(p.numel() for p in program.parameters()):,} parameters"

    if not found.add("loads", "program", loads):
        return
    for prefix, host, code in [(r.ftc_name, r, r.code) for r in program.regions] + [
        ("the shell", program, program.code)
    ]:
        if code.lenses:
            found.add(f"lenses of {prefix}", "weights", lambda h=host, c=code: _there_and_back(h, c.lenses))


def _check_shapes(program) -> None:
    hosts = [(r, r.code) for r in program.regions] + [(program, program.code)]
    for host, code in hosts:
        divided = divisions(code.lenses)
        for variant in code.all_variants():
            for node in variant.captured.graph.nodes:
                if node.op == "get_attr" and node.target not in variant.captured.constants and not is_state(node.target):
                    tensor, expected = host.fetch(node.target), node.meta["val"]
                    dim, ranks = divided.get(node.target, (0, 1))
                    whole = [size * (ranks if d == dim else 1) for d, size in enumerate(expected.shape)]
                    if list(tensor.shape) != whole:
                        raise FtcError(
                            f"{host.ftc_name}: {node.target} has shape {list(tensor.shape)}, its graph expects {whole}"
                        )


def _there_and_back(host, lenses: list) -> tuple[bool, str]:
    """The weights back through the lenses and forward again: same bits, or to rounding where a lens rounds."""
    inverse = [lens for lens in lenses if lens.has_inverse]
    if len(inverse) < len(lenses):
        return True, "a lens has no inverse: the original weights cannot be had"
    tensors = {name: t.detach() for name, t in host.named_attributes()}
    with torch.no_grad():
        moved = dict(tensors)
        for lens in reversed(lenses):
            moved = lens.backward(moved)
        for lens in lenses:
            moved = lens.forward(moved)
    new = {lens.target for lens in lenses if isinstance(lens, Add | AddBuffer)}  # trained since, and not to be had from the original
    bitwise = all(lens.moments == "bitwise" for lens in lenses if not isinstance(lens, Add | AddBuffer))
    for name, tensor in tensors.items():
        if name in new:
            continue
        error = probe.relative_error(moved[name], tensor)
        if error > (0 if bitwise else 1e-5):
            return False, f"{name} comes back with an error of {error:.1e}"
    return True, f"{len(lenses)} lenses, {'same bits' if bitwise else 'to rounding'}"
