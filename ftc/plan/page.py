"""A comparison of plans as one page: steps, bubbles and memory as bars and a table, Gantt charts, memory over time, costs, and how to run the best."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from importlib import resources
from pathlib import Path
from string import Template

from ftc.files import atomic_write
from ftc.plan.actions import Placement, parts
from ftc.plan.compare import SEARCHED
from ftc.plan.parts import RunCosts
from ftc.plan.picture import Bar, bytes_text, gantt, kinds_legend, memory_lines, ratio_bars, scroll, seconds_text
from ftc.plan.plans import Plan
from ftc.report_parts import section, table

_TORCH_NAMES = {"ZB1P": "InterleavedZeroBubble"}  # of one stage a rank
COLUMNS = ("schedule", "step", "idle", "peak of a rank", "above the bound", "stages", "batches")


def bars_of(plan: Plan) -> list[Bar]:
    """A plan's simulated actions for `gantt`."""
    found = []
    for rank, actions in plan.result.actions.items():
        for action, start, end in zip(actions, plan.result.starts[rank], plan.result.ends[rank], strict=True):
            first, *others = ((part.computation_type.value, part.stage_index, part.microbatch_index) for part in parts(action))
            found.append(Bar(rank, start, end, *first, second=others[0] if others else None))
    return found


def rows_of(plans: Sequence[Plan], cap: float | None) -> list[tuple[str, ...]]:
    """The table's rows, in the order of `plans`; a plan past the memory cap says so."""
    rows = []
    for plan in plans:
        over = cap is not None and plan.peak_bytes > cap
        peak = bytes_text(plan.peak_bytes) + (", past the cap" if over else "")
        gap = "" if plan.bound_seconds <= 0 else f"{max(plan.gap, 0.0):.1%}"
        rows.append((plan.name, seconds_text(plan.step_seconds), f"{plan.result.idle_share:.1%}", peak, gap, stages_text(plan), str(plan.num_microbatches)))
    return rows


def stages_text(plan: Plan) -> str:
    """How many stages, laid out how."""
    placement = plan.placement
    how = {"loop": "in turns", "v": "as a V", "bidirectional": "both ways"}[placement.style]
    return f"{placement.num_stages} {how}" if placement.num_stages > placement.num_ranks else str(placement.num_stages)


def how_to_run(plan: Plan, csv_path: str, microbatch_size: int) -> str:
    """The tables of a run file that this plan is. csv_path: of the schedule, for a searched one."""
    schedule = csv_path if plan.name == SEARCHED else _TORCH_NAMES.get(plan.name, plan.name)
    lines = [
        "[parallelism]", f"pipeline_parallel_degree = {plan.placement.num_ranks}", f'pipeline_parallel_schedule = "{schedule}"',
        f"pipeline_parallel_microbatch_size = {microbatch_size}", "", "[training]", f"local_batch_size = {plan.num_microbatches * microbatch_size}", "", "[ftc]",
        f"pipeline_bounds = {list(plan.partition)}",
    ]  # fmt: skip
    return "\n".join(lines)


def write_page(path: str | Path, title: str, plans: Sequence[Plan], best: Plan, costs: RunCosts, run_text: str, cap: float | None = None) -> None:
    """Write the page to `path`, in one step. plans: in the order of the table; `best` is one of them; run_text: of `how_to_run`."""
    steps = {plan.name: plan.step_seconds for plan in plans}
    facts = {"ranks": best.placement.num_ranks, "microbatches": best.num_microbatches, "costs": costs.source, "best": best.name}
    if cap is not None:
        facts["memory cap"] = bytes_text(cap)
    items = "".join(f"<li>{escape(name)} <b>{escape(str(value))}</b></li>" for name, value in facts.items())
    until = max(plan.step_seconds for plan in plans)
    body = [f"<header><h1>{escape(title)}</h1><ul class='meta'>{items}</ul></header>"]
    about = (
        "Simulated steps, all for the same batch. Idle: share of all ranks' time without work. Above the bound: no schedule of the same stages, placement and "
        "microbatches takes less than its bound."
    )
    body.append(section("Schedules", about, ratio_bars(steps, best.name, "seconds") + table(COLUMNS, rows_of(plans, cap), right=(1, 2, 3, 4, 6))))
    body.append(section("How to run it", "In the run file:", f"<pre>{escape(run_text)}</pre>"))
    about = "Paler: a rank's later stages. The number is the microbatch; hovering tells stage and times. All charts have one time axis."
    drawn = [(plan, bars_of(plan)) for plan in plans]
    charts = "".join(scroll(gantt(bars, f"{plan.name}: {seconds_text(plan.step_seconds)}, {plan.result.idle_share:.1%} idle", until)) for plan, bars in drawn)
    body.append(section("What each rank does", about, kinds_legend([bar for _, bars in drawn for bar in bars]) + charts))
    about = "Weights, gradients, optimizer state, and the activations that a rank holds, by simulation."
    memories = "".join(memory_lines(plan.result.memory, f"{plan.name}: {bytes_text(plan.peak_bytes)} at most", cap) for plan in plans if plan is best or plan is plans[0])
    body.append(section("Memory", about, memories))
    body.append(section("Costs of a microbatch", f"{costs.source[0].upper()}{costs.source[1:]}. Stages of {best.name} in the last column.", _costs_table(costs, best)))
    body.append("<footer>Written by ftc. This page loads nothing from anywhere.</footer>")
    template = resources.files("ftc").joinpath("report_template.html").read_text(encoding="utf-8")
    atomic_write(path, Template(template).substitute(title=escape(title), body="\n".join(body)))


def stage_of_region(plan: Plan, index: int) -> int:
    """The stage (of the first chain) that region `index` is in."""
    return sum(bound <= index for bound in plan.partition)


def _costs_table(costs: RunCosts, best: Plan) -> str:
    last = len(costs.regions) - 1
    rows = []
    for index, part in enumerate((costs.first, *costs.regions, costs.last)):
        stage = stage_of_region(best, min(max(index - 1, 0), last))
        seconds = (seconds_text(value) for value in (part.forward, part.input_gradient, part.weight_gradient))
        rows.append((part.name, *seconds, bytes_text(part.activation_bytes), f"{part.num_parameters:,}", _where(best.placement, stage)))
    return table(("part", "F", "I", "W", "activations", "parameters", "stage"), rows, right=range(1, 6))


def _where(placement: Placement, stage: int) -> str:
    ranks = [str(placement.ranks[chain[stage]]) for chain in placement.chains]
    return f"{stage} on rank {' and '.join(ranks)}"
