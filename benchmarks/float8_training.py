"""Training with products in float8 against float32: the same model, text, order and seeds, the loss on held-out text at the end.

    .venv/bin/python benchmarks/float8_training.py [--steps 600] [--seeds 0,1,2] [--ways float32,rowwise~qk,fine~qk] [--runs FILE] [--json-out FILE]

Width 64, 2 layers, vocabulary 1,024, begun as a bigram table (--wide: 128 and 4), on english, french, maths and python of ../shared/data/text, 4 windows of
128 tokens of each in every step; the last tenth of each is held out. Products in float8 are emulated: float8 values, float32 sums. Runs go to the file of
--runs as they end, a line each, and are not repeated; a run that is cut off begins again. The table is made of what is there.

A way is float32, bfloat16 (products in bfloat16, for comparison), or a recipe of the pass float8: "rowwise/float8" is recipe rowwise with save = "float8",
"rowwise~qk" has keep = ["q_proj", "k_proj"]. These models begin with heads that find a distance by the sharp peak of a score: queries and keys read one
constant with large weights, and the 3% by which float8 rounds those move the peak. --drawn-heads begins with queries and keys drawn at random instead.
"""

import argparse
import math
import time
from pathlib import Path
from statistics import mean
from typing import Any

import torch
import torch.nn.functional as F
from measure import finish
from moe_training import DOMAINS, EXAMPLE, Runs, batch, decoder, held_out, logits_of
from torch import nn

import ftc

PEAK_RATE, WARM_UP = 2e-3, 40
SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "head_dim": 16, "intermediate_size": 192}
KEPT = {"qk": ["q_proj", "k_proj"]}
ASKED = 0.0025  # of the float32 loss


def model_of(way: str, seed: int, size: str) -> nn.Module:
    """A fresh model of a seed, its products as `way` says. `size`: "small" or "wide", with " drawn heads" or not."""
    model = decoder("tiny-moe-dense", seed, **({} if size.startswith("wide") else SMALL))
    if size.endswith("drawn heads"):
        with torch.no_grad():
            for name in ("q_proj", "k_proj"):
                weight = getattr(model.layers[0].self_attn, name).weight
                weight.normal_(0.0, 0.5 * weight.shape[1] ** -0.5)  # as initialize_from_bigrams draws those of the other layers
    if way in ("float32", "bfloat16"):
        return ftc.capture(model, EXAMPLE)
    rest, _, kept = way.partition("~")
    recipe, _, save = rest.partition("/")
    options = {"recipe": recipe} | ({"save": save} if save else {}) | ({"keep": KEPT[kept]} if kept else {})
    return ftc.rewrite(model, ["raise", ("float8", options)], example=EXAMPLE)


def learn(way: str, seed: int, steps: int, size: str) -> dict[str, Any]:
    """Train, tell every 50 steps; {"loss": {domain: nats a token}, "train_loss": mean of the last 50 steps, "cpu_s"}."""
    model = model_of(way, seed, size)
    groups = [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=PEAK_RATE, betas=(0.9, 0.95))
    began, losses = time.process_time(), []
    for step in range(steps):
        rate = PEAK_RATE * min(1.0, (step + 1) / WARM_UP) * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * step / steps)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        inputs, labels = batch(step, seed)
        with torch.autocast("cpu", torch.bfloat16, enabled=way == "bfloat16"):
            loss = F.cross_entropy(logits_of(model(input_ids=inputs)).flatten(0, 1).float(), labels.flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        if step % 50 == 49:
            print(f"  {way}, seed {seed}: step {step + 1} of {steps}, loss {mean(losses[-50:]):.4f}, {time.process_time() - began:.0f} CPU s", flush=True)
    return {"steps": steps, "cpu_s": time.process_time() - began, "train_loss": mean(losses[-50:]), "loss": evaluate(model, way)}


@torch.no_grad()
def evaluate(model: nn.Module, way: str) -> dict[str, float]:
    """Nats a token on the held-out windows of each domain, with the products that it was trained with."""
    found = {}
    for domain in DOMAINS:
        rows = held_out(domain)
        with torch.autocast("cpu", torch.bfloat16, enabled=way == "bfloat16"):
            logits = logits_of(model(input_ids=rows[:, :-1]))
        found[domain] = float(F.cross_entropy(logits.flatten(0, 1).float(), rows[:, 1:].flatten()))
    return found


def rows_of(runs: Runs, ways: list[str], seeds: list[int], steps: int, size: str) -> list[tuple]:
    """The table: for each way the mean of the paired differences to float32, over the float32 loss."""
    known = {(way, seed): runs.known.get((way, seed, steps, size)) for way in {"float32", *ways} for seed in seeds}
    rows = []
    for way in ways:
        pairs = [(known[way, s], known["float32", s]) for s in seeds if known[way, s] and known["float32", s]]
        if way == "float32" or not pairs:
            continue
        relative = [mean(a["loss"].values()) / mean(b["loss"].values()) - 1 for a, b in pairs]
        train = mean(a["train_loss"] / b["train_loss"] - 1 for a, b in pairs)
        said = f"{mean(relative):+.3%} ({', '.join(f'{r:+.3%}' for r in relative)}); last 50 training steps {train:+.3%}"
        judged = way not in ("bfloat16",) and len(pairs) == len(seeds)
        rows.append((f"{way}: held-out loss against float32, {len(pairs)} seeds", said, f"within {ASKED:.2%}", abs(mean(relative)) <= ASKED if judged else None))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--ways", default="float32,rowwise~qk,fine~qk")
    parser.add_argument("--wide", action="store_true", help="width 128, 4 layers: three times the time")
    parser.add_argument("--drawn-heads", action="store_true", help="queries and keys of the first layer begin at random")
    parser.add_argument("--runs", type=Path, default=Path("float8_training_runs.jsonl"))
    parser.add_argument("--json-out")
    options = parser.parse_args()
    torch.set_num_threads(1)
    size = ("wide" if options.wide else "small") + (" drawn heads" if options.drawn_heads else "")
    runs, seeds, ways = Runs(options.runs), [int(s) for s in options.seeds.split(",")], options.ways.split(",")
    for seed in seeds:
        for way in ways:
            runs.get((way, seed, options.steps, size), lambda way=way, seed=seed: learn(way, seed, options.steps, size))
    losses = {", ".join(map(str, key)): run["loss"] for key, run in runs.known.items()}
    finish("float8_training", rows_of(runs, ways, seeds, options.steps, size), {"steps": options.steps, "size": size, "seeds": seeds, "losses": losses}, json_out=options.json_out)


if __name__ == "__main__":
    main()
