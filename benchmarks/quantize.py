"""`quantize` on a small trained model, and on one trained here: KL of each format, calibrated and to nearest, and formats chosen for a budget.

    .venv/bin/python benchmarks/quantize.py ../shared/data/stories260k [--pairs 3] [--budgets 0.002 0.01 0.03] [--json-out FILE]
    .venv/bin/python benchmarks/quantize.py trained [--work DIR] [--steps 300]          a decoder of the standard library's source, trained first
    .venv/bin/python benchmarks/quantize.py speed [--threads 1]                         one product of a decode step, in turns with float32

Text is drawn from the model (of `trained`: windows of its text, of which those measured on are held out); each pair of seeds gives text to calibrate on and
text apart, on which KL(original || quantised) in nats a token is measured. A budget's own measurement is on a quarter of the first text.
"""

import argparse
import time
from pathlib import Path
from statistics import mean

import torch
from measure import compare, finish, timing_options

import ftc
from ftc.quantize.formats import Format
from ftc.rewrite.calibration import kl_divergence

START, LENGTH = 1, 160
ROWS = {"formats": 24, "budget": 64}  # sequences to calibrate on, and as many to measure on
FORMATS = {
    "fp8": {"dtype": "fp8"},
    "fp8, blocks": {"dtype": "fp8", "granularity": "block"},
    "int8": {"dtype": "int8"},
    "int4, groups of 32": {"dtype": "int4"},
    "int4, groups of 32, symmetric": {"dtype": "int4", "zero": False},
    "fp8, dynamic activations": {"dtype": "fp8", "activations": "dynamic"},
    "fp8, static activations": {"dtype": "fp8", "activations": "static"},
}
ASKED = {"fp8": 0.010, "int8": 0.001}
HALF = ("int4, groups of 32", "int4, groups of 32, symmetric")


def quantised(model, text, **options):
    program = ftc.rewrite(model, [("quantize", options)], example={"input_ids": text[:2, :12]}, calibration=text, check=False)
    return program.eval()


def formats_of(model, pairs: list) -> dict[str, dict[str, list[float]]]:
    """KL by format and rounding, one number a pair of texts."""
    found: dict[str, dict[str, list[float]]] = {name: {"nearest": [], "calibrated": []} for name in FORMATS}
    for text, apart in pairs:
        for name, options in FORMATS.items():
            for rounding in ("nearest", "calibrated"):
                program = quantised(model, text, rounding=rounding, **options)
                found[name][rounding].append(kl_divergence(model, program, [{"input_ids": apart}]))
    return found


def budgets_of(model, pair: tuple, budgets: list[float]) -> list[dict]:
    """For each budget what was predicted and measured, and the bytes."""
    text, apart = pair
    found = []
    for budget in budgets:
        started = time.perf_counter()
        program = quantised(model, text, max_kl=budget, formats=["int4", "int8"])
        plans = program._applied[-1]["plans"]
        facts = next(iter(plans.values()))["budget"]
        kinds = [format for plan in plans.values() for format in plan["formats"].values()]
        found.append(
            {"budget": budget, **facts, "apart": kl_divergence(model, program, [{"input_ids": apart}]), "bytes": [sum(p["bytes"][i] for p in plans.values()) for i in (0, 1)],
             "formats": {kind: kinds.count(kind) for kind in sorted(set(kinds))}, "seconds": time.perf_counter() - started}
        )  # fmt: skip
    return found


def speed(args) -> None:
    """A product of a decode step at 4096 x 2048, several weights so that none stays in the nearest caches."""
    torch.set_num_threads(args.threads)
    generator, rows, record = torch.Generator().manual_seed(0), [], {}
    weights = [torch.randn(4096, 2048, generator=generator) for _ in range(4)]
    for count in (1, 4, 16):
        x = torch.randn(count, 2048, generator=generator)
        for name in ("fp8", "int8", "int4", "fp8-block"):
            format = Format.named(name)
            stored = [format.nearest(w) for w in weights]
            block = format.block(weights[0].shape)
            with torch.no_grad():
                found = compare(
                    lambda x=x: [torch.nn.functional.linear(x, w) for w in weights],
                    lambda x=x, f=format, s=stored, b=block: [torch.ops.ftc.quantized_linear(x, q.data, q.scale, q.zero, None, None, f.dtype, b, 2048) for q in s],
                    ("float32", name), args.rounds,
                )  # fmt: skip
            record[f"{name}, {count} rows"] = found.as_dict()
            rows.append((f"{name}, {count} rows", f"{found.ratio:.2f}x the time of float32 ({min(found.ratios):.2f} to {max(found.ratios):.2f})", "", None))
    finish("quantize_speed", rows, record, args.check, args.json_out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a folder, `trained`, or `speed`")
    parser.add_argument("--pairs", type=int, default=3, help="of texts for the formats; 0 leaves them out")
    parser.add_argument("--budgets", type=float, nargs="*", default=[0.002, 0.01, 0.03])
    parser.add_argument("--work", type=Path, default=Path("/tmp/ftc-quantize"))
    parser.add_argument("--steps", type=int, default=300)
    timing_options(parser)
    args = parser.parse_args()
    if args.model == "speed":
        speed(args)
        return
    if args.model == "trained":
        import mha_to_gqa

        model, prepared, _ = mha_to_gqa.trained(args.work, args.steps)
        pairs = [mha_to_gqa.texts(prepared, seed) for seed in range(args.pairs)]
        mha_to_gqa.WINDOWS = ROWS["budget"]
        large = mha_to_gqa.texts(prepared, 50)
    else:
        from ftc.models import load

        from ftc.heal.sampling import sample

        model = load(Path(args.model)).eval()
        pairs = [tuple(sample(model, START, ROWS["formats"], LENGTH, seed=100 + 2 * pair + i) for i in (0, 1)) for pair in range(args.pairs)]
        large = tuple(sample(model, START, ROWS["budget"], LENGTH, seed=200 + i) for i in (0, 1))
    rows, record = [], {"model": Path(args.model).name, "pairs": args.pairs}
    record["formats"] = found = formats_of(model, pairs) if pairs else {}
    stories = args.model != "trained"
    for name, values in found.items():
        near, best = (mean(values[rounding]) for rounding in ("nearest", "calibrated"))
        bound = ASKED.get(name) if stories else None
        rows.append((f"{name}, calibrated", f"{best:.5f} (nearest {near:.5f}, {best / near:.2f}x)", "" if bound is None else f"{bound}", None if bound is None else best <= bound))
        if name in HALF and stories:
            rows.append((f"{name}: calibrated over nearest", f"{best / near:.2f}", "0.5", best / near <= 0.5))
    record["budgets"] = budgets_of(model, large, args.budgets)
    for each in record["budgets"]:
        off = each["predicted"] / each["measured"] - 1
        words = f"predicted {each['predicted']:.5f}, measured {each['measured']:.5f} ({off:+.0%}), on other text {each['apart']:.5f}"
        words += f"; {each['bytes'][0] / each['bytes'][1]:.2f}x smaller, {each['formats']}, {each['repairs']} repairs"
        rows.append((f"budget {each['budget']}", words, "within it, 20%", each["measured"] <= each["budget"] and abs(off) <= 0.2))
    finish("quantize", rows, record, args.check, args.json_out)


if __name__ == "__main__":
    main()
