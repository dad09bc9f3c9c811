"""Passkey at ten times the trained length: a small decoder trained here at 256 tokens, then `rope-scale` of every type, with and without a tune.

    .venv/bin/python benchmarks/passkey.py [--tune-steps 100] [--types yarn,linear] [--json-out benchmarks/results/passkey.json]

The decoder (two layers of width 64, words and pairs of digits as tokens) is trained from scratch on passkey prompts of 64 to 256 tokens
until it finds the key at 256. Each row is then the program that `rope-scale` makes of it with factor 10, measured on prompts of 2,560
tokens with `ftc.tasks`: five depths, prompts of seeds that training never drew. The tune trains that program, all weights, for a few
steps on prompts of 2,560 tokens; "none" is the model without `rope-scale`, tuned alike.
"""

import argparse
import copy
import re
import time
from dataclasses import replace
from typing import Any

import torch
from ftc.models.decoder import Decoder, DecoderConfig
from measure import finish
from torch import nn
from torch.nn.functional import cross_entropy

import ftc
from ftc.tasks.grid import measure_grid
from ftc.tasks.passkey import FILLER, passkey

TRAINED, TIMES, ASKED = 256, 10, 0.95
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
TUNE_RATE = 5e-4
SEEDS, PROMPTS = (0, 1, 2), 8  # prompts of a seed at each depth: 3 x 8 x 5 = 120
COPYING = (64, 64, 400)  # tokens, texts in a batch, steps
STAGES = ((64, 64, 300), (256, 16, 400))
TYPES: dict[str, dict[str, Any]] = {
    "linear": {},
    "dynamic": {},
    "yarn": {},
    # Divisors as NTK-aware scaling has them: none for the fastest pair, the factor for the slowest, a power between.
    "longrope": {"short_factor": [1.0] * 16, "long_factor": [float(TIMES) ** (i / 15) for i in range(16)]},
    "llama3": {"low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "default": {},
}


class WordTokenizer:
    """Words, punctuation and pairs of digits as tokens: the vocabulary of the passkey prompts; any other word is <eos>."""

    bos_id, eos_id = 0, 1

    def __init__(self):
        texts = "".join(FILLER) + " A number is hidden in this text. Keep it in mind. What is the pass key? The pass key is"
        words = sorted(set(self.pieces(texts)))
        numbers = [f"{n:02d}" for n in range(100)] + [str(n) for n in range(10)]
        self.ids = {piece: number for number, piece in enumerate(["<bos>", "<eos>", *words, *numbers])}
        self.vocab_size = len(self.ids)

    @staticmethod
    def pieces(text: str) -> list[str]:
        return re.findall(r"[A-Za-z]+|\d\d|\d|[^\w\s]", text)

    def encode(self, text: str) -> list[int]:
        return [self.ids.get(piece, self.eos_id) for piece in self.pieces(text)]


def batch_of(tokenizer: WordTokenizer, length: int, count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """ids [B, T] of prompts at random depths, and labels: the answer's tokens alone."""
    seeds = torch.randint(1_000, 2**31, (count,), generator=generator).tolist()  # measuring uses seeds below 1,000
    depths = torch.rand(count, generator=generator).tolist()
    prompts = [passkey(tokenizer, length, depth, seed) for depth, seed in zip(depths, seeds, strict=True)]
    ids_BT = torch.tensor([prompt.ids for prompt in prompts])
    labels_BT = torch.full_like(ids_BT, -100)
    labels_BT[:, -prompts[0].num_answer :] = ids_BT[:, -prompts[0].num_answer :]
    return ids_BT[:, :-1], labels_BT[:, 1:]


def copies(tokenizer: WordTokenizer, length: int, count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """ids [B, T] of random tokens, of which a part comes again from some place on, and labels: what comes again. Teaches to look things up."""
    ids_BT = torch.randint(2, tokenizer.vocab_size, (count, length + 1), generator=generator)
    labels_BT = torch.full_like(ids_BT, -100)
    for row in range(count):
        first = int(torch.randint(length // 4, 3 * length // 4, (), generator=generator))
        start = int(torch.randint(0, first - 7, (), generator=generator))
        size = min(first - start, length + 1 - first)
        ids_BT[row, first : first + size] = ids_BT[row, start : start + size]
        labels_BT[row, first + 1 : first + size] = ids_BT[row, first + 1 : first + size]
    return ids_BT[:, :-1], labels_BT[:, 1:]


def train(model: nn.Module, tokenizer: WordTokenizer, stages, learning_rate: float, seed: int, make=batch_of, shown: bool = False) -> float:
    """Train in place on what `make` makes, passkey prompts; returns the seconds it took."""
    start = time.perf_counter()
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    total = sum(steps for *_, steps in stages)
    done = 0
    model.train()
    for length, count, steps in stages:
        for _ in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * min(1.0, (done + 1) / 20, 1.05 - done / total)
            ids_BT, labels_BT = make(tokenizer, length, count, generator)
            loss = cross_entropy(model(input_ids=ids_BT).flatten(0, 1), labels_BT.flatten())
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            done += 1
            if shown and done % 50 == 0:
                print(f"step {done}: {loss.item():.4f} nats at {length} tokens, {time.perf_counter() - start:.0f} s", flush=True)
    model.eval()
    return time.perf_counter() - start


def accuracy(model: nn.Module, tokenizer: WordTokenizer, length: int, seeds=SEEDS) -> list[float]:
    """The share of keys found for each of `seeds`."""
    results = []
    for seed in seeds:
        drawn = range(seed * PROMPTS, (seed + 1) * PROMPTS)
        grid = measure_grid(
            model, lambda n, d, s: passkey(tokenizer, n, d, s), task="passkey", lengths=[length], depths=DEPTHS, seeds=drawn, batch=4, progress=False
        )
        results.append(grid.accuracy)
    return results


def scaled(model: Decoder, kind: str) -> nn.Module:
    """What `rope-scale` makes of a copy of the model; the copy itself for "none"."""
    model = copy.deepcopy(model)
    if kind == "none":
        model.config = replace(model.config, max_position_embeddings=TRAINED * TIMES)
        return model
    options = {"type": kind, **({} if kind == "default" else {"factor": float(TIMES)}), **TYPES[kind]}
    return ftc.rewrite(model, [("rope-scale", options)], example={"input_ids": torch.zeros(2, 12, dtype=torch.long)})


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", default=",".join(["none", *(name for name in TYPES if name != "default")]))
    parser.add_argument("--tune-steps", type=int, default=100)
    parser.add_argument("--tune-batch", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fail", action="store_true")
    parser.add_argument("--json-out")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(options.seed)
    tokenizer = WordTokenizer()
    sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, head_dim=32)
    model = Decoder(DecoderConfig(vocab_size=tokenizer.vocab_size, max_position_embeddings=TRAINED, **sizes))
    seconds = train(model, tokenizer, [COPYING], 3e-3, options.seed, copies, shown=True)
    seconds += train(model, tokenizer, STAGES, 2e-3, options.seed, shown=True)
    at_trained = accuracy(model, tokenizer, TRAINED)
    print(f"trained in {seconds:.0f} s; passkey at {TRAINED}: {mean(at_trained):.1%}", flush=True)
    length = TRAINED * TIMES
    rows, types = [("trained at 256: passkey at 256", f"{mean(at_trained):.1%}", "", None)], {}
    for kind in options.types.split(","):
        program = scaled(model, kind)
        before = accuracy(program, tokenizer, length)
        spent = train(program, tokenizer, [(length, options.tune_batch, options.tune_steps)], TUNE_RATE, options.seed + 1)
        after, short = accuracy(program, tokenizer, length), accuracy(program, tokenizer, TRAINED)
        types[kind] = {"untuned": before, "tuned": after, "tuned_at_256": short, "tune_s": spent}
        name = "no rope-scale" if kind == "none" else kind
        rows.append((f"{name}: at {length}, untuned", f"{mean(before):.1%} ({min(before):.1%} to {max(before):.1%})", "", None))
        rows.append((f"{name}: at {length}, {options.tune_steps} steps of tuning", f"{mean(after):.1%} ({min(after):.1%} to {max(after):.1%})", "", None))
        print(rows[-2], rows[-1], f"at 256: {mean(short):.1%}, {spent:.0f} s", flush=True)
    best = max((name for name in types if name != "none"), key=lambda name: mean(types[name]["tuned"]))
    reached = mean(types[best]["tuned"])
    rows.append((f"the best type ({best}), tuned", f"{reached:.1%}", f"{ASKED:.0%}", reached >= ASKED))
    result = {
        "length": length,
        "prompts": len(SEEDS) * PROMPTS * len(DEPTHS),
        "at_trained": at_trained,
        "train_s": seconds,
        "stages": [COPYING, *STAGES],
        "tune_steps": options.tune_steps,
        "tune_batch": options.tune_batch,
        "types": types,
        "best": best,
        "best_tuned": reached,
    }
    finish("passkey", rows, result, options.fail, options.json_out)


if __name__ == "__main__":
    main()
