"""Sensitivity as a page: what each product or layer loses alone in each format, along the depth of the model; self-contained SVG, in light and dark."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from importlib import resources
from pathlib import Path
from string import Template

from ftc.charts import legend
from ftc.files import atomic_write
from ftc.report_parts import section, table
from ftc.sweep_picture import kl_levels

_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _FOOT = 960, 400, 84, 24, 20, 60
_COLOURS = ("--c1", "--c2", "--c3", "--c4", "--c5", "--c6")
_SMALLEST = 1e-8  # nats a token: less is nothing, and stands at the foot


def joined(plans: Mapping[str, dict]) -> tuple[dict | None, dict[str, str], dict | None]:
    """From the plans of a report's entry: the sensitivities of all regions (None where none were measured), the formats by weight, the budget's facts."""
    parts = [plan["sensitivity"] for plan in plans.values() if "sensitivity" in plan]
    found = None if not parts else parts[0] | {"units": [unit for part in parts for unit in part["units"]]}
    formats = {f"{region}.{weight}": format for region, plan in plans.items() for weight, format in plan["formats"].items()}
    return found, formats, next((plan["budget"] for plan in plans.values() if "budget" in plan), None)


def write_page(path: Path, title: str, sensitivity: dict, formats: Mapping[str, str] | None = None, budget: dict | None = None) -> None:
    """Write the page to `path`, an .html file, in one step. `sensitivity` as `Sensitivity.as_dict`; `formats` the chosen ones by weight."""
    parts = [f"<header><h1>{escape(title)}</h1><p>KL(original || one unit quantised), measured on {sensitivity['tokens']:,} tokens apart.</p></header>"]
    parts.append(section("Sensitivity by depth", "Each dot is one unit quantised alone, nats a token, lower is better; the ring is what was chosen.", chart(sensitivity, formats)))
    if budget is not None:
        about = f"Predicted from single losses {budget['predicted']:.5f}, measured {budget['measured']:.5f} nats a token; the sum of single losses counts {budget['factor']:.2f} times."
        parts.append(section("Budget", about, ""))
    rows = rows_of(sensitivity, formats)
    columns = ("unit", "bytes as it was", *(f"{word}, {f}" for f in sensitivity["formats"] for word in ("KL", "bytes")), "chosen")
    parts.append(section("All units", "In the order of the program.", table(columns, rows, right=range(1, len(columns) - 1))))
    template = resources.files("ftc").joinpath("report_template.html").read_text(encoding="utf-8")
    atomic_write(path, Template(template).substitute(title=escape(title), body="\n".join(parts)))


def write_beside(program, folder: Path, title: str) -> None:
    """`sensitivity.html` in the folder of a program whose quantisation measured any."""
    for entry in program._applied:
        if entry["pass"] == "quantize" and "plans" in entry:
            found, formats, budget = joined(entry["plans"])
            if found is not None:
                write_page(folder / "sensitivity.html", title, found, formats, budget)


def rows_of(sensitivity: dict, formats: Mapping[str, str] | None = None) -> list[tuple[str, ...]]:
    """Rows of the table: unit, its bytes, KL and bytes in each format ("" where it cannot have it), and what was chosen."""
    rows = []
    for unit in sensitivity["units"]:
        cells = [unit["unit"], f"{unit['bytes']:,}"]
        for name in sensitivity["formats"]:
            found = unit["formats"].get(name)
            cells += ["", ""] if found is None else [f"{found['kl']:.2e}", f"{found['bytes']:,}"]
        rows.append((*cells, chosen_for(unit, formats) or ""))
    return rows


def chosen_for(unit: dict, formats: Mapping[str, str] | None) -> str | None:
    """The format that a unit got, by the first of its weights; None where nothing was chosen."""
    return next((format for name, format in (formats or {}).items() if name.startswith(unit["unit"].removesuffix(".layer").removesuffix(".experts"))), None)


def chart(sensitivity: dict, formats: Mapping[str, str] | None = None) -> str:
    """The chart as SVG: units along, KL on a logarithmic scale, a colour for each format."""
    units, names = sensitivity["units"], sensitivity["formats"]
    values = [f["kl"] for unit in units for f in unit["formats"].values() if f["kl"] > _SMALLEST]
    levels = kl_levels(values or [1e-3, 1e-2])
    low, high = math.log10(levels[0]), math.log10(levels[-1])

    def x(at: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * (at + 0.5) / max(len(units), 1)

    def y(kl: float) -> float:
        return _HEIGHT - _FOOT - (_HEIGHT - _TOP - _FOOT) * ((max(math.log10(max(kl, _SMALLEST)), low) - low) / (high - low))

    parts = [
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {_WIDTH} {_HEIGHT}' role='img' aria-label='KL by unit' style='width:100%;height:auto;font:13px system-ui,sans-serif'>"
    ]
    for level in levels:
        parts.append(f"<line x1='{_LEFT}' x2='{_WIDTH - _RIGHT}' y1='{y(level):.1f}' y2='{y(level):.1f}' style='stroke:var(--line)'/>")
        parts.append(f"<text x='{_LEFT - 10}' y='{y(level) + 4:.1f}' text-anchor='end' style='fill:var(--soft)'>{level:g}</text>")
    parts += _regions(units, x)
    for number, name in enumerate(names):
        colour = _COLOURS[number % len(_COLOURS)]
        for at, unit in enumerate(units):
            if name in unit["formats"]:
                kl = unit["formats"][name]["kl"]
                words = escape(f"{unit['unit']} in {name}: {kl:.2e} nats a token, {unit['formats'][name]['bytes']:,} bytes")
                ring = ";stroke:var(--text);stroke-width:2" if chosen_for(unit, formats) == name else ""
                parts.append(f"<circle cx='{x(at):.1f}' cy='{y(kl):.1f}' r='4.5' style='fill:var({colour}){ring}'><title>{words}</title></circle>")
    parts.append(f"<text transform='translate(16 {(_HEIGHT - _FOOT + _TOP) / 2}) rotate(-90)' text-anchor='middle' style='fill:var(--soft)'>KL, nats a token</text></svg>")
    return legend([(_COLOURS[n % len(_COLOURS)], name) for n, name in enumerate(names)]) + "".join(parts)


def _regions(units: Sequence[dict], x) -> list[str]:
    """A tick and a name where each region begins; every so many names where they would overlap."""
    starts = [at for at, unit in enumerate(units) if at == 0 or unit["region"] != units[at - 1]["region"]]
    step, parts = -(-len(starts) // 16), []
    for number, at in enumerate(starts):
        left = x(at) - (x(1) - x(0)) / 2
        parts.append(f"<line x1='{left:.1f}' x2='{left:.1f}' y1='{_TOP}' y2='{_HEIGHT - _FOOT}' style='stroke:var(--line);stroke-dasharray:2 4'/>")
        if number % step == 0:
            parts.append(f"<text x='{left + 3:.1f}' y='{_HEIGHT - _FOOT + 18}' style='fill:var(--soft)'>{escape(units[at]['region'])}</text>")
    return parts
