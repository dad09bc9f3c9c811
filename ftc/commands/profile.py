"""What `ftc profile` prints."""

from pathlib import Path
from typing import Any

from ftc.commands.output import bytes_text, console, table


def show_profile(found: dict[str, Any], out: Path, rows: int) -> None:
    """Three tables and a line each on the step and on the machine. Times are a step's."""
    peak, bandwidth = found["peak_flops"], found["bandwidth"]
    console().print(
        f"a step: {found['seconds_per_step'] * 1e3:.1f} ms, {found['in_operators']:.0%} of it in operators; peak memory "
        f"{bytes_text(found['peak_bytes'])}\n"
        f"the machine, measured: {_rate(peak)} in {found['dtype']}, {bandwidth / 1e9:.1f} GB/s; a product needs "
        f"{peak / bandwidth:.0f} FLOPs a byte to be bound by computing\n",
        highlight=False,
    )
    table(
        ("phase", "region", "ms", "share", "calls", "kept MiB", "GFLOP", "FLOP/s"),
        [(r["phase"], r["region"], *_times(r), f"{r['kept_bytes'] / 2**20:.1f}", *_work(r)) for r in found["regions"][:rows]],
        right=(2, 3, 4, 5, 6, 7),
    )
    table(
        ("operator", "ms", "share", "calls", "GFLOP", "FLOP/s"),
        [(r["operator"], *_times(r), *_work(r)) for r in found["operators"][:rows]],
        right=(1, 2, 3, 4, 5),
    )
    table(
        ("product", "phase", "ms", "share", "FLOPs/byte", "FLOP/s", "bound by", "of roof"),
        [
            (r["shapes"], r["phase"], *_times(r)[:2], f"{r['intensity']:.1f}", _rate(r["flops_per_second"]), r["limit"], f"{r['of_roof']:.0%}")
            for r in found["products"][:rows]
        ],
        right=(2, 3, 4, 5, 7),
    )
    console().print(f"all rows in {out / 'profile.json'}, traces in {out}", markup=False, highlight=False)


def _times(row: dict[str, Any]) -> tuple[str, str, str]:
    return f"{row['seconds'] * 1e3:.2f}", f"{row['share']:.1%}", f"{row['calls']:g}"


def _work(row: dict[str, Any]) -> tuple[str, str]:
    return (f"{row['flops'] / 1e9:.3f}", _rate(row["flops_per_second"])) if row["flops"] else ("", "")


def _rate(flops: float) -> str:
    return f"{flops / 1e12:.2f} TFLOP/s" if flops >= 1e12 else f"{flops / 1e9:.1f} GFLOP/s"
