"""The report's sections about rewriting: passes with their certificates, verification, graphs, sizes, and what is left over."""

from collections.abc import Mapping
from html import escape
from typing import Any

from ftc.commands.output import count_text, error_text, seconds_text
from ftc.report_parts import Raw, Stages, each, number, section, table, titled

_BOUNDS = {"bitwise": 0.0, "exact": 1e-12}  # in float64, as DESIGN.md defines the contracts


def rewrites(stages: Stages) -> str:
    """One row a pass: contract, matches, and measured errors against the bound."""
    parts = []
    for stage in stages:
        if "rewrite" not in stage["report"]:
            continue
        report = stage["report"]["rewrite"]
        rows = [
            (
                Raw(f"<code>{escape(name)}</code>"),
                Raw(f"<span class='badge {escape(_kind(row))}'>{escape(str(row['contract']))}</span>"),
                _matches(row),
                _against(row, "max_output_error"),
                _against(row, "max_gradient_error"),
                _certificates(row),
                _weights(row),
                Raw("<span class='ok'>&#10003;</span>") if row["inverse"] else "none",
                seconds_text(row["seconds"]) if row.get("seconds") is not None else "",
            )
            for name, row in report["passes"].items()
        ]
        about = (
            "Every pass was checked on random inputs and weights in float64 and in the model's dtype: outputs, and gradients of all "
            "parameters, against the graph before it. Errors are relative, in float64, beside the bound of the contract."
        )
        drawn = table(
            ("pass", "contract", "matches", "output error", "gradient error", "certificates", "weights", "back", "time"),
            rows,
            right=(2, 3, 4, 5, 8),
        )
        drawn += "".join(f"<p class='about'>{escape(note)}</p>" for note in stage["report"].get("notes", ()))
        parts.append(section(titled("Rewrites and their certificates", stage, stages, "rewrite"), about, drawn))
    return "".join(parts)


def _certificates(row: Mapping[str, Any]) -> str:
    count = row.get("certificates")
    return "" if count is None else str(count) if row.get("checked", True) else "none"


def _weights(row: Mapping[str, Any]) -> str:
    """What a pass did to the weights of the first region that it changed: `stack q_proj, k_proj, v_proj`."""
    lenses = next((found for found in (row.get("lenses") or {}).values() if found), [])
    texts = []
    for lens in lenses:
        sources = [name.removesuffix(".weight").rpartition(".")[2] for name in lens.get("sources", ())]
        texts.append(f"{lens.get('kind', '')} {', '.join(sources)}".strip())
    return "; ".join(dict.fromkeys(texts)) or "as they were"


def verification(stages: Stages) -> str:
    """What `ftc verify` found."""
    parts = []
    for found in each(stages, "verification"):
        rows = [
            (
                row["name"],
                row.get("kind", ""),
                Raw("<span class='ok'>ok</span>" if row["ok"] else "<span class='failed'>failed</span>"),
                row["detail"],
            )
            for row in found["rows"]
        ]
        drawn = table(("what", "kind", "result", "detail"), rows)
        count = sum(row["ok"] for row in found["rows"])
        about = f"{count} of {len(found['rows'])} checks hold when run again from the saved files alone."
        parts.append(
            section("Verified from the files", about, f"<details><summary>All checks</summary>{drawn}</details>")
        )
    return "".join(parts)


def structure(stages: Stages) -> str:
    """Regions, the graphs they share, and sizes before and after."""
    parts = []
    for report in each(stages, "rewrite"):
        described = report.get("described") or {}
        regions, graphs = described.get("regions", []), described.get("graphs", [])
        if not regions and not graphs:
            continue
        rows = []
        for index, graph in enumerate(graphs):
            users = [region for region in regions if region.get("graph") == index]
            names = (
                f"{users[0]['name']} to {users[-1]['name']}"
                if len(users) > 1
                else users[0]["name"]
                if users
                else "the code between the regions"
            )
            nodes = ", ".join(str(variant["nodes"]) for variant in graph["variants"])
            size = sum(region["parameters"] for region in users)
            rows.append(
                (
                    Raw(f"<code>{escape(graph['name'])}</code>"),
                    len(users) or "-",
                    names,
                    nodes,
                    count_text(size) if users else "",
                )
            )
        drawn = table(("graph", "regions", "used by", "nodes", "parameters"), rows, right=(1, 3, 4))
        about = f"{len(regions)} regions share {len(graphs)} graphs. Blocks of equal structure run one graph."
        if described.get("note"):
            about += f" {described['note']}"
        sizes = [("parameters", report.get("parameters_before"), report.get("parameters_after"))]
        sizes += [
            (key[: -len("_before")].replace("_", " "), report[key], report.get(key[: -len("_before")] + "_after"))
            for key in report
            if key.endswith("_before") and key != "parameters_before"
        ]
        size_rows = [(name, number(before), number(after)) for name, before, after in sizes if before is not None]
        if size_rows:
            drawn += "<h3>Sizes</h3>" + table(("", "before", "after"), size_rows, right=(1, 2))
        parts.append(section("Regions and graphs", about, drawn))
    return "".join(parts)


def residue(stages: Stages) -> str:
    """What the raise passes recognised no canonical spelling for."""
    reports = each(stages, "rewrite")
    if not reports:
        return ""
    items = [item for report in reports for item in report.get("residue", ())]
    if not items:
        return section("Left over", "Nothing: every attention, norm, rotary embedding and MLP was recognised.", "")
    columns = list(dict.fromkeys(key for item in items for key in _as_dict(item)))
    rows = [tuple(_as_dict(item).get(key, "") for key in columns) for item in items]
    return section(
        "Left over",
        "Spellings outside the canonical operations, with their place in the source.",
        table(columns, rows),
    )


def _as_dict(item: Any) -> Mapping[str, Any]:
    return item if isinstance(item, Mapping) else {"what": item}


def _kind(row: Mapping[str, Any]) -> str:
    return str(row["contract"]).partition("(")[0].strip()


def _matches(row: Mapping[str, Any]) -> str:
    already = row.get("already") or 0
    already = len(already) if isinstance(already, list | tuple | dict) else already
    return f"{row['matches']}" + (f" (+{already} already)" if already else "")


def _against(row: Mapping[str, Any], key: str) -> str:
    value, bound = row[key], row.get("bound", _BOUNDS.get(_kind(row)))
    if not row["matches"]:
        return "-"
    if value is None or not row.get("checked", True):
        return "not checked"
    return f"{error_text(value)} of {error_text(bound)}" if bound else error_text(value)
