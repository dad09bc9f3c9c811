"""Commands that look and change nothing: passes, capture, explain, verify."""

import re

import typer

from ftc.commands.output import console, count_text, print_json, table, working
from ftc.commands.shared import JSON, MODEL, SEED, TOKENIZER


def register(app: typer.Typer) -> None:
    app.command("passes")(passes)
    app.command("capture")(capture)
    app.command("explain")(explain)
    app.command("verify")(verify)


def passes(name: str = typer.Argument(None, help="One pass, with its options."), as_json: bool = JSON) -> None:
    """List the passes: what each does and what it promises.

    Contracts: bitwise (same bits), exact (equal in real arithmetic, checked to 1e-12 in float64), lossy (within a bound).

    [bold]Examples[/bold]

      ftc passes

      ftc passes fuse-qkv

      ftc passes --json
    """
    from ftc.errors import FtcError, nearest
    from ftc.rewrite.registry import available

    known = available()
    if name is not None and name not in known:
        raise FtcError(f"there is no pass {name!r}; {nearest(name, known)}")
    chosen = {name: known[name]} if name else known
    if as_json:
        print_json({key: _pass_dict(info) for key, info in chosen.items()})
        return
    table(
        ("pass", "contract", "inverse", "what it does"),
        ((key, info.contract, "yes" if info.inverse else "no", info.summary) for key, info in chosen.items()),
    )
    if name:
        rows = [
            (option, _type_name(kind), _value(default), text)
            for option, (kind, default, text) in known[name].options.items()
        ]
        table(("option", "type", "default", "meaning"), rows) if rows else console().print("It takes no options.")


def capture(
    model: str = MODEL,
    code: bool = typer.Option(False, "--code", help="Print each graph as readable Python."),
    seed: int = SEED,
    as_json: bool = JSON,
) -> None:
    """Capture a model and show its regions, the graphs they share, and sizes.

    [bold]Examples[/bold]

      ftc capture preset:tiny

      ftc capture ./Llama-3.2-1B --code

      ftc capture runs/quickstart/train --json
    """
    import ftc
    from ftc.commands.shared import opened
    from ftc.open_model import example_inputs
    from ftc.rewrite.report import count_of

    loaded = opened(model, seed)
    program = (
        loaded if hasattr(loaded, "describe") else ftc.capture(loaded, example_inputs(loaded, seed=seed), inplace=True)
    )
    described = program.describe()
    sources = _sources(program) if code else {}
    if as_json:
        print_json(described | ({"code": sources} if code else {}))
        return
    regions, graphs = described["regions"], described["graphs"]
    console().print(
        f"{described['model']}: {count_text(described['parameters'])} parameters, {count_of(len(regions), 'region')}, "
        f"{count_of(len(graphs), 'graph')}"
    )
    if described.get("note"):
        console().print(described["note"])
    table(
        ("region", "block", "parameters", "graph"),
        ((r["name"], r["kind"], count_text(r["parameters"]), graphs[r["graph"]]["name"]) for r in regions),
        right=(2,),
    )
    for graph in graphs:
        for variant in graph["variants"]:
            inputs = ", ".join(
                f"{i['name']} {i['dtype'].removeprefix('torch.')}[{', '.join(i['sizes'])}]" for i in variant["inputs"]
            )
            console().print(f"graph {graph['name']}: {variant['nodes']} nodes, inputs {inputs}", markup=False)
    for name, source in sources.items():
        console().print(f"\n# {name}", markup=False)
        from rich.syntax import Syntax

        console().print(
            Syntax(source, "python", background_color="default") if console().is_terminal else source, markup=False
        )


def explain(
    model: str = MODEL,
    pass_name: str = typer.Option(None, "--pass", help="The pass, such as fuse-qkv."),
    precision: bool = typer.Option(False, "--precision", help="Every product with its formats, scales, saturation and underflow on text."),
    calibration: list[str] = typer.Option(None, "--calibration", help="Text for --precision, or self: drawn from the model; repeatable."),
    recipe: str = typer.Option("rowwise", "--recipe", help="How --precision would run what does not run in float8."),
    tokenizer: str = TOKENIZER,
    seed: int = SEED,
    as_json: bool = JSON,
) -> None:
    """Show where a pass matches, where it nearly does, and the node where pattern and graph part; or, with --precision, what float8 does to each product.

    [bold]Examples[/bold]

      ftc explain preset:tiny --pass fuse-qkv

      ftc explain ./model --pass raise-attention --json

      ftc explain ./model --precision --calibration text.jsonl
    """
    from ftc.errors import FtcError

    if (pass_name is None) != precision:
        raise FtcError("explain takes either --pass NAME or --precision")
    if precision:
        from ftc.commands.precision import report_precision

        report_precision(model, calibration or [], tokenizer, recipe, seed, as_json)
        return
    import ftc
    from ftc.commands.shared import opened
    from ftc.open_model import example_inputs
    from ftc.rewrite.registry import parse_passes

    parse_passes(pass_name)
    loaded = opened(model, seed)
    example = None if hasattr(loaded, "describe") else example_inputs(loaded, seed=seed)
    explanation = ftc.explain(loaded, pass_name, example)
    if as_json:
        print_json(explanation.as_dict())
    else:
        console().print(str(explanation), markup=False)


def verify(
    folder: str = typer.Argument(..., help="A folder that ftc rewrite or program.save wrote."),
    every: bool = typer.Option(False, "--all", help="Show every check, not only those that fail."),
    as_json: bool = JSON,
) -> None:
    """Run every certificate again from the files alone; a changed weight, graph or certificate fails (exit code 1).

    [bold]Examples[/bold]

      ftc verify out/

      ftc verify out/ --all

      ftc verify runs/quickstart/rewrite --json
    """
    import ftc
    from ftc.open_model import checked_program

    path = checked_program(folder)
    with working(not as_json) as tell:
        verification = ftc.verify(path, tell)
    if as_json:
        print_json(verification.as_dict())
    else:
        _show_verification(verification, every)
    if not verification.ok:
        raise typer.Exit(1)


def _show_verification(verification, every: bool) -> None:
    """How many checks of each kind hold, and those that do not (or with `every`, all of them)."""
    kinds = dict.fromkeys(row["kind"] for row in verification.rows)
    counts = {kind: [row["ok"] for row in verification.rows if row["kind"] == kind] for kind in kinds}
    rows = ((kind, f"{sum(oks)} of {len(oks)} hold", _CHECKS.get(kind, "")) for kind, oks in counts.items())
    table(("checked", "result", "what"), rows)
    shown = [row for row in verification.rows if every or not row["ok"]]
    if shown:
        rows = ((_short(r["name"]), r["kind"], "ok" if r["ok"] else "FAILED", _short(r["detail"])) for r in shown)
        table(("what", "kind", "result", "detail"), rows)
    console().print("verified" if verification.ok else "NOT verified")


_CHECKS = {
    "file": "every sha256, and the digest of ftc.json",
    "graph": "each graph's name is the hash of what it computes",
    "pass": "contract, inverse and worst errors agree with the certificates",
    "certificate": "every trial measured again; the pass, applied again, finds as many sites",
    "chain": "from each captured graph to the graph that runs",
    "weights": "back through the lenses and forward again, same bits",
    "program": "it loads, and tensors and graphs fit",
}


def _short(text: str) -> str:
    """Hashes of 64 digits by their first twelve."""
    return re.sub(r"\b([0-9a-f]{12})[0-9a-f]{52}\b", r"\1..", text)


def _sources(program) -> dict[str, str]:
    """Readable Python of each distinct graph, by name."""
    return {code.name: "\n\n".join(_tidy(variant.source) for variant in code.all_variants()) for code in program.codes}


def _tidy(source: str) -> str:
    """Generated code without blank lines at its ends and without the `x = None` that frees each tensor."""
    return "\n".join(re.sub(r";  (\w+ = )+None$", "", line.rstrip()) for line in source.strip().splitlines())


def _pass_dict(info) -> dict:
    options = {
        name: {"type": _type_name(kind), "default": default, "help": text}
        for name, (kind, default, text) in info.options.items()
    }
    return {"contract": str(info.contract), "summary": info.summary, "inverse": info.inverse, "options": options}


def _type_name(kind) -> str:
    return kind if isinstance(kind, str) else getattr(kind, "__name__", str(kind))


def _value(default: object) -> str:
    """A default as one would write it: true, false, or nothing."""
    return "" if default is None else str(default).lower() if isinstance(default, bool) else str(default)
