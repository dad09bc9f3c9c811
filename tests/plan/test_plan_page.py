"""The planner's pictures: everything simulated is drawn, where and as long as it ran; the page is well-formed and loads nothing."""

import re
import xml.etree.ElementTree as ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ftc.plan.compare import known_plan
from ftc.plan.costs import Costs
from ftc.plan.known import fits
from ftc.plan.page import bars_of, how_to_run, stage_of_region, write_page
from ftc.plan.parts import PartCost, RunCosts
from ftc.plan.picture import gantt, memory_lines, seconds_text

NAMES = ("GPipe", "1F1B", "Interleaved1F1B", "ZB1P", "ZBVZeroBubble", "DualPipeV")
REGIONS = Costs.uniform(16, 1e-3, 1.2e-3, 0.8e-3, activation_bytes=1e6, pending_bytes=4e5, fixed_bytes=3e6, microbatches=8)


def rectangles(svg: str) -> list[tuple[float, float]]:
    """(x, width) of everything but the lanes."""
    root = ElementTree.fromstring(svg)
    found = [r for r in root.iter("{http://www.w3.org/2000/svg}rect") if r.get("fill") != "var(--faint)"]
    return [(float(r.get("x")), float(r.get("width"))) for r in found]


@settings(max_examples=12, deadline=None)
@given(name=st.sampled_from(NAMES), ranks=st.sampled_from([2, 4]), microbatches=st.sampled_from([8, 12]))
def test_a_chart_draws_every_action_in_the_place_of_its_time(name, ranks, microbatches):
    if not fits(name, ranks, microbatches):
        return
    plan = known_plan(name, REGIONS, ranks, microbatches)
    bars = bars_of(plan)
    drawn = rectangles(gantt(bars, "a schedule"))
    assert len(drawn) == sum(2 if bar.second else 1 for bar in bars)
    scale = max(x + width for x, width in drawn) / max(bar.end for bar in bars)
    assert scale > 0
    lefts = sorted({round(x, 1) for x, _ in drawn})
    assert len(lefts) >= len({round(bar.start, 9) for bar in bars if bar.rank == 0}) * 0.5
    longest = max(bars, key=lambda bar: bar.end - bar.start)
    assert max(width for _, width in drawn) == pytest.approx((longest.end - longest.start) * (1180 - 62 - 12) / plan.step_seconds - 0.6, abs=0.1)
    kinds = {part for bar in bars for part in (bar.kind, *(bar.second[:1] if bar.second else ()))}
    assert kinds <= {"F", "I", "W", "B"}


def test_memory_is_drawn_as_steps_with_its_cap():
    plan = known_plan("1F1B", REGIONS, 4, 8)
    picture = memory_lines(plan.result.memory, "memory", cap=1e9)
    svg = re.search(r"<svg.*</svg>", picture).group()
    paths = list(ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}path"))
    assert len(paths) == 4
    assert [p.get("d").count("V") for p in paths] == [len(line) for line in plan.result.memory]
    assert "stroke-dasharray" in picture and "stroke-dasharray" not in memory_lines(plan.result.memory, "memory")


def test_the_page_names_every_schedule_every_part_and_how_to_run_the_best(tmp_path):
    plans = [known_plan(name, REGIONS, 4, 8) for name in ("1F1B", "ZBVZeroBubble", "DualPipeV")]
    parts = tuple(PartCost(f"layers.{i}", 1e-3, 1.2e-3, 0.8e-3, 10**6, 10**5, 4096, 1000) for i in range(16))
    costs = RunCosts(PartCost("embedding", 1e-4, 0, 1e-4, 0, 0, 4096, 500), parts, PartCost("head", 1e-3, 1e-3, 1e-3, 10**5, 0, 0, 500), "measured on cpu")
    text = how_to_run(plans[1], "plan/schedule.csv", 2)
    write_page(tmp_path / "plan.html", "Pipelines of <a run>", plans, plans[1], costs, text, cap=5e7)
    page = (tmp_path / "plan.html").read_text()
    for plan in plans:
        assert page.count(plan.name) >= 3
    assert all(part.name in page for part in parts) and "pipeline_bounds" in page and "&lt;a run&gt;" in page
    assert "http" not in re.sub(r"http://www.w3.org/2000/svg", "", page), "it loads nothing"
    assert f"local_batch_size = {2 * 8}" in text and str(list(plans[1].partition)) in text
    for svg in re.findall(r"<svg.*?</svg>", page):
        ElementTree.fromstring(svg)


@given(value=st.floats(1e-7, 1e3))
def test_durations_are_told_to_three_digits(value):
    number, unit = seconds_text(value).split()
    assert float(number) * {"s": 1, "ms": 1e-3, "µs": 1e-6}[unit] == pytest.approx(value, rel=6e-3)


@given(st.lists(st.integers(1, 15), min_size=1, max_size=6, unique=True).map(sorted), st.integers(0, 15))
def test_a_region_is_in_the_stage_between_its_bounds(bounds, index):
    plan = type("P", (), {"partition": tuple(bounds)})
    stage = stage_of_region(plan, index)
    edges = [0, *bounds, 16]
    assert edges[stage] <= index < edges[stage + 1]
