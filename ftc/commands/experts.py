"""What `ftc evaluate MODEL --experts` does: how experts are used, what they specialise in, what they are worth."""

import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftc.commands.output import print_json, say, table, working
from ftc.errors import FtcError

if TYPE_CHECKING:
    from torch import Tensor

    from ftc.moe.ablation import Harm
    from ftc.moe.measure import Measured
    from ftc.moe.routing import Mixtures, Routing
    from ftc.moe.specialisation import Specialisation

PAGE, NUMBERS = "report.html", "experts.json"


def domains_of(data: Sequence[str]) -> dict[str, list[str]]:
    """Paths by domain: of NAME=PATH the name, of a file its name without the ending, of a folder every file in it as a domain of its own.

    Entries of one name are one domain. FtcError for nothing, for what is not there, and for a folder without files.
    """
    from ftc.texts import check_data

    found: dict[str, list[str]] = {}
    for entry in data:
        name, equals, path = str(entry).partition("=")
        if equals and name and not Path(entry).exists():
            found.setdefault(name, []).append(path)
        elif Path(entry).is_dir():
            files = sorted(f for f in Path(entry).iterdir() if f.is_file() and not f.name.startswith("."))
            if not files:
                raise FtcError(f"the folder {entry} holds no files; name one whose files are domains, or NAME=PATH")
            for file in files:
                found.setdefault(file.stem, []).append(str(file))
        else:
            found.setdefault(Path(entry).stem or str(entry), []).append(str(entry))
    if not found:
        raise FtcError("--experts needs text by domain: --data NAME=PATH, repeatable, or a folder whose files are domains")
    check_data([path for paths in found.values() for path in paths])
    return found


def check_folder(out: Path | None) -> None:
    """FtcError where the folder of the page cannot be one."""
    if out is not None and out.exists() and not out.is_dir():
        raise FtcError(f"--out {out} is a file; with --experts it is a folder, which gets {PAGE} and {NUMBERS}")


def opened_mixtures(model: str, seed: int) -> "Mixtures":
    """`ftc.moe.routing.Mixtures` of what MODEL names, its experts brought to `ftc.fused_moe`. FtcError where it has none."""
    import ftc
    from ftc.capture.program import Program
    from ftc.commands.shared import opened
    from ftc.moe.routing import Mixtures
    from ftc.open_model import example_inputs

    loaded = opened(model, seed)
    program = loaded if isinstance(loaded, Program) else ftc.capture(loaded, example_inputs(loaded, seed=seed), inplace=True)
    # raise-moe proves each site itself, in values and gradients; what a certificate would measure again is left out
    program = ftc.rewrite(program, ["raise-moe"], inplace=True, check=False)
    try:
        Mixtures(program)
    except FtcError as error:
        raise FtcError(f"{model}: {error}") from error
    return Mixtures(ftc.rewrite(program, ["fuse-moe"], inplace=True, check=False))


def windows_of(domains: Mapping[str, Sequence[str]], tokenizer: Any, tokens: int, context: int, batch: int) -> dict[str, list[Any]]:
    """The first tokens of each domain as batches of windows. FtcError for a domain with fewer than two."""
    from ftc.data.tokens import start_id
    from ftc.moe.routing import windows
    from ftc.texts import first_tokens

    texts = {}
    for name, paths in domains.items():
        ids = first_tokens(paths, tokenizer, tokens, start_id(tokenizer))[:tokens]
        if len(ids) < 2:
            raise FtcError(f"the domain {name!r} has {len(ids)} tokens of text; give at least two")
        texts[name] = windows(ids, context, batch)
    return texts


def show_experts(
    model: str, data: Sequence[str], tokenizer: Path | None, against: str | None, context: int, batch: int, tokens: int, ablation_tokens: int,
    out: Path | None, seed: int, as_json: bool,
) -> None:  # fmt: skip
    """Measure, print as tables or JSON, and write the page and the numbers where a folder is given."""
    from ftc.moe.measure import measure
    from ftc.open_model import check_model, find_tokenizer, open_tokenizer

    domains = domains_of(data)
    check_folder(out)
    find_tokenizer(model, tokenizer)
    for name in (model, against):
        if name is not None:
            check_model(name)
    texts = windows_of(domains, open_tokenizer(model, tokenizer), tokens, context, batch)
    with working(not as_json) as tell:
        tell(f"reading {model} and bringing its experts to one form")
        mixtures = opened_mixtures(model, seed)
        earlier = None if against is None else opened_mixtures(against, seed)
    shown = sys.stderr.isatty() and not as_json
    measured = measure(mixtures, texts, earlier=earlier, ablation_tokens=ablation_tokens, seed=seed, progress=shown)
    numbers = {"model": model, "against": against, "context": context, **measured.as_dict()}
    if out is not None:
        write(out, model, measured, numbers)
    if as_json:
        print_json(numbers | {"folder": None if out is None else str(out)})
        return
    show(measured)
    if out is not None:
        print(f"written: {out / PAGE}, {out / NUMBERS}")


def write(out: Path, model: str, measured: "Measured", numbers: Mapping[str, Any]) -> None:
    """The page and the numbers, each in one step."""
    import json

    from ftc.commands.output import plain
    from ftc.files import atomic_write
    from ftc.moe.picture import page

    atomic_write(out / NUMBERS, json.dumps(plain(numbers), indent=1, allow_nan=False) + "\n")
    atomic_write(out / PAGE, page(model, measured.routings, measured.found, measured.random, measured.harm, measured.saturation))


def show(measured: "Measured") -> None:
    """Tables of load, domains and harm."""
    show_load(measured.together, measured.saturation)
    show_domains(measured.found, measured.random, measured.harm)
    if measured.harm is not None:
        show_harm(measured.harm)
    if len(measured.found.domains) == 1:
        say("one domain alone: nothing to compare it with; give more with --data NAME=PATH")


def show_load(routing: "Routing", saturation: "Tensor | None") -> None:
    """How evenly the experts of each layer are used."""
    from ftc.moe.picture import number_text
    from ftc.moe.specialisation import utilisation

    rows, some_unfilled = [], bool(routing.unfilled.any())
    for layer, (name, row) in enumerate(utilisation(routing).items()):
        pair = row["strongest_pair"]
        cells = [name, *(number_text(row[key], 3) for key in ("max_violation", "entropy", "confidence")), len(row["dead"])]
        cells += ["–" if pair is None else f"{pair['experts'][0]}+{pair['experts'][1]} {pair['over_independence']:.2f}x"]
        cells += [f"{row['unfilled']:.1%}"] * some_unfilled
        rows.append(cells + ([] if saturation is None else [f"{float(saturation[layer]):.0%}"]))
    columns = ["layer", "MaxVio", "entropy", "confidence", "dead", "pair", *["unfilled"] * some_unfilled, *["earlier"] * (saturation is not None)]
    chosen = f"{float(routing.chosen.mean()):.3g} of {routing.num_experts} experts a token"
    table(columns, rows, title=f"load, all domains together: {chosen}, {int(routing.tokens[0]):,} tokens", right=range(1, 8))


def show_domains(found: "Specialisation", random: "Specialisation", harm: "Harm | None") -> None:
    """What each domain uses, beside a random router and an oracle, and what one layer's own expert is worth."""
    from ftc.moe.ablation import own_and_others
    from ftc.moe.picture import number_text

    own, others = (None, None) if harm is None else own_and_others(harm.one)
    rows = [
        (name, domain, f"{int(found.most[i, d])} {float(found.most_over_chance[i, d]):.2f}x", f"{int(found.own[i, d])} {_lead(float(found.own_lead[i, d]))}",
         *(() if harm is None else (f"{float(own[i, d]):.4f}", number_text(float(others[i, d]), 4))))
        for i, name in enumerate(found.layers) for d, domain in enumerate(found.domains)
    ]  # fmt: skip
    columns = ["layer", "domain", "most used, over chance", "own, over others"] + ([] if harm is None else ["harm without own", "to others"])
    table(columns, rows, title="experts by domain; harm in nats a token", right=range(2, 6))
    rows = [
        (name, *(f"{value:.2f}x" for value in (float(found.most_over_chance[i].max()), float(random.most_over_chance[i].max()), float(found.oracle[i]))),
         *(f"{value:.4f}" for value in (float(found.information[i]), float(random.information[i]), math.log(float(found.oracle[i])))))
        for i, name in enumerate(found.layers)
    ]  # fmt: skip
    columns = ("layer", "over chance", "random", "oracle", "information", "random", "oracle")
    table(columns, rows, title="largest share over chance, and information between domain and expert in nats", right=range(1, 7))


def show_harm(harm: "Harm") -> None:
    """What every domain loses without the own experts of one."""
    ratios = harm.ratio(harm.every).tolist()
    rows = [
        (f"without {name}'s", *(f"{value:.4f}" for value in harm.every[d].tolist()), "–" if math.isnan(ratios[d]) else f"{ratios[d]:.2f}x")
        for d, name in enumerate(harm.domains)
    ]
    rows += [("random router", *(f"{value:.4f}" for value in harm.random.tolist()), "")]
    rows += [("cross-entropy as it is", *(f"{value:.4f}" for value in harm.base.tolist()), "")]
    columns = ("own experts of all layers", *harm.domains, "own over others")
    table(columns, rows, title="increase of the cross-entropy, nats a token", right=range(1, len(columns)))


def _lead(value: float) -> str:
    return "–" if math.isnan(value) else "never there" if math.isinf(value) else f"{value:.2f}x"
