"""An order in words, for people."""

from __future__ import annotations

from ftc.pipeline.interleave_tasks import START, WAIT


def order_text(interleaved) -> str:
    """A line for each stretch of one lane between two transfers: when, which lane, how long, how many nodes; one for each start and wait."""
    problem, found = interleaved.problem, interleaved.found
    timeline = found.interleaved
    summary = interleaved.summary()
    lines = [
        f"compute {summary['compute_ms']:.3f} ms, transfers {summary['transfers_ms']:.3f} ms",
        f"one after the other {summary['concatenated_ms']:.3f} ms ({summary['exposed_concatenated_ms']:.3f} exposed), "
        f"interleaved {summary['interleaved_ms']:.3f} ms ({summary['exposed_interleaved_ms']:.3f} exposed), bound {summary['bound_ms']:.3f} ms",
        f"peak {summary['peak_bytes_concatenated'] / 2**20:.1f} MiB, interleaved {summary['peak_bytes_interleaved'] / 2**20:.1f} MiB; found by: {found.way}",
        "",
    ]
    stretch: list[int] = []

    def flush() -> None:
        if stretch:
            seconds = sum(problem.tasks[n].cost for n in stretch)
            begin, lane = timeline.begin[stretch[0]], problem.tasks[stretch[0]].lane or "shared"
            if seconds > 0:
                lines.append(f"{begin * 1e3:10.3f} ms  {lane:<9} computes {seconds * 1e3:.3f} ms ({len(stretch)} nodes, to {interleaved.names[stretch[-1]]})")
            stretch.clear()

    now = 0.0
    for number in found.order:
        task = problem.tasks[number]
        if stretch and (task.kind in (START, WAIT) or task.lane != problem.tasks[stretch[0]].lane):
            flush()
        if task.kind == START:
            begin, end = timeline.begin[number], timeline.end[number]
            where = f"on {task.channel}, under way {begin * 1e3:.3f} to {end * 1e3:.3f} ms"
            lines.append(f"{now * 1e3:10.3f} ms  {task.lane or 'shared':<9} starts {interleaved.names[number]} {where}")
        elif task.kind == WAIT:
            stood = max(0.0, timeline.end[number] - timeline.begin[number])
            word = f"stands still {stood * 1e3:.3f} ms for" if stood > 0 else "has"
            lines.append(f"{timeline.begin[number] * 1e3:10.3f} ms  {task.lane or 'shared':<9} {word} {interleaved.names[task.start]}")
        else:
            stretch.append(number)
        now = now if task.kind == START else timeline.end[number]
    flush()
    return "\n".join(lines)
