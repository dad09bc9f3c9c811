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
        count_before, bytes_before = _original_sizes(program)
        count_stored, bytes_stored = _stored_sizes(program)
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
                "parameters_before": count_before,
                "parameters_after": sum(p.numel() for p in program.parameters()) + count_stored,
                "parameter_bytes_before": bytes_before,
                "parameter_bytes_after": sum(p.numel() * p.element_size() for p in program.parameters()) + bytes_stored,
                "nodes": {code.name: [len(v.captured.graph.nodes) for v in code.all_variants()] for code in program.codes},
            }
        )

    def as_dict(self) -> dict:
        """JSON-ready."""
        return self.data

    def __str__(self) -> str:
        from rich.console import Console
        from rich.table import Table

        sizes = f"{count_of(self.data['regions'], 'region')}, {count_of(self.data['graphs'], 'graph')}"
        table = Table(title=f"{self.data['model']}: {sizes}")
        for column in ("pass", "contract", "matches", "already", "output error", "gradient error", "back", "seconds"):
            table.add_column(column, justify="left" if column in ("pass", "contract") else "right")
        for name, entry in self.data["passes"].items():
            errors = [entry["max_output_error"], entry["max_gradient_error"]]
            table.add_row(
                name,
                entry["contract"],
                str(entry["matches"]),
                str(entry["already"]),
                *(_error(value, entry) for value in errors),
                "yes" if entry["inverse"] else "no",
                f"{entry.get('seconds', 0):.2f}",
            )
        console = Console(file=io.StringIO(), width=110)
        console.print(table)
        for name, entry in self.data["passes"].items():
            for line in lossy_facts(entry):
                console.print(f"{name}: {line}", soft_wrap=True)
        before, after = self.data["parameters_before"], self.data["parameters_after"]
        console.print(f"parameters: {before:,} before, {after:,} after ({self.data['parameter_bytes_after'] / 2**20:.1f} MiB)")
        if self.data["note"]:
            console.print(self.data["note"])
        for item in self.data["routers"]:
            console.print(f"router in {item['region']}: {item['op']} at {item['location']}", soft_wrap=True)
        for item in self.data["residue"]:
            console.print(f"left over in {item['region']}: {item['kind']} at {item['location']}", soft_wrap=True)
        return console.file.getvalue().rstrip() + "\n"


def lossy_facts(entry: dict) -> list[str]:
    """What a lossy pass measured, what it keeps and what it decided, as lines for people."""
    lines = []
    if "metric" in entry:
        metric = entry["metric"]
        lines.append(f"{metric['name']}: {metric['value']:.4f} on {metric['tokens']:,} tokens apart")
    kept = [plan.get("cache_elements") for plan in entry.get("plans", {}).values()]
    if kept and None not in kept:
        lines.append(f"cache elements a token: {sum(kept):,} in {len(kept)} layers, {min(kept)} to {max(kept)} in one")
    plans = [plan["bytes"] for plan in entry.get("plans", {}).values() if "bytes" in plan]
    if plans:
        before, after = (sum(each) for each in zip(*plans, strict=True))
        lines.append(f"bytes of the weights of {len(plans)} blocks: {before:,} before, {after:,} after ({before / max(after, 1):.2f}x smaller)")
    if budget := next((plan["budget"] for plan in entry.get("plans", {}).values() if "budget" in plan), None):
        lines.append(f"predicted from single losses {budget['predicted']:.4f}, measured {budget['measured']:.4f} nats; formats made finer {budget['repairs']} times")
    lines += [f"{code}: {note}" for code, notes in entry.get("notes", {}).items() for note in notes]
    return lines


def count_of(number: int, noun: str) -> str:
    """`1 region`, `2 regions`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _error(value: float | None, entry: dict) -> str:
    """A measured error; a pass that changed nothing has none, and one that was not checked says so."""
    if not entry["matches"]:
        return "-"
    return f"{value:.1e}" if entry["checked"] and value is not None else "not checked"


def _stored_sizes(program) -> tuple[int, int]:
    """Number of the weights that lenses turned into buffers (quantised ones), and the bytes that they take now."""
    count = size = 0
    for host, code in [(r, r.code) for r in program.regions] + [(program, program.code)]:
        for lens in code.lenses:
            if lens.makes_buffers and lens.sources:
                count += torch.Size(lens.shape).numel()
                size += sum(host.fetch(name).nbytes for name in lens.targets)
    return count, size


def _original_sizes(program) -> tuple[int, int]:
    """Number and bytes of the original model's parameters."""
    seen: dict[int, tuple[int, int]] = {}
    hosts = [(r, r.code) for r in program.regions if r.ftc_name not in program._added] + [(program, program.code)]
    for host, code in hosts:
        modules = host.own_modules()
        current = {}
        buffers = {name for lens in code.lenses if lens.makes_buffers for name in lens.targets}
        for prefix, module in modules:
            own = {n: b for n, b in module._buffers.items() if (f"{prefix}.{n}" if prefix else n) in buffers}
            for name, parameter in {**module._parameters, **own}.items():
                if parameter is not None and id(parameter) not in seen:
                    seen[id(parameter)] = (0, 0)
                    current[f"{prefix}.{name}" if prefix else name] = torch.empty_like(parameter, device="meta")
        touched: set[str] = set()
        for lens in code.lenses:
            touched = touched - set(lens.sources) | set(lens.targets)
        if touched <= set(current):
            for lens in reversed(code.lenses):
                current = lens.backward(current)
        tensors = current.values()
        seen[id(host)] = (sum(t.numel() for t in tensors), sum(t.numel() * t.element_size() for t in tensors))
    return sum(count for count, _ in seen.values()), sum(size for _, size in seen.values())


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
