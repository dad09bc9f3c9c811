"""What a smaller cache costs: gqa-to-mla on stories260k, training-free and healed, against TransMLA's real rotation.

    .venv/bin/python benchmarks/latent_conversion.py DIR [--pairs 3] [--heal] [--json-out benchmarks/results/latent_conversion.json]

DIR holds llama2.c's stories260k (checkpoint.bin and tokenizer.bin). Metric: KL(original || converted) in nats a token, over 24 x 160 tokens drawn from the
model itself at temperature 1; calibrated on another 24 x 160 that it drew. A pair of seeds draws both; the mean over pairs is reported. "selected" chooses
pairs with RoPE and ranks by what is lost, layer by layer, from the budget; "published" keeps RoPE on the first component of every frequency and balances keys
and values by size, the same in every layer. Healing: 2x and 4x, at most 3 minutes each, text drawn from the model with another seed.
"""

import argparse
import tempfile
import time
from pathlib import Path
from statistics import mean

from ftc.models import load
from measure import finish

import ftc
from ftc.heal.heal import HealSettings, heal
from ftc.heal.sampling import sample
from ftc.rewrite.calibration import kl_divergence
from ftc.rewrite_folder import copy_tokenizer, run_usual_shapes

START, LENGTH, ROWS, ELEMENTS = 1, 160, 24, 64
CUTS = {"1.6x": 40, "2.0x": 32, "2.7x": 24, "4.0x": 16}
ASKED = {"1.6x": (0.12, 0.06), "2.0x": (0.17, 0.10)}
HEALED = {"2.0x": (0.05, 0.02), "4.0x": (0.25, 0.10)}
PUBLISHED = {"1.6x": (24, 16), "2.0x": (24, 8), "2.7x": (16, 8), "4.0x": (8, 8)}  # rank and rope


def converted(model, calibration, **options):
    example = {"input_ids": calibration[:2, :12]}
    return ftc.rewrite(model, [("gqa-to-mla", options)], example=example, calibration=calibration, check=False).eval()


def training_free(model, pairs: int) -> dict[tuple[str, str], list[float]]:
    """KL by (cut, way), one number a pair of seeds."""
    found: dict[tuple[str, str], list[float]] = {}
    for pair in range(pairs):
        calibration, apart = (sample(model, START, ROWS, LENGTH, seed=100 + 2 * pair + i) for i in (0, 1))
        batches = [{"input_ids": apart}]
        for cut, elements in CUTS.items():
            rank, rope = PUBLISHED[cut]
            ways = {f"selected, {r}": {"cache": elements / ELEMENTS, "rotation": r} for r in ("complex", "real", "none")}
            ways |= {f"published, {r}": {"rank": rank, "rope": rope, "rotation": r, "weigh": "size"} for r in ("complex", "real", "none")}
            for way, options in ways.items():
                found.setdefault((cut, way), []).append(kl_divergence(model, converted(model, calibration, **options), batches))
    return found


def healed(model, folder: Path, cut: str, tokens: int) -> dict:
    """KL before and after healing, and the seconds that it took, text and all."""
    calibration, apart = sample(model, START, ROWS, LENGTH, seed=100), sample(model, START, ROWS, LENGTH, seed=101)
    program = converted(model, calibration, cache=CUTS[cut] / ELEMENTS)
    with tempfile.TemporaryDirectory() as work:
        work = Path(work)
        run_usual_shapes(program)
        program.save(work / "converted")
        copy_tokenizer(folder / "tokenizer.bin", work / "converted")
        before, started = kl_divergence(model, program, [{"input_ids": apart}]), time.perf_counter()
        settings = HealSettings(tokens=tokens, seq_len=LENGTH, batch=16, seed=7)
        found = heal(work / "converted", folder, work / "heal", settings, quiet=True)
        seconds = time.perf_counter() - started
        after = kl_divergence(model, ftc.load(found["program"]).eval(), [{"input_ids": apart}])
    return {"cut": cut, "before": before, "after": after, "seconds": round(seconds, 1), "tokens": found["tokens"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--heal", action="store_true")
    parser.add_argument("--tokens", type=int, default=900_000, help="of a healing run")
    parser.add_argument("--json-out", type=Path)
    options = parser.parse_args()
    model = load(options.folder).eval()
    rows, record = [], {"pairs": options.pairs, "training_free": {}, "ratio_to_real": {}, "healed": []}
    found = training_free(model, options.pairs) if options.pairs else {}
    for (cut, way), values in found.items():
        record["training_free"][f"{cut} {way}"] = values
        asked = ASKED.get(cut) if way == "selected, complex" else None
        met = None if asked is None else mean(values) <= asked[0]
        measured = f"{mean(values):.4f} ({min(values):.4f} to {max(values):.4f})"
        rows.append((f"{cut} ({CUTS[cut]} of {ELEMENTS}), {way}", measured, asked and f"{asked[0]} ({asked[1]})", met))
    for cut in CUTS if found else ():
        for kind in ("selected", "published"):
            ratio = mean(found[cut, f"{kind}, complex"]) / mean(found[cut, f"{kind}, real"])
            record["ratio_to_real"][f"{cut} {kind}"] = ratio
            rows.append((f"{cut}, {kind}: complex over real", f"{ratio:.2f}", "below 1" + (" (0.33)" if cut == "2.0x" else ""), ratio < 1))
    for cut in HEALED if options.heal else ():
        result = healed(model, options.folder, cut, options.tokens)
        record["healed"].append(result)
        asked = HEALED[cut]
        met = result["after"] <= asked[0] and result["seconds"] <= 180
        rows.append((f"{cut} healed", f"{result['after']:.4f} from {result['before']:.4f} in {result['seconds']} s", f"{asked[0]} ({asked[1]}), 180 s", met))
    rows = [(what, measured, asked or "", met) for what, measured, asked, met in rows]
    finish("latent_conversion", rows, record, json_out=options.json_out)


if __name__ == "__main__":
    main()
