"""`mha-to-gqa` against mean pooling, at the same cost, on a multi-head decoder trained here on the Python standard library's source.

    .venv/bin/python benchmarks/mha_to_gqa.py [--steps 600] [--seeds 0,1,2] [--work DIR] [--json-out benchmarks/results/mha_to_gqa.json]

The decoder (4 layers, width 128, 8 heads, each with keys and values of its own) is trained once, about 5 minutes on one core, and kept in --work. Each seed
draws text that the model calibrates on and text apart from it, on which KL(original || converted) in nats a token is measured. Mean pooling is the same pass
with `align = false, choose = "neighbours"`: heads next to each other, their plain mean.
"""

import argparse
import time
from pathlib import Path
from statistics import mean

import torch
from measure import finish
from mtp import build, loader, optimisation, validation_nats
from torch import Tensor, nn

import ftc
from ftc.data.prepare import Prepared, prepare
from ftc.data.source_table import Source
from ftc.rewrite.calibration import kl_divergence
from ftc.train.config import read_toml
from ftc.train.losses import next_token

ASKED, AIM = 0.5, 0.25  # of mean pooling's KL
RUN_FILE = Path(__file__).parent.parent / "ftc" / "train" / "configs" / "quickstart.toml"
ARCHITECTURE = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "head_dim": 16, "tie_word_embeddings": False}
ARCHITECTURE |= {"num_attention_heads": 8, "num_key_value_heads": 8}
LENGTH, WINDOWS = 160, 24  # tokens of a window, windows of each text
VARIANTS = {
    "mean pooling": {"align": False, "choose": "neighbours"},
    "mean pooling, similar heads": {"align": False},
    "aligned, neighbours": {"choose": "neighbours"},
    "aligned, similar heads": {},
}


def trained(work: Path, steps: int) -> tuple[nn.Module, Prepared, float]:
    """The decoder, from `work` or trained now, its text, and its validation loss in nats a token."""
    import ftc.models

    run = read_toml(RUN_FILE)
    run["ftc"]["architecture"] = ARCHITECTURE
    run["training"]["seq_len"] = LENGTH
    prepared = prepare(work, [Source("stdlib")], vocab_size=run["ftc"]["vocab_size"])
    folder = work / f"model-steps{steps}"
    if not folder.is_dir():
        torch.manual_seed(0)
        model = build(run, prepared)
        optimizer, scheduler = optimisation(model, run, steps)
        batches, started = iter(loader(prepared, run, 0)), time.perf_counter()
        for step in range(1, steps + 1):
            tokens_BT, labels_BT = next(batches)
            loss = next_token(model(input_ids=tokens_BT), labels_BT) / labels_BT.numel()
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            if step % 50 == 0 or step == steps:
                print(f"step {step}/{steps}, {time.perf_counter() - started:.0f} s, training loss {loss:.4f} nats", flush=True)
        ftc.models.save(model, folder)
    model = ftc.models.load(folder).eval()
    return model, prepared, validation_nats(model, prepared, 32, LENGTH)


def texts(prepared: Prepared, seed: int) -> tuple[Tensor, Tensor]:
    """Windows to calibrate on, from the training text, and windows to measure on, from the text held out; int64 [N, T]."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for text in (prepared.train, prepared.validation):
        stream = torch.from_numpy(text.stream(prepared.tokenizer)).long()
        starts = torch.randint(len(stream) - LENGTH, (WINDOWS,), generator=generator)
        found.append(torch.stack([stream[int(s) : int(s) + LENGTH] for s in starts]))
    return found[0], found[1]


def measured(model: nn.Module, prepared: Prepared, seed: int, groups: int) -> dict[str, float]:
    """KL of each variant on text apart, nats a token."""
    calibration, apart = texts(prepared, seed)
    batches = [{"input_ids": rows} for rows in apart.split(8)]
    found = {}
    for name, options in VARIANTS.items():
        asked = ("mha-to-gqa", {"groups": groups, "seed": seed, **options})
        program = ftc.rewrite(model, [asked], example={"input_ids": calibration[:2, :12]}, calibration=calibration)
        found[name] = kl_divergence(model, program, batches)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--work", type=Path, default=Path("build/mha_to_gqa"))
    parser.add_argument("--json-out")
    parser.add_argument("--fail", action="store_true", help="exit with 1 where a number is not met")
    args = parser.parse_args()
    model, prepared, nats = trained(args.work, args.steps)
    seeds, rows, result = [int(s) for s in args.seeds.split(",")], [], {"validation_nats": nats, "steps": args.steps}
    for groups in (4, 2):
        ratio = f"8:{groups}"
        runs = [measured(model, prepared, seed, groups) for seed in seeds]
        kl = {name: mean(run[name] for run in runs) for name in VARIANTS}
        share = kl["aligned, similar heads"] / kl["mean pooling"]
        rows += [(f"{ratio}, {name}: KL, nats a token", f"{value:.4f}", "", None) for name, value in kl.items()]
        rows.append((f"{ratio}, aligned over mean pooling", f"{share:.3f}", f"at most {ASKED}, aim {AIM}", share <= ASKED))
        result[ratio] = {"kl": kl, "runs": runs, "ratio": share, "aim_met": share <= AIM}
    finish("mha_to_gqa", rows, result, fail=args.fail, json_out=args.json_out)


if __name__ == "__main__":
    main()
