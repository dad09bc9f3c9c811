"""What is proved of a graph whose products run in float8.

The graph with its float8 products taken as plain ones equals the graph before, to 1e-12 in float64 and 1e-5 in float32: nothing else was changed. And
the graph as it is stays within a bound of the one before, in the model's own dtype: the relative error

    |a - b| / max(|b|, 0.05 rms sqrt(n))        Euclidean norms, n numbers, rms: the largest root mean square of any output, or of any gradient

of each output and of each gradient. On normal numbers one e4m3 product is 0.037 off, a block of seven products 0.06 and its worst gradient 0.15 (e5m2 gradients: more).
"""

from collections.abc import Sequence

from torch import Tensor, fx

from ftc.float8.place import in_high_precision
from ftc.rewrite import certificate, probe
from ftc.rewrite.certificate_ranks import on_any_ranks

BOUND = 0.5
METRIC = "relative error, Euclidean"
_FLOOR = 0.05


def prove(before: fx.Graph, after: fx.Graph, earlier: Sequence[dict] | None = None) -> list[dict]:
    """Trials as a certificate holds them; those of `earlier` once more, where they are given."""
    exact = None if earlier is None else [t for t in earlier if "metric" not in t]
    trials = certificate.compared(before, in_high_precision(after), (), exact)
    if on_any_ranks(before, after):
        return trials
    lossy = [t for t in earlier or () if "metric" in t]
    dtype = certificate.model_dtype(before)
    for size in [t["sizes"] for t in lossy] or [t["sizes"] for t in trials[:1]]:
        trials.append(_measured(before, after, {"seed": 0, "sizes": size, "dtype": str(dtype).removeprefix("torch."), "lifted": False}))
    return trials


def _measured(before: fx.Graph, after: fx.Graph, trial: dict) -> dict:
    sizes = dict(zip(certificate.symbols_in_order(before), trial["sizes"], strict=True))
    inputs, parameters = probe.random_inputs(before, sizes, trial["seed"]), probe.random_parameters(before, trial["seed"])
    keep = range(len(next(node for node in before.nodes if node.op == "output").args[0]))
    found = [certificate._evaluate(graph, list(inputs), dict(parameters), trial["seed"], False, keep) for graph in (before, after)]
    (out, grads), (new_out, new_grads) = found
    names = [name for name in grads if grads[name].is_floating_point()]
    return trial | {
        "output_error": _error([o for o in out if o.is_floating_point()], [n for n in new_out if n.is_floating_point()]),
        "gradient_error": _error([grads[n] for n in names], [new_grads[n] for n in names]),
        "bound": BOUND,
        "metric": METRIC,
    }


def _error(references: Sequence[Tensor], values: Sequence[Tensor]) -> float:
    floor = _FLOOR * max((_rms(r) for r in references), default=0.0)
    errors = [float((v.double() - r.double()).norm()) / max(float(r.double().norm()), floor * r.numel() ** 0.5, 1e-300) for r, v in zip(references, values, strict=True) if r.numel()]
    return max(errors, default=0.0) if all(e == e for e in errors) else float("nan")


def _rms(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt()) if x.numel() else 0.0


