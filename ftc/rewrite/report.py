"""The report of a program: what matched where, what was proved, what is left, and the sizes before and after."""

from __future__ import annotations

import io
from dataclasses import dataclass

import torch


@dataclass
class Report:
    """Made by `program.report`; `str()` is a table for people, `as_dict()` is JSON-ready."""

    data: dict

    @classmethod
    def of(cls, program) -> Report:
        passes: dict[str, dict] = {}
        for entry in program._applied:
            summary = {k: v for k, v in entry.items() if k not in ("certificates", "pass")}
            summary["certificates"] = len(entry["certificates"])
            passes[entry["pass"]] = summary
        now = sum(p.numel() for p in program.parameters())
        left = _residue(program)
        return cls(
            {
                "model": program.kind,
                "regions": max(len(program.regions), 1),
                "note": None if program.regions else "no repeated blocks were found: captured as one region",
                "graphs": len(program.codes),
                "passes": passes,
                "residue": [item for item in left if item["kind"] != "router"],
                "routers": [item for item in left if item["kind"] == "router"],
                "parameters_before": _original_parameters(program),
                "parameters_after": now,
                "parameter_bytes": sum(p.numel() * p.element_size() for p in program.parameters()),
                "nodes": {code.name: [len(v.captured.graph.nodes) for v in code.all_variants()] for code in program.codes},
            }
        )

    def as_dict(self) -> dict:
        """JSON-ready; see the class's docstring and the issue of its names in docs/passes.md."""
        return self.data

    def __str__(self) -> str:
        from rich.console import Console
        from rich.table import Table

        table = Table(title=f"{self.data['model']}: {self.data['regions']} regions, {self.data['graphs']} graphs")
        for column in ("pass", "contract", "matches", "already", "output error", "gradient error", "back", "seconds"):
            table.add_column(column, justify="left" if column in ("pass", "contract") else "right")
        for name, entry in self.data["passes"].items():
            proved = entry["checked"]
            table.add_row(
                name,
                entry["contract"],
                str(entry["matches"]),
                str(entry["already"]),
                f"{entry['max_output_error']:.1e}" if proved else "not checked",
                f"{entry['max_gradient_error']:.1e}" if proved else "not checked",
                "yes" if entry["inverse"] else "no",
                f"{entry.get('seconds', 0):.2f}",
            )
        console = Console(file=io.StringIO(), width=110)
        console.print(table)
        before, after = self.data["parameters_before"], self.data["parameters_after"]
        console.print(f"parameters: {before:,} before, {after:,} after ({self.data['parameter_bytes'] / 2**20:.1f} MiB)")
        if self.data["note"]:
            console.print(self.data["note"])
        for item in self.data["routers"]:
            console.print(f"router in {item['region']}: {item['op']} at {item['location']}", soft_wrap=True)
        for item in self.data["residue"]:
            console.print(f"{item['kind']} left in {item['region']}: {item['op']} at {item['location']}", soft_wrap=True)
        return console.file.getvalue()


def _original_parameters(program) -> int:
    seen: dict[int, int] = {}
    hosts = [(r, r.code) for r in program.regions if r.ftc_name not in program._added] + [(program, program.code)]
    for host, code in hosts:
        modules = host.own_modules()
        current = {}
        for prefix, module in modules:
            for name, parameter in module._parameters.items():
                if parameter is not None and id(parameter) not in seen:
                    seen[id(parameter)] = 0
                    current[f"{prefix}.{name}" if prefix else name] = torch.empty_like(parameter, device="meta")
        touched: set[str] = set()
        for lens in code.lenses:
            touched = touched - set(lens.sources) | set(lens.targets)
        if touched <= set(current):
            for lens in reversed(code.lenses):
                current = lens.backward(current)
        seen[id(host)] = sum(t.numel() for t in current.values())
    return sum(seen.values())


def _residue(program) -> list[dict]:
    from ftc.rewrite.opened import has_calls, open_calls
    from ftc.rewrite.residue import residue

    found: dict[tuple, dict] = {}
    for code in program.codes:
        for variant in code.all_variants():
            graph = variant.captured.graph
            for item in residue(open_calls(graph)[0] if has_calls(graph) else graph):
                key = (code.name, item.kind, item.location)
                found.setdefault(key, {"region": code.name, "kind": item.kind, "op": item.op, "location": item.location})
    return list(found.values())
