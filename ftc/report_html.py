"""report.html: one self-contained page about a recipe's run, readable without a network, in light and dark."""

import datetime
import math
from collections.abc import Mapping
from html import escape
from importlib import resources
from string import Template
from typing import Any

from ftc.charts import bar_chart, loss_chart, validation_chart
from ftc.commands.output import count_text, error_text, seconds_text
from ftc.report_parts import Stages, each, number, section, table, titled
from ftc.report_rewrites import residue, rewrites, structure, verification

# What a stage may put into its report, under these keys; anything else under "facts" is shown as a name and a value.
#   loss {"train": [[step, nats]], "sources": {name: [[step, nats]]}, "validation": [[step, nats]]}
#   validation {"bits_per_byte", "trigram_bits_per_byte", "sources"}
#   curve {source: {"points": [[step, bits per byte]], "baseline": bits per byte of a trigram, "bytes": size of the text measured}}
#   evaluation {"sources": {name: {"bits_per_byte", ...}}, "baseline": {name: bits per byte}}
#   rewrite: Program.report.as_dict() with "described" and "seconds"      verification {"ok", "rows": [{name, ok, detail}]}
#   samples [{"prompt", "text"}]      facts {name: value}      configuration: the stage's settings in full, as text
_COLOURS = ("--c1", "--c2", "--c3", "--c4")
BASELINE = "smoothed trigram"


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
        body.append(section("Recipe", "", f"<pre>{escape(recipe_text.strip())}</pre>{_configurations(stages)}"))
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
    for validation in each(stages, "validation"):
        ours, theirs = validation.get("bits_per_byte"), validation.get("trigram_bits_per_byte")
        if ours is not None:
            note = (
                f"{abs(theirs - ours):.3f} {'below' if ours < theirs else 'ABOVE'} a smoothed trigram ({theirs:.3f})"
                if theirs
                else ""
            )
            tiles.append(("validation, bits per byte", f"{ours:.3f}", note))
    for report in each(stages, "rewrite"):
        proved = sum(row["matches"] for row in report["passes"].values())
        worst = max((row["max_output_error"] or 0 for row in report["passes"].values()), default=0)
        tiles.append(("sites rewritten", str(proved), f"worst output error {error_text(worst)} in float64"))
        before, after = report.get("parameters_before"), report.get("parameters_after")
        if after is not None:
            change = "as before" if before == after else f"{count_text(before)} before"
            tiles.append(("parameters", count_text(after), change))
    for name, facts in ((stage["name"], stage["report"]["facts"]) for stage in stages if "facts" in stage["report"]):
        if "KL healed" in facts:
            before = facts.get("KL after the closed form", facts["KL before"])
            tiles.append((f"KL to the original ({name})", f"{facts['KL healed']:.3f}", f"{before:.3f} before distillation, nats a token"))
        elif "tokens" in facts:
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
    """The loss, and beside it the held-out text during training where it was measured."""
    parts = []
    for stage in stages:
        if "loss" not in stage["report"]:
            continue
        loss, curves = stage["report"]["loss"], stage["report"].get("curve") or {}
        about = "Loss in nats per token against the step. The last dot is all of the held-out text, at the end."
        drawn = loss_chart(loss["train"], loss.get("sources", {}), loss["validation"])
        charts = [_chart("Loss", about, drawn)]
        if curves:
            sizes = ", ".join(f"{number(curve['bytes'])} bytes of {name}" for name, curve in curves.items() if curve.get("bytes"))
            about = f"Bits per byte on held-out text, each time on the same {sizes or 'sample'}; lower is better."
            baselines = {name: curve["baseline"] for name, curve in curves.items() if curve.get("baseline") is not None}
            points = {name: curve["points"] for name, curve in curves.items()}
            charts.append(_chart("Held-out text", about, validation_chart(points, baselines)))
        content = f"<div class='charts'>{''.join(charts)}</div>"
        parts.append(section(titled("Training", stage, stages, "loss"), "", content))
    return "".join(parts)


def _chart(title: str, about: str, content: str) -> str:
    return f"<div><h3>{escape(title)}</h3><p class='about'>{escape(about)}</p>{content}</div>"


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
        rows = table(("source", "tokens", "bytes", "bits per byte", "perplexity"), rows, right=(1, 2, 3, 4))
        chart = bar_chart(series, {stage["name"]: _COLOURS[0], BASELINE: "--c0"})
        about = "Bits per byte on what each source held out, at the end of training; lower is better."
        parts.append(section(titled("Held-out text by source", stage, stages, "validation"), about, chart + rows))
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
    totals = table(
        ("stage", "tokens", "bytes", "bits per byte, all", "perplexity, all"),
        [_total(stage) for stage in evaluated],
        right=(1, 2, 3, 4),
    )
    return section("Measured on text", about, bar_chart(series, colours) + f"<h3>Together</h3>{totals}")


def _total(stage: Mapping[str, Any]) -> tuple[str, ...]:
    results = stage["report"]["evaluation"]["sources"].values()
    nats, tokens, size = (sum(result[key] for result in results) for key in ("nats", "tokens", "bytes"))
    per_token = nats / max(1, tokens)
    perplexity = math.exp(per_token) if per_token < 700 else math.inf
    return stage["name"], f"{tokens:,}", f"{size:,}", f"{nats / math.log(2) / max(1, size):.4f}", f"{perplexity:,.2f}"


def samples(stages: Stages) -> str:
    """Prompts and continuations."""
    made = [sample for found in each(stages, "samples") for sample in found]
    if not made:
        return ""
    blocks = (
        f"<div class='sample'><pre><span class='prompt'>{escape(sample['prompt'])}</span>{_continuation(sample['text'])}</pre></div>"
        for sample in made
    )
    return section("Samples", "Written by the model after the coloured prompt.", "".join(blocks))


def _continuation(text: str) -> str:
    return escape(text) if text.strip() else "<span class='none'> (the model ended the text at once)</span>"


def timing(stages: Stages) -> str:
    """Stages with their times and facts."""
    rows = []
    for stage in stages:
        facts = ", ".join(f"{name} {number(value)}" for name, value in stage["report"].get("facts", {}).items())
        rows.append(
            (
                stage["name"],
                stage["kind"],
                seconds_text(stage["seconds"]),
                "kept from before" if stage.get("skipped") else "ran",
                facts,
            )
        )
    return section("Stages", "", table(("stage", "kind", "time", "this run", "facts"), rows, right=(2,)))


def _configurations(stages: Stages) -> str:
    return "".join(
        f"<details><summary>{escape(stage['name'])}, with every default</summary>"
        f"<pre>{escape(stage['report']['configuration'].strip())}</pre></details>"
        for stage in stages
        if "configuration" in stage["report"]
    )
