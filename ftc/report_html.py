"""report.html: one self-contained page about a recipe's run, readable without a network, in light and dark."""

import datetime
import math
from collections.abc import Mapping, Sequence
from html import escape
from importlib import resources
from string import Template
from typing import Any

from ftc.charts import bar_chart, loss_chart
from ftc.commands.output import count_text, error_text, seconds_text

# What a stage may put into its report, under these keys; anything else under "facts" is shown as a name and a value.
#   loss {"train": [[step, nats]], "validation": [[step, nats]]}     validation {"bits_per_byte", "trigram_bits_per_byte", "sources"}
#   evaluation {"sources": {name: {"bits_per_byte", ...}}, "baseline": {name: bits per byte}}
#   rewrite: Program.report.as_dict() with "described" and "seconds"      verification {"ok", "rows": [{name, ok, detail}]}
#   samples [{"prompt", "text"}]      facts {name: value}      configuration: the stage's settings in full, as text
Stages = Sequence[Mapping[str, Any]]
_COLOURS = ("--c1", "--c2", "--c3", "--c4")
BASELINE = "smoothed trigram"
_BOUNDS = {"bitwise": 0.0, "exact": 1e-12}  # in float64, as DESIGN.md defines the contracts


def render(
    *,
    title: str,
    description: str = "",
    recipe_text: str = "",
    stages: Stages,
    versions: Mapping[str, str],
    machine: str = "",
    created: datetime.datetime | None = None,
) -> str:
    """The page as HTML. `stages`: what each finished stage stored (name, kind, seconds, report, skipped). No file is read
    but the template, and none is written."""
    created = created or datetime.datetime.now(datetime.UTC)
    sections = (training, held_out, measured, rewrites, verification, structure, residue, samples, timing)
    body = [
        _header(title, description, versions, machine, created),
        _tiles(stages),
        *(make(stages) for make in sections),
    ]
    if recipe_text:
        body.append(_section("Recipe", "", f"<pre>{escape(recipe_text.strip())}</pre>{_configurations(stages)}"))
    body.append("<footer>Written by ftc. This page loads nothing from anywhere.</footer>")
    template = resources.files("ftc").joinpath("report_template.html").read_text(encoding="utf-8")
    return Template(template).substitute(title=escape(title), body="\n".join(part for part in body if part))


def _header(title: str, description: str, versions: Mapping[str, str], machine: str, created: datetime.datetime) -> str:
    facts = [*versions.items(), ("machine", machine), ("written", created.strftime("%Y-%m-%d %H:%M UTC"))]
    items = "".join(f"<li>{escape(name)} <b>{escape(value)}</b></li>" for name, value in facts if value)
    about = f"<p>{escape(description)}</p>" if description else ""
    return f"<header><h1>{escape(title)}</h1>{about}<ul class='meta'>{items}</ul></header>"


def _tiles(stages: Stages) -> str:
    tiles: list[tuple[str, str, str]] = []
    for validation in _each(stages, "validation"):
        ours, theirs = validation.get("bits_per_byte"), validation.get("trigram_bits_per_byte")
        if ours is not None:
            note = (
                f"{abs(theirs - ours):.3f} {'below' if ours < theirs else 'ABOVE'} a smoothed trigram ({theirs:.3f})"
                if theirs
                else ""
            )
            tiles.append(("validation, bits per byte", f"{ours:.3f}", note))
    for report in _each(stages, "rewrite"):
        proved = sum(row["matches"] for row in report["passes"].values())
        worst = max((row["max_output_error"] or 0 for row in report["passes"].values()), default=0)
        tiles.append(("sites rewritten", str(proved), f"worst output error {error_text(worst)} in float64"))
        before, after = report.get("parameters_before"), report.get("parameters_after")
        if after is not None:
            change = "as before" if before == after else f"{count_text(before)} before"
            tiles.append(("parameters", count_text(after), change))
    for name, facts in ((stage["name"], stage["report"]["facts"]) for stage in stages if "facts" in stage["report"]):
        if "tokens" in facts:
            tiles.append(
                (
                    f"tokens seen ({name})",
                    count_text(facts["tokens"]),
                    f"in {seconds_text(facts['training seconds'])}" if "training seconds" in facts else "",
                )
            )
    tiles.append(("whole run", seconds_text(sum(stage["seconds"] for stage in stages)), f"{len(stages)} stages"))
    cells = (
        f"<div class='tile'><div class='label'>{escape(label)}</div><div class='value'>{escape(value)}</div>"
        f"<div class='note'>{escape(note)}</div></div>"
        for label, value, note in tiles
    )
    return f"<div class='tiles'>{''.join(cells)}</div>"


def training(stages: Stages) -> str:
    """Loss curves."""
    parts = []
    for stage in stages:
        if "loss" in stage["report"]:
            loss = stage["report"]["loss"]
            about = "Loss in nats per token against the step; hover for values. The dot is the held-out text."
            parts.append(
                _section(
                    _titled("Training", stage, stages, "loss"), about, loss_chart(loss["train"], loss["validation"])
                )
            )
    return "".join(parts)


def held_out(stages: Stages) -> str:
    """Bits per byte of each source of a mixture, on the text that the training run held out."""
    parts = []
    for stage in stages:
        sources = stage["report"].get("validation", {}).get("sources", {})
        if len(sources) < 2:
            continue
        keys = {stage["name"]: "bits_per_byte", BASELINE: "trigram_bits_per_byte"}
        series = {
            label: {name: found[key] for name, found in sources.items() if key in found} for label, key in keys.items()
        }
        series = {label: values for label, values in series.items() if values}
        rows = [
            (name, f"{found['tokens']:,}", f"{found['bytes']:,}", f"{found['bits_per_byte']:.4f}", f"{found['perplexity']:,.2f}")
            for name, found in sources.items()
        ]
        table = _table(("source", "tokens", "bytes", "bits per byte", "perplexity"), rows, right=(1, 2, 3, 4))
        chart = bar_chart(series, {stage["name"]: _COLOURS[0], BASELINE: "--c0"})
        about = "Bits per byte on what each source held out, at the end of training; lower is better."
        parts.append(_section(_titled("Held-out text by source", stage, stages, "validation"), about, chart + table))
    return "".join(parts)


def measured(stages: Stages) -> str:
    """Bits per byte per source, every evaluation beside the trigram baseline."""
    evaluated = [stage for stage in stages if "evaluation" in stage["report"]]
    if not evaluated:
        return ""
    series: dict[str, dict[str, float]] = {}
    for stage in evaluated:
        if stage["report"]["evaluation"].get("baseline"):
            series[BASELINE] = series.get(BASELINE, {}) | stage["report"]["evaluation"]["baseline"]
    for stage in evaluated:
        sources = stage["report"]["evaluation"]["sources"]
        series[stage["name"]] = {name: result["bits_per_byte"] for name, result in sources.items()}
    names = [name for name in series if name != BASELINE]
    colours = {name: _COLOURS[index % len(_COLOURS)] for index, name in enumerate(names)} | {BASELINE: "--c0"}
    about = "Bits per byte for each source of text; lower is better."
    totals = _table(
        ("stage", "tokens", "bytes", "bits per byte, all", "perplexity, all"),
        [_total(stage) for stage in evaluated],
        right=(1, 2, 3, 4),
    )
    return _section("Measured on text", about, bar_chart(series, colours) + f"<h3>Together</h3>{totals}")


def _total(stage: Mapping[str, Any]) -> tuple[str, ...]:
    results = stage["report"]["evaluation"]["sources"].values()
    nats, tokens, size = (sum(result[key] for result in results) for key in ("nats", "tokens", "bytes"))
    per_token = nats / max(1, tokens)
    perplexity = math.exp(per_token) if per_token < 700 else math.inf
    return stage["name"], f"{tokens:,}", f"{size:,}", f"{nats / math.log(2) / max(1, size):.4f}", f"{perplexity:,.2f}"


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
                Raw("<span class='ok'>&#10003;</span>") if row["inverse"] else "none",
                seconds_text(row["seconds"]) if row.get("seconds") is not None else "",
            )
            for name, row in report["passes"].items()
        ]
        about = (
            "Every pass was checked on random inputs and weights in float64 and in the model's dtype: outputs, and gradients of all "
            "parameters, against the graph before it. Errors are relative, in float64, beside the bound of the contract."
        )
        table = _table(
            ("pass", "contract", "matches", "output error", "gradient error", "inverse", "time"),
            rows,
            right=(2, 3, 4, 6),
        )
        table += "".join(f"<p class='about'>{escape(note)}</p>" for note in stage["report"].get("notes", ()))
        parts.append(_section(_titled("Rewrites and their certificates", stage, stages, "rewrite"), about, table))
    return "".join(parts)


def verification(stages: Stages) -> str:
    """What `ftc verify` found."""
    parts = []
    for found in _each(stages, "verification"):
        rows = [
            (
                row["name"],
                row.get("kind", ""),
                Raw("<span class='ok'>ok</span>" if row["ok"] else "<span class='failed'>failed</span>"),
                row["detail"],
            )
            for row in found["rows"]
        ]
        table = _table(("what", "kind", "result", "detail"), rows)
        count = sum(row["ok"] for row in found["rows"])
        about = f"{count} of {len(found['rows'])} checks hold when run again from the saved files alone."
        parts.append(
            _section("Verified from the files", about, f"<details><summary>All checks</summary>{table}</details>")
        )
    return "".join(parts)


def structure(stages: Stages) -> str:
    """Regions, the graphs they share, and sizes before and after."""
    parts = []
    for report in _each(stages, "rewrite"):
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
        table = _table(("graph", "regions", "used by", "nodes", "parameters"), rows, right=(1, 3, 4))
        about = f"{len(regions)} regions share {len(graphs)} graphs. Blocks of equal structure run one graph."
        if described.get("note"):
            about += f" {described['note']}"
        sizes = [("parameters", report.get("parameters_before"), report.get("parameters_after"))]
        sizes += [
            (key[: -len("_before")].replace("_", " "), report[key], report.get(key[: -len("_before")] + "_after"))
            for key in report
            if key.endswith("_before") and key != "parameters_before"
        ]
        size_rows = [(name, _number(before), _number(after)) for name, before, after in sizes if before is not None]
        if size_rows:
            table += "<h3>Sizes</h3>" + _table(("", "before", "after"), size_rows, right=(1, 2))
        parts.append(_section("Regions and graphs", about, table))
    return "".join(parts)


def residue(stages: Stages) -> str:
    """What the raise passes recognised no canonical spelling for."""
    reports = _each(stages, "rewrite")
    if not reports:
        return ""
    items = [item for report in reports for item in report.get("residue", ())]
    if not items:
        return _section("Left over", "Nothing: every attention, norm, rotary embedding and MLP was recognised.", "")
    columns = list(dict.fromkeys(key for item in items for key in _as_dict(item)))
    rows = [tuple(_as_dict(item).get(key, "") for key in columns) for item in items]
    return _section(
        "Left over",
        "Spellings outside the canonical operations, with their place in the source.",
        _table(columns, rows),
    )


def samples(stages: Stages) -> str:
    """Prompts and continuations."""
    made = [sample for found in _each(stages, "samples") for sample in found]
    if not made:
        return ""
    blocks = (
        f"<div class='sample'><pre><span class='prompt'>{escape(sample['prompt'])}</span>{escape(sample['text'])}</pre></div>"
        for sample in made
    )
    return _section("Samples", "Written by the model after the coloured prompt.", "".join(blocks))


def timing(stages: Stages) -> str:
    """Stages with their times and facts."""
    rows = []
    for stage in stages:
        facts = ", ".join(f"{name} {_number(value)}" for name, value in stage["report"].get("facts", {}).items())
        rows.append(
            (
                stage["name"],
                stage["kind"],
                seconds_text(stage["seconds"]),
                "kept from before" if stage.get("skipped") else "ran",
                facts,
            )
        )
    return _section("Stages", "", _table(("stage", "kind", "time", "this run", "facts"), rows, right=(2,)))


def _configurations(stages: Stages) -> str:
    return "".join(
        f"<details><summary>{escape(stage['name'])}, with every default</summary>"
        f"<pre>{escape(stage['report']['configuration'].strip())}</pre></details>"
        for stage in stages
        if "configuration" in stage["report"]
    )


class Raw(str):
    """A table cell that is HTML already."""


def _section(title: str, about: str, content: str) -> str:
    lead = f"<p class='about'>{escape(about)}</p>" if about else ""
    return f"<section><h2>{escape(title)}</h2>{lead}{content}</section>"


def _table(columns: Sequence[str], rows: Sequence[Sequence[Any]], right: Sequence[int] = ()) -> str:
    def cell(tag: str, index: int, value: Any) -> str:
        style = " class='num'" if index in right else ""
        return f"<{tag}{style}>{value if isinstance(value, Raw) else escape(str(value))}</{tag}>"

    head = "".join(cell("th", index, name) for index, name in enumerate(columns))
    body = "".join(
        "<tr>" + "".join(cell("td", index, value) for index, value in enumerate(row)) + "</tr>" for row in rows
    )
    return f"<div class='scroll'><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


def _as_dict(item: Any) -> Mapping[str, Any]:
    return item if isinstance(item, Mapping) else {"what": item}


def _each(stages: Stages, key: str) -> list[Any]:
    return [stage["report"][key] for stage in stages if key in stage["report"]]


def _titled(title: str, stage: Mapping[str, Any], stages: Stages, key: str) -> str:
    return title if len(_each(stages, key)) == 1 else f"{title}: {stage['name']}"


def _kind(row: Mapping[str, Any]) -> str:
    return str(row["contract"]).partition("(")[0].strip()


def _matches(row: Mapping[str, Any]) -> str:
    already = row.get("already") or 0
    already = len(already) if isinstance(already, list | tuple | dict) else already
    return f"{row['matches']}" + (f" (+{already} already)" if already else "")


def _against(row: Mapping[str, Any], key: str) -> str:
    value, bound = row[key], row.get("bound", _BOUNDS.get(_kind(row)))
    if value is None or not row.get("checked", True):
        return "not checked"
    return f"{error_text(value)} of {error_text(bound)}" if bound else error_text(value)


def _number(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
