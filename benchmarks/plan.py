"""The planner against known schedules: simulated step times, in units of one stage's forward, and the time that a search takes.

    python benchmarks/plan.py [--seconds 20] [--json-out results/plan.json] [--check]

Everything is computed on paper by `ftc.plan`, so the numbers do not depend on the machine, except that a search gets further in the same time on
a faster one. Stages are chunks of a V (two a rank) unless a row says otherwise, F = I = W = 1, 32 microbatches.
"""

import argparse
import time

import measure

from ftc.plan.costs import Costs
from ftc.plan.formulas import FORMULAS, bubble
from ftc.plan.known import known
from ftc.plan.layouts import BOTH_WAYS, LAYOUTS, candidates, even_bounds
from ftc.plan.search import known_plans, search
from ftc.plan.simulate import simulate

RANKS = (4, 8, 16)
MICROBATCHES = 32
RIVALS = ("ZBVZeroBubble", "DualPipeV", "Interleaved1F1B")


def regions(weights: list[float], **others: float) -> Costs:
    """One region for each weight: F = I = W = the weight, activations in proportion."""
    count = len(weights)
    spread = {name: (value,) * count for name, value in others.items()}
    return Costs(tuple(weights), tuple(weights), tuple(weights), activation_bytes=tuple(weights), pending_bytes=tuple(weights), microbatches=MICROBATCHES, **spread)


def rivals(costs: Costs, ranks: int, even: bool = True) -> list:
    """Plans of the rivals, fastest first: on the even partition, or each on the best one for it."""
    bounds = (lambda parts: even_bounds(len(costs), parts)) if even else None
    return [plan for plan in known_plans(costs, ranks, MICROBATCHES, None, bounds) if plan.name in RIVALS]


def formula_rows() -> list[tuple]:
    checked, worst = 0, 0.0
    for name in FORMULAS:
        for ranks, microbatches in ((2, 8), (4, 8), (4, 16), (8, 32), (16, 64)):
            for f, i, w in ((1.0, 1.0, 1.0), (1.0, 1.0, 0.75), (2.0, 2.0, 1.5)):
                schedule, placement = known(name, ranks, microbatches)
                idle = simulate(schedule, Costs.uniform(len(placement.chains[0]), f, i, w), placement).idle
                expected = bubble(name, ranks, microbatches, f, i, w)
                worst = max(worst, *(abs(seconds - expected) for seconds in idle))
                checked += 1
    return [(f"bubbles of {', '.join(FORMULAS)}, {checked} sizes: largest difference to the formula", f"{worst:.1e}", "equal", worst < 1e-9)]


def uniform_rows(seconds: float, result: dict) -> list[tuple]:
    rows = []
    for ranks in RANKS:
        for hop in (0.0, 0.05):
            costs = Costs.uniform(2 * ranks, activation_bytes=1.0, pending_bytes=1.0, hop_latency=hop, microbatches=MICROBATCHES)
            best = rivals(costs, ranks)[0]
            plan = search(costs, ranks, MICROBATCHES, best.peak_bytes, seconds, layouts=(("v", 2), ("loop", 2)))
            result[f"uniform_{ranks}_{hop}"] = [plan.step_seconds, best.step_seconds]
            text = f"{plan.step_seconds:.2f} against {best.step_seconds:.2f} ({best.name})"
            rows.append((f"{ranks} ranks, uniform, hop {hop} F", text, "never worse", plan.step_seconds <= best.step_seconds + 1e-9))
    return rows


def uneven_rows(seconds: float, result: dict) -> list[tuple]:
    """Regions of unequal cost. With few regions a rank little can be gained by any partition, which "most possible" says."""
    rows = []
    for ranks in RANKS:
        kinds = {}
        for per_rank in (2, 2.5):
            count = int(per_rank * ranks)
            kinds[f"{count} regions, one at 1.6"] = [1.6 if n == count // 2 else 1.0 for n in range(count)]
            kinds[f"{count} regions, alternating 1 and 1.6"] = [1.6 if n % 2 else 1.0 for n in range(count)]
        count = 8 * ranks
        kinds[f"{count} regions, 4 neighbours (one even stage) at 1.6"] = [1.6 if 8 <= n < 12 else 1.0 for n in range(count)]
        for kind, weights in kinds.items():
            rows += _uneven(f"{ranks} ranks, {kind}", regions(weights), ranks, seconds, result)
    return rows


def _uneven(name: str, costs: Costs, ranks: int, seconds: float, result: dict) -> list[tuple]:
    even, own = rivals(costs, ranks)[0], rivals(costs, ranks, even=False)
    zbv = next(plan.step_seconds for plan in own if plan.name == "ZBVZeroBubble")
    one_way = search(costs, ranks, MICROBATCHES, seconds=seconds)
    both_ways = search(costs, ranks, MICROBATCHES, seconds=seconds, layouts=(*LAYOUTS, BOTH_WAYS))
    limit = even.step_seconds / min(one.bound_seconds for one in candidates(costs, ranks, MICROBATCHES, None))
    gain, gain_both = even.step_seconds / one_way.step_seconds, even.step_seconds / both_ways.step_seconds
    result[name] = {"even": even.step_seconds, "zbv_own": zbv, "one_way": one_way.step_seconds, "both_ways": both_ways.step_seconds, "limit": limit}
    return [
        (f"{name}: over the even partition ({even.name})", f"{gain:.3f}x, most possible {limit:.3f}x; both ways {gain_both:.3f}x", "1.2x", max(gain, gain_both) >= 1.2),
        (f"{name}: against ZBV on the planner's partition", f"{one_way.step_seconds:.2f} against {zbv:.2f}", "not slower", one_way.step_seconds <= zbv + 1e-9),
    ]


def exchange_rows(seconds: float, result: dict) -> list[tuple]:
    rows = []
    for ranks in RANKS:
        costs = Costs.uniform(
            2 * ranks, activation_bytes=1.0, pending_bytes=1.0, exchange_forward=0.4, exchange_backward=0.4, microbatches=MICROBATCHES
        )
        plans = {plan.name: plan for plan in rivals(costs, ranks)}
        dualpipe, zbv = plans["DualPipeV"], plans["ZBVZeroBubble"]
        plan = search(costs, ranks, MICROBATCHES, dualpipe.peak_bytes, seconds, layouts=(("v", 2),))
        result[f"exchange_{ranks}"] = [plan.step_seconds, dualpipe.step_seconds, zbv.step_seconds, plan.bound_seconds]
        text = f"{plan.step_seconds:.1f} against {dualpipe.step_seconds:.1f} (ZBV {zbv.step_seconds:.1f}, bound {plan.bound_seconds:.1f})"
        rows.append((f"{ranks} ranks, all-to-all of 0.4 F, DualPipeV's memory", text, "DualPipeV or less", plan.step_seconds <= dualpipe.step_seconds + 1e-9))
    return rows


def gap_rows(seconds: float, result: dict) -> list[tuple]:
    rows = []
    for ranks in (2, 4, 8, 16):
        costs = Costs.uniform(2 * ranks, 1.0, 1.2, 0.8, activation_bytes=1.0, pending_bytes=1.0, hop_latency=0.05, microbatches=MICROBATCHES)
        plan = search(costs, ranks, MICROBATCHES, 2 * ranks + 1, seconds, layouts=(("v", 2), ("loop", 2)))
        result[f"gap_{ranks}"] = plan.gap
        text = f"{plan.gap:.2%} ({plan.step_seconds:.2f} against {plan.bound_seconds:.2f})"
        rows.append((f"{ranks} ranks, hop 0.05 F, I:W 1.2:0.8, 1F1B's memory: above the bound", text, "3%", plan.gap <= 0.03 if ranks <= 8 else None))
    return rows


def memory_rows(seconds: float, result: dict) -> list[tuple]:
    rows = []
    for ranks in RANKS:
        whole = Costs.uniform(ranks, 2.0, 2.0, 2.0, activation_bytes=2.0, microbatches=MICROBATCHES)
        schedule, placement = known("1F1B", ranks, MICROBATCHES)
        usual = simulate(schedule, whole, placement)
        costs = Costs.uniform(2 * ranks, activation_bytes=1.0, pending_bytes=1.0, microbatches=MICROBATCHES)
        # V-Half of arXiv:2405.15362 holds (P + 2) / 2 microbatches where 1F1B holds P; the other cap is the strict half.
        for name, cap in (("V-Half's", ranks + 2.0), ("half of 1F1B's", max(usual.peak_bytes) / 2)):
            plan = search(costs, ranks, MICROBATCHES, cap, seconds, layouts=(("v", 2),))
            slower = plan.step_seconds / usual.step_seconds - 1
            result[f"memory_{ranks}_{cap}"] = slower
            text = f"{slower:+.1%} ({plan.step_seconds:.1f} against {usual.step_seconds:.1f}; {plan.peak_bytes / max(usual.peak_bytes):.0%} of its bytes)"
            rows.append((f"{ranks} ranks, activations of {name}: against 1F1B", text, "+10%", slower <= 0.1))
    return rows


def time_rows(seconds: float, result: dict) -> list[tuple]:
    ranks, microbatches = 16, 64
    weights = [1.6 if n % 2 else 1.0 for n in range(2 * ranks)]
    costs = Costs(tuple(weights), tuple(weights), tuple(weights), activation_bytes=(1.0,) * len(weights), microbatches=microbatches, hop_latency=0.05)
    told: list[float] = []
    start = time.perf_counter()
    plan = search(costs, ranks, microbatches, seconds=min(seconds * 2, 55.0), tell=lambda progress: told.append(progress.elapsed_seconds))
    elapsed = time.perf_counter() - start
    result["time_16_64"] = {"seconds": elapsed, "first": told[0], "gap": plan.gap, "step": plan.step_seconds}
    text = f"{elapsed:.1f} s, told {len(told)} times, first after {told[0]:.1f} s; {plan.gap:.2%} above the bound"
    return [("16 ranks, 64 microbatches: a search", text, "60 s", elapsed < 60.0)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=20.0, help="of each search")
    parser.add_argument("--only", help="one part: formulas, uniform, uneven, exchange, gap, memory, time")
    parser.add_argument("--json-out")
    parser.add_argument("--check", action="store_true", help="exit with code 1 where a number is not met")
    options = parser.parse_args()
    result: dict = {"seconds": options.seconds}
    parts = {
        "formulas": formula_rows,
        "uniform": lambda: uniform_rows(options.seconds, result),
        "uneven": lambda: uneven_rows(options.seconds, result),
        "exchange": lambda: exchange_rows(options.seconds, result),
        "gap": lambda: gap_rows(options.seconds, result),
        "memory": lambda: memory_rows(options.seconds, result),
        "time": lambda: time_rows(options.seconds, result),
    }
    rows = [row for name, part in parts.items() if options.only in (None, name) for row in part()]
    measure.finish("plan", rows, result, fail=options.check, json_out=options.json_out)


if __name__ == "__main__":
    main()
