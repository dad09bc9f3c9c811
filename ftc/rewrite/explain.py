"""Explaining a pass on a model: where it matches, where it nearly does, and the node where pattern and graph part."""

from __future__ import annotations

import io
from dataclasses import dataclass

from ftc.capture.program import Program, capture
from ftc.errors import FtcError
from ftc.rewrite.registry import Request, make, parse_passes


@dataclass
class Explanation:
    """Made by `ftc.explain`; `str()` is for people, `as_dict()` is JSON-ready."""

    data: dict

    def as_dict(self) -> dict:
        return self.data

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(file=io.StringIO(), width=120)
        console.print(f"{self.data['pass']} ({self.data['contract']}): {self.data['summary']}")
        for code in self.data["graphs"]:
            console.print(f"\n{code['graph']} (shared by {code['regions']} regions): {len(code['matches'])} matches, {code['already']} already")
            for match in code["matches"]:
                detail = ", ".join(f"{k}={v}" for k, v in match["detail"].items())
                console.print(f"  match {match['kind']}: {detail} at {match['location']}", soft_wrap=True, highlight=False)
            for miss in code["misses"]:
                console.print(f"  near {miss['anchor']}: {miss['reason']}; parts at {miss['node']} ({miss['location']})", soft_wrap=True, highlight=False)
        return console.file.getvalue()


def explain(model, pass_name: str, example=None) -> Explanation:
    """Try a pass on every graph of a model or program without changing it.

    The passes that it requires are applied to a copy first. Raises FtcError for an unknown pass, or a model without example.
    """
    from ftc.rewrite.pipeline import _change, _hosts, _plain, _unique_misses, apply_request

    requests = parse_passes(pass_name)
    if len(requests) != 1:
        raise FtcError(f"{pass_name!r} is a pipeline; explain one of {', '.join(r.name for r in requests)}")
    request = requests[0]
    if isinstance(model, Program):
        program = model.fork()
        if example is not None:
            program.run_example(example)
    elif example is None:
        raise FtcError("explaining a pass on a model needs an example of its inputs: example={'input_ids': ids}")
    else:
        program = capture(model, example)
    for name in getattr(request.pass_, "requires", ()):
        apply_request(program, make(name, {"expect": "any"}), check=False)
    if hasattr(request.pass_, "with_program"):
        request = Request(request.pass_.with_program(program), request.expect)
    graphs = []
    for code in program.codes:
        changes = [_change(request, code, variant) for variant in code.all_variants()]
        best = max(changes, key=lambda c: len(c.outcome.matches), default=None)
        graphs.append(
            {
                "graph": code.name,
                "regions": len(_hosts(program, code)),
                "matches": [{"kind": m.kind, "detail": _plain(m.detail), "location": m.location} for m in best.outcome.matches] if best else [],
                "already": best.outcome.already if best else 0,
                "misses": [vars(miss) for miss in _unique_misses(changes)],
            }
        )
    info = type(request.pass_)
    return Explanation({"pass": request.name, "contract": info.contract, "summary": info.summary, "graphs": graphs})
