"""The command that says what a pipeline would take before it runs: plan."""

from pathlib import Path
from typing import Any

import typer

from ftc.commands.output import console, print_json, table
from ftc.commands.shared import JSON, SEED, at_least
from ftc.errors import FtcError


def register(app: typer.Typer) -> None:
    app.command("plan")(plan)


def plan(
    config: str = typer.Argument(..., metavar="RUN.toml", help="A run file as ftc train takes it, or the name of a shipped one."),
    out: Path = typer.Option(None, "--out", help="Folder for plan.html, plan.json and schedule.csv; default: print only."),
    ranks: int = typer.Option(None, "--ranks", help="Of the pipeline; default: pipeline_parallel_degree."),
    microbatches: str = typer.Option(None, "--microbatches", help="Of a step, such as 16, or several to choose among: 8,16,32; default: as the file has it."),
    memory: str = typer.Option(None, "--memory", metavar="SIZE", help="No rank may hold more, such as 80GiB."),
    seconds: float = typer.Option(30.0, "--seconds", help="How long to search."),
    machine: str = typer.Option(None, "--machine", metavar="FLOPS,BYTES", help="Model the costs for a machine of so many FLOP/s and bytes/s, as 400e12,3e12; default: measure here."),
    device: str = typer.Option(None, "--device", help="Where to measure: cpu or cuda; default: cuda where there is one."),
    latency: float = typer.Option(20e-6, "--latency", help="Seconds of a hop between neighbouring ranks, whatever its size."),
    bandwidth: float = typer.Option(25e9, "--bandwidth", help="Bytes/s between neighbouring ranks."),
    exchange: float = typer.Option(0.0, "--exchange", help="Seconds of exposed communication in each region, forward and again backward (expert all-to-all)."),
    change: list[str] = typer.Option(None, "--set", help="Change a key: --set training.local_batch_size=32; repeatable."),
    seed: int = SEED,
    as_json: bool = JSON,
) -> None:
    """Compare pipeline schedules for a run, search for a better one, and say how far it is from what no schedule can beat.

    Costs of each region, the embedding and the head are measured here or modelled; every known schedule that fits is simulated with stages cut by cost.

    [bold]Examples[/bold]

      ftc plan run.toml --ranks 4 --out plan/

      ftc plan llama3-8b --ranks 8 --microbatches 16,32,64 --memory 80GiB --machine 400e12,3e12 --out plan/

      ftc train run.toml --set parallelism.pipeline_parallel_degree=4 --set 'parallelism.pipeline_parallel_schedule="plan/schedule.csv"' --out run/
    """
    at_least(2, ranks=ranks)
    if not seconds > 0:
        raise FtcError(f"--seconds is {seconds}; a search needs more than 0")
    from ftc.commands.dry_run import parse_bytes
    from ftc.commands.pipeline import parse_changes
    from ftc.files import check_replaceable

    cap = None if memory is None else float(parse_bytes(memory))
    if out is not None:
        check_replaceable(out, "plan")
    from ftc.commands.plan_progress import searching

    with searching(not as_json, seconds) as (tell, follow):
        from ftc.train.plan_run import run_costs

        run = run_costs(config, parse_changes(change or []), ranks=ranks, device=device or _device(), machine=_machine(machine), tell=tell)
        from ftc.plan.compare import compare

        counts = _counts(microbatches) or [run.microbatches]
        costs = run.costs.costs(run.bytes_per_parameter, run.microbatches, latency, bandwidth, exchange)
        found = compare(costs, run.ranks, counts, cap, seconds=seconds, seed=seed, tell=tell, follow=follow)
    written = {}
    if out is not None:
        from ftc.plan.store import write_folder

        written = write_folder(out, found, run, cap, title=f"Pipelines of {config}")
    if as_json:
        from ftc.plan.store import as_dict

        print_json(as_dict(found, run, cap) | {"folder": None if out is None else str(out)})
        return
    _show(found, run, cap, written)


def _show(found: Any, run: Any, cap: float | None, written: dict[str, Path]) -> None:
    from ftc.plan.page import COLUMNS, how_to_run, rows_of

    console().print(f"{run.ranks} ranks; costs {run.costs.source}", markup=False)
    table(COLUMNS, rows_of(found.plans, cap), right=(1, 2, 3, 4, 6))
    for name, reason in found.left_out.items():
        console().print(f"left out: {name}: {reason}", markup=False)
    console().print(f"\nbest: {found.best.name}. In the run file:\n", markup=False)
    console().print(how_to_run(found.best, str(written.get("schedule", "")), run.microbatch_size), markup=False)
    for name, path in written.items():
        console().print(f"{name}: {path}", markup=False)


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _machine(text: str | None) -> Any:
    if text is None:
        return None
    from ftc.plan.roofline import Machine

    try:
        flops, bandwidth = (float(part) for part in text.split(","))
    except ValueError:
        raise FtcError(f"--machine {text!r} is not two numbers; write FLOP/s and bytes/s like 400e12,3e12") from None
    return Machine(flops, bandwidth)


def _counts(text: str | None) -> list[int]:
    if text is None:
        return []
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdigit() and int(part) > 0 for part in parts):
        raise FtcError(f"--microbatches {text!r} is not a list of numbers of 1 or more; write 16 or 8,16,32")
    return sorted({int(part) for part in parts})
