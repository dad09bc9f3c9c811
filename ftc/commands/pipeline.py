"""Commands that run for a while: train, run (a recipe), bench."""

import subprocess
import sys
from pathlib import Path

import typer

from ftc.commands.output import console, print_json, seconds_text, table, working
from ftc.commands.shared import JSON
from ftc.errors import FtcError, FtcFailure, nearest

BENCHMARKS = "benchmarks"
_NOT_BENCHMARKS = {"measure"}  # what the scripts share


def register(app: typer.Typer) -> None:
    app.command("train")(train)
    app.command("profile")(profile)
    app.command("run")(run)
    app.command("bench")(bench)


def train(
    config: str = typer.Argument(
        None, metavar="RUN.toml", help="torchtitan's TOML with a section [ftc], or the name of a shipped one (--list)."
    ),
    out: Path = typer.Option(None, "--out", help="Folder of the run; an interrupted run in it continues."),
    change: list[str] = typer.Option(None, "--set", help="Change a key: --set training.steps=100; repeatable."),
    restart: bool = typer.Option(False, "--restart", help="Begin again, without the checkpoints in the folder."),
    nproc: int = typer.Option(
        None, "--nproc", help="Processes on this machine, default 1; [parallelism] says what they share."
    ),
    max_restarts: int = typer.Option(3, "--max-restarts", help="How often to go on from a checkpoint when one dies."),
    nnodes: int = typer.Option(1, "--nnodes", help="Machines; run the same command on each, with a folder that they share."),
    node_rank: int = typer.Option(None, "--node-rank", help="Which of the machines this is, from 0."),
    endpoint: str = typer.Option("", "--rdzv-endpoint", metavar="HOST:PORT", help="Where they meet: the machine of rank 0, a free port."),
    wait: int = typer.Option(600, "--rdzv-timeout", metavar="SECONDS", help="How long to wait for the other machines."),
    slurm: bool = typer.Option(False, "--slurm", help="Print a script for sbatch that runs this command on --nnodes machines."),
    dry_run: bool = typer.Option(False, "--dry-run", help="Check the run, and say what memory and FLOPs a step takes."),
    device_memory: str = typer.Option(None, "--device-memory", metavar="SIZE", help="With --dry-run: must fit, such as 80GiB."),
    list_shipped: bool = typer.Option(False, "--list", help="List the run files that come with ftc."),
    as_json: bool = JSON,
) -> None:
    """Train a model through torchtitan.

    [bold]Examples[/bold]

      ftc train quickstart --out runs/first

      ftc train run.toml --out runs/second --set training.steps=100 --set ftc.data=book.txt

      ftc train run.toml --out runs/third --nproc 2

      ftc train llama3-8b --dry-run --device-memory 80GiB

      ftc train run.toml --out /shared/run --nproc 8 --nnodes 2 --node-rank 0 --rdzv-endpoint node0:29500

      ftc train run.toml --out /shared/run --nproc 8 --nnodes 2 --slurm > run.sbatch
    """
    if list_shipped:
        from ftc.train.shipped import shipped

        print_json(shipped()) if as_json else table(("run file", "what it trains"), shipped().items())
        return
    if config is None:
        raise FtcError("name a run file, or one that comes with ftc: ftc train --list")
    changes = parse_changes(change or [])
    if dry_run:
        from ftc.commands.dry_run import show_dry_run

        show_dry_run(config, changes, out, nproc if nnodes == 1 else (nproc or 1) * nnodes, device_memory, as_json)
        return
    if device_memory is not None:
        raise FtcError("--device-memory is for --dry-run; add it")
    if out is None:
        raise FtcError("--out is missing: name the folder of the run")
    if slurm:
        from ftc.train.launch import check_run, resolve
        from ftc.train.slurm import slurm_script

        check_run(resolve(config, changes), files=False)
        print(slurm_script(config, out, change or [], nproc or 1, nnodes, max_restarts), end="")
        return
    from ftc.train.launch import train as launch
    from ftc.train.machines import Machines

    if node_rank is None and nnodes > 1:
        raise FtcError(f"say which of the {nnodes} machines this is: --node-rank 0 on the first, which --rdzv-endpoint names")
    machines = Machines(nnodes, node_rank or 0, endpoint, wait)
    options = {"restart": restart, "num_processes": 1 if nproc is None else nproc, "max_restarts": max_restarts}
    result = launch(config, out, changes, quiet=as_json, machines=machines, **options)
    if result is None:
        console().print("this machine's part is done; the first rank writes the result")
        return
    if as_json:
        print_json(result.as_dict())
        return
    console().print(
        f"{result.steps} steps, {result.tokens:,} tokens in {seconds_text(result.seconds)}, loss {result.loss:.3f} nats"
    )
    if result.validation:
        sources = result.validation["sources"] if len(result.data) > 1 else {}
        for name, measured in {"validation": result.validation, **sources}.items():
            theirs = measured.get("trigram_bits_per_byte")
            beside = "" if theirs is None else f" (a trigram model of the same tokens: {theirs:.3f})"
            console().print(f"{name}: {measured['bits_per_byte']:.3f} bits per byte{beside}", markup=False)
    else:
        console().print("validation: none; no text was held out (one document only?), or ftc.validate is off")
    console().print(f"model in {result.program_folder or result.model_folder}", markup=False)


def parse_changes(changes: list[str]) -> dict[str, object]:
    """["training.steps=10"] as {"training.steps": 10}; values are TOML, and bare words strings."""
    import tomllib

    values = {}
    for change in changes:
        key, equals, text = change.partition("=")
        if not equals or "." not in key:
            raise FtcError(f"--set {change!r} is not section.key=value, such as training.steps=100")
        try:
            values[key.strip()] = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            values[key.strip()] = text
    return values


def profile(
    config: str = typer.Argument(..., metavar="RUN.toml", help="A run file as for ftc train, or: quickstart."),
    out: Path = typer.Option(..., "--out", help="Folder for trace.rank0.json, ..., and profile.json."),
    steps: int = typer.Option(3, "--steps", help="Steps to profile, after two to warm up."),
    nproc: int = typer.Option(1, "--nproc", help="Processes on this machine."),
    change: list[str] = typer.Option(None, "--set", help="Change a key, as for ftc train; repeatable."),
    rows: int = typer.Option(12, "--rows", help="Rows of each table that are printed; profile.json has all."),
    as_json: bool = JSON,
) -> None:
    """Say where the time and the memory of a training step go: by region, by operator, and each product on the roofline.

    Nothing of the run's own folder is touched. The traces open in chrome://tracing or ui.perfetto.dev.

    [bold]Examples[/bold]

      ftc profile quickstart --out runs/profile

      ftc profile run.toml --out runs/profile --nproc 2 --set compile.enable=true
    """
    from ftc.commands.profile import show_profile
    from ftc.train.profile import profile as profile_run

    with working(not as_json) as tell:
        tell("profiling; the first steps capture and warm up")
        found = profile_run(config, out, parse_changes(change or []), steps=steps, num_processes=nproc)
    if as_json:
        print_json(found)
    else:
        show_profile(found, out, rows)


def run(
    recipe: str = typer.Argument(
        ..., metavar="RECIPE.toml", help="A recipe's file, or the name of a shipped one: quickstart."
    ),
    out: Path = typer.Option(None, "--out", help="Folder of the run; default runs/NAME of the recipe."),
    until: str = typer.Option(None, "--until", metavar="STAGE", help="Stop after this stage."),
    force: list[str] = typer.Option(
        None, "--force", metavar="STAGE", help="Run this stage again even if it is finished; repeatable."
    ),
    dry_run: bool = typer.Option(False, "--dry-run", help="Check the recipe and say what would run."),
    as_json: bool = JSON,
) -> None:
    """Run a recipe: its stages in order, skipping those that are finished and unchanged; ends with report.html.

    [bold]Examples[/bold]

      ftc run quickstart

      ftc run recipe.toml --out runs/mine --until train

      ftc run recipe.toml --dry-run
    """
    from ftc.recipes.recipe import load_recipe
    from ftc.recipes.runner import plan, run_recipe

    loaded = load_recipe(recipe)
    folder = out or Path("runs") / loaded.name
    if dry_run:
        rows = [step.as_dict() for step in plan(loaded, folder, until=until, force=force or ())]
        if as_json:
            print_json({"recipe": loaded.name, "folder": str(folder), "stages": rows})
        else:
            table(
                ("stage", "kind", "would", "because"), ((r["name"], r["kind"], r["action"], r["reason"]) for r in rows)
            )
        return
    result = run_recipe(loaded, folder, until=until, force=force or (), quiet=as_json)
    if as_json:
        print_json(result)
    else:
        console().print(f"report: {result['report']}", markup=False)


def bench(
    name: str = typer.Argument(None, help="The benchmark to run; without one, the list."),
    folder: Path = typer.Option(
        Path(BENCHMARKS), "--folder", help="Where the benchmarks are (a checkout of ftc has them)."
    ),
    as_json: bool = JSON,
) -> None:
    """List the benchmarks of a checkout, or run one (its last line is JSON).

    [bold]Examples[/bold]

      ftc bench

      ftc bench chunk-cross-entropy
    """
    found = {path.stem.replace("_", "-"): path for path in sorted(folder.glob("*.py"))}
    found = {key: path for key, path in found.items() if key not in _NOT_BENCHMARKS and not key.startswith("-")}
    if not found:
        raise FtcError(
            f"there are no benchmarks in {folder}; run this in a checkout of ftc, or name its folder with --folder"
        )
    if name is None:
        if as_json:
            print_json({key: _first_line(path) for key, path in found.items()})
        else:
            table(("benchmark", "what it measures"), ((key, _first_line(path)) for key, path in found.items()))
        return
    key = name.replace("_", "-").removesuffix(".py")
    if key not in found:
        raise FtcError(f"there is no benchmark {name!r}; {nearest(key, found)}")
    output = subprocess.PIPE if as_json else None
    done = subprocess.run([sys.executable, str(found[key])], stdout=output, text=True, check=False)
    if done.returncode:
        raise FtcFailure(f"the benchmark {key} ended with exit code {done.returncode}")
    if as_json:
        sys.stdout.write(done.stdout.strip().splitlines()[-1] + "\n")


def _first_line(path: Path) -> str:
    import ast

    return (ast.get_docstring(ast.parse(path.read_text())) or "").partition("\n")[0]
