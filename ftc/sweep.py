"""One pass at every point of a grid: what each loses, what its cache takes and how fast it is. A point that is done is kept in the folder.

    OUT/ftc.json        what is swept: model, pass, grid, text; a rerun must ask for the same
    OUT/points/N.json   what was measured at point N, written in one step when it is done; `original.json` is the model before the pass
    OUT/sweep.html      the picture and the table
"""

import hashlib
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ftc.errors import FtcError, FtcFailure
from ftc.files import MARKER, atomic_write, check_replaceable
from ftc.rewrite.attention_site import LATENT, attention_nodes
from ftc.sweep_grid import Options

KIND = "sweep"


@dataclass(frozen=True)
class Timed:
    """How latency is measured: tokens of a forward and of the text that a decode step continues, and how often (the least counts); `repeats` 0: not at all."""

    tokens: int = 128
    repeats: int = 20


@dataclass(frozen=True)
class Point:
    """What was measured at one point; `options` is empty for the original. `skipped` says why nothing was, `decode_note` why no decode step was timed.

    `kl` in nats a token; `cache_elements` and `cache_bytes` a token and layer, the mean of all layers.
    """

    options: Options
    skipped: str | None = None
    kl: float | None = None
    cache_elements: float | None = None
    cache_bytes: float | None = None
    forward_ms: float | None = None
    decode_ms: float | None = None
    decode_note: str | None = None
    seconds: float = 0.0


def sweep(
    program: Any,
    name: str,
    fixed: Options,
    points: Sequence[tuple[Options, str | None]],
    calibration: Any,
    out: Path,
    *,
    about: dict[str, Any],
    timed: Timed,
    check: bool = False,
    tell: Callable[[int, str], None] = lambda done, text: None,
) -> list[Point]:
    """Measure the original and every point that `out` does not hold yet; the original first. `program` is a Program and stays as it is.

    `points`: options, and the reason to skip where there is one (`ftc.sweep_grid.points_of`). `about`: what tells this sweep from another, JSON-ready; the
    program's weights, the text and `timed` are added. `tell` hears how many are done and what is at work. Raises FtcError for a folder that holds
    another sweep, and where every point is impossible.
    """
    from ftc.rewrite.calibration import as_batches, held_out
    from ftc.rewrite.pipeline import rewrite

    batches = as_batches(calibration, what=f"pass {name}")
    about = about | {"pass": name, "options": fixed, "points": [point for point, _ in points], "timed": asdict(timed)}
    begin(out, about | {"weights": weights_digest(program), "text": text_digest(batches)})
    _, apart = held_out(batches)
    found: list[Point] = []

    def done(key: str, measure: Callable[[], Point]) -> None:
        path = out / "points" / f"{key}.json"
        if path.is_file():
            point = Point(**json.loads(path.read_text()))
        else:
            started = time.perf_counter()
            point = measure()
            point = Point(**asdict(point) | {"seconds": time.perf_counter() - started})
            atomic_write(path, json.dumps(asdict(point), indent=1) + "\n")
        found.append(point)

    raised = rewrite(program, ["raise"], check=check)
    tell(0, "the original")
    done("original", lambda: measured(raised, {}, 0.0, timed, lambda text: tell(0, f"the original: {text}")))
    for number, (options, reason) in enumerate(points):
        label = text_of(options)
        tell(number + 1, label)

        def one(options=options, reason=reason, say=lambda text, n=number, label=label: tell(n + 1, f"{label}: {text}")) -> Point:
            return Point(options, skipped=reason) if reason else _one(raised, (name, fixed | options), options, batches, apart, timed, check, say)

        done(str(number), one)
    tell(len(points) + 1, "done")
    skipped = [point for point in found[1:] if point.skipped]
    if len(skipped) == len(points):
        raise FtcError(f"no point of the grid is possible; the first: {skipped[0].skipped}")
    return found


def _one(raised: Any, request: tuple, options: Options, batches: Any, apart: Any, timed: Timed, check: bool, tell: Callable[[str], None]) -> Point:
    from ftc.rewrite.calibration import kl_divergence
    from ftc.rewrite.pipeline import rewrite

    try:
        program = rewrite(raised, [request], calibration=batches, check=check, tell=tell)
    except (FtcError, FtcFailure) as error:
        return Point(options, skipped=str(error))
    tell("measuring what is lost")
    metric = program._applied[-1].get("metric")
    return measured(program, options, kl_divergence(raised, program, apart) if metric is None else metric["value"], timed, tell)


def measured(program: Any, options: Options, kl: float, timed: Timed, tell: Callable[[str], None]) -> Point:
    """A point's cache and latency. The program stays as it is."""
    sizes = cache_sizes(program)
    elements, count = (statistics.fmean(size[i] for size in sizes) for i in (0, 1))
    if not timed.repeats:
        return Point(options, None, kl, elements, count)
    tell("timing a forward")
    forward = _forward_ms(program, timed)
    tell("timing a decode step")
    try:
        return Point(options, None, kl, elements, count, forward, _decode_ms(program, timed))
    except (FtcError, FtcFailure) as error:
        return Point(options, None, kl, elements, count, forward, None, str(error))


def cache_sizes(program: Any) -> list[tuple[int, int]]:
    """Numbers and bytes that a cache keeps of a token, for each attention of the program's regions. FtcError where there is none."""
    found = []
    for region in program.regions:
        graph = region.code.all_variants()[0].captured.graph
        for node in attention_nodes(graph):
            kept = [node.args[i].meta["val"] for i in ((2, 3) if node.target is LATENT else (1, 2))]
            numbers = [int(value.shape[-1]) * (1 if node.target is LATENT else int(value.shape[1])) for value in kept]
            found.append((sum(numbers), sum(n * value.element_size() for n, value in zip(numbers, kept, strict=True))))
    if not found:
        raise FtcError("the model's blocks have no attention that a cache would serve")
    return found


@torch.no_grad()
def _forward_ms(program: Any, timed: Timed) -> float:
    ids = torch.ones(1, timed.tokens, dtype=torch.int64, device=next(program.parameters()).device)
    for _ in range(2):
        program(input_ids=ids)
    return _least_ms(lambda: program(input_ids=ids), timed.repeats)


@torch.no_grad()
def _decode_ms(program: Any, timed: Timed) -> float:
    """One token after `tokens` others, from the paged cache, not compiled."""
    from ftc.cache import PagedCache
    from ftc.cache.generation import PASSES
    from ftc.rewrite.pipeline import rewrite

    cached = rewrite(program, PASSES, check=False)
    length = timed.tokens + timed.repeats + 2
    cache = PagedCache(cached, length // 16 + 2)
    sequence = cache.add()
    cache.reserve({sequence: length})
    cache.prefill({sequence: [1] * timed.tokens})
    for _ in range(2):
        cache.forward({sequence: [1]})
    return _least_ms(lambda: cache.forward({sequence: [1]}), timed.repeats)


def _least_ms(run: Callable[[], Any], repeats: int) -> float:
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return 1e3 * min(seconds)  # what else the machine does only adds to it


def begin(out: Path, about: dict[str, Any]) -> None:
    """Make `out` the folder of the sweep that `about` describes, or continue in it. FtcError where it holds something else."""
    check_replaceable(out, KIND)
    marker = {"kind": KIND, **json.loads(json.dumps(about))}
    if (out / MARKER).is_file():
        held = json.loads((out / MARKER).read_text())
        other = [key for key in marker if held.get(key) != marker[key]]
        if other:
            key = other[0]
            raise FtcError(
                f"{out} holds another sweep: its {key} is {_short(held.get(key))}, not {_short(marker[key])}; name another folder, or remove that one"
            )
    (out / "points").mkdir(parents=True, exist_ok=True)
    atomic_write(out / MARKER, json.dumps(marker, indent=1) + "\n")


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 200 else text[:200] + " ..."


def weights_digest(program: Any) -> str:
    """sha256 of the names, shapes and first entries of all parameters: another model, or the same one trained on, has another."""
    digest = hashlib.sha256()
    for name, value in sorted(program.named_parameters()):
        head = value.detach().flatten()[:256].double().cpu()
        digest.update(f"{name} {list(value.shape)} {value.dtype}".encode() + head.numpy().tobytes())
    return digest.hexdigest()


def text_digest(batches: Any) -> str:
    """sha256 of the token ids."""
    digest = hashlib.sha256()
    for batch in batches:
        digest.update(str(list(batch["input_ids"].shape)).encode() + batch["input_ids"].cpu().numpy().tobytes())
    return digest.hexdigest()


def text_of(options: Options) -> str:
    """`cache=0.25, rotation=real`; "original" for none."""
    return ", ".join(f"{key}={written(value)}" for key, value in options.items()) or "original"


def written(value: Any) -> str:
    """A value as the command line takes it."""
    return str(value).lower() if isinstance(value, bool) else str(value)
