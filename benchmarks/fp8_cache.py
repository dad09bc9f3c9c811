"""What rounding a cache loses on stories260k: FP8 latents against bfloat16 ones, and FP8 or INT8 keys and values, in KL(original || cached) a token.

    .venv/bin/python benchmarks/fp8_cache.py [--data ../shared/data] [--share 0.5] [--pairs 3] [--check] [--json-out FILE]

The model is converted with gqa-to-mla{cache=0.5}, calibrated on 24 x 160 tokens that it samples itself at temperature 1; the KL is over another 24 x 160,
of other seeds. Every text goes through prefill (32 tokens) and then token by token, so that all but the tokens of one call are read from the cache.
"""

import argparse
import copy
from pathlib import Path

import torch
from measure import finish
from torch import Tensor

LIMIT = 0.002
TEXTS, TOKENS, PREFILL, BOS = 24, 160, 32, 1


def original(data: str):
    from ftc.models.checkpoints import load_llama2c

    return load_llama2c(Path(data) / "stories260k" / "checkpoint.bin")


@torch.no_grad()
def sampled(model, seed: int) -> Tensor:
    """int64 [24, 160]: the model's own text at temperature 1."""
    from ftc.cache import PagedCache

    program = with_cache(model, "model")
    cache, generator = PagedCache(program, TEXTS * (TOKENS // 16 + 1)), torch.Generator().manual_seed(seed)
    sequences = [cache.add() for _ in range(TEXTS)]
    ids = torch.full((TEXTS, 1), BOS)
    while ids.shape[1] < TOKENS:
        logits = cache.forward({s: ids[row, -1:] for row, s in enumerate(sequences)})
        probabilities = torch.softmax(torch.stack([logits[s][-1] for s in sequences]).double(), -1)
        ids = torch.cat([ids, torch.multinomial(probabilities, 1, generator=generator)], 1)
    return ids


def with_cache(model, dtype: str):
    """The model or program with a cache, each rewrite proved."""
    import ftc

    example = {"input_ids": torch.ones(2, 12, dtype=torch.int64)} if not hasattr(model, "fork") else None
    return ftc.rewrite(model, [("insert-kv-cache", {"dtype": dtype}), ("absorb-mla", {"up_to": 1, "expect": "any"})], example=example).eval()


@torch.no_grad()
def cached_logits(program, ids: Tensor, stored: torch.dtype | None = None) -> Tensor:
    """Logits [N, T, V] through prefill and decode; `stored` puts the cache's floating tensors into another dtype."""
    from ftc.cache import PagedCache

    cache = PagedCache(program, len(ids) * (ids.shape[1] // 16 + 1))
    if stored is not None:
        for host in cache._hosts:
            host.state = {name: t.to(stored) if t.is_floating_point() else t for name, t in host.state.items()}
    sequences = [cache.add() for _ in ids]
    parts = [ids[:, :PREFILL], *ids[:, PREFILL:].split(1, 1)]
    found = []
    for part in parts:
        logits = cache.forward(dict(zip(sequences, part, strict=True)))
        found.append(torch.stack([logits[s] for s in sequences]))
    return torch.cat(found, 1)


def kl(expected: Tensor, found: Tensor) -> float:
    """KL(expected || found) in nats, the mean over tokens."""
    ours, theirs = (torch.log_softmax(x.double(), -1) for x in (expected, found))
    return float((ours.exp() * (ours - theirs)).sum(-1).mean())


def pair(model, seed: int, share: float) -> dict[str, float]:
    """KL of every cache to the original, calibrated and measured on texts of this pair of seeds."""
    import ftc

    calibration, evaluation = sampled(model, 2 * seed + 1), sampled(model, 2 * seed + 2)
    with torch.no_grad():
        expected = model(input_ids=evaluation)
        example = {"input_ids": calibration[:2, :12]}
        converted = ftc.rewrite(copy.deepcopy(model), [("gqa-to-mla", {"cache": share})], example=example, calibration=calibration).eval()
        uncached = kl(expected, converted(input_ids=evaluation))
    plain, keys = with_cache(converted, "model"), with_cache(model, "model")
    caches = {
        "latents, float32": (plain, None),
        "latents, bfloat16": (plain, torch.bfloat16),
        "latents, FP8": (with_cache(converted, "fp8"), None),
        "keys and values, float32": (keys, None),
        "keys and values, bfloat16": (keys, torch.bfloat16),
        "keys and values, FP8": (with_cache(model, "fp8"), None),
        "keys and values, INT8": (with_cache(model, "int8"), None),
    }
    return {"latents, no cache": uncached} | {name: kl(expected, cached_logits(p, evaluation, d)) for name, (p, d) in caches.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default=str(Path(__file__).resolve().parents[2] / "shared" / "data"))
    parser.add_argument("--share", type=float, default=0.5, help="of the cache, as gqa-to-mla's option `cache`")
    parser.add_argument("--pairs", type=int, default=3, help="pairs of seeds")
    parser.add_argument("--check", action="store_true", help="exit with code 1 where a number is not met")
    parser.add_argument("--json-out", help="also write the line of JSON to this file")
    args = parser.parse_args()
    model = original(args.data).eval()
    pairs = [pair(model, seed, args.share) for seed in range(args.pairs)]
    mean = {name: sum(p[name] for p in pairs) / len(pairs) for name in pairs[0]}
    more = {
        "FP8 latents": [p["latents, FP8"] - p["latents, bfloat16"] for p in pairs],
        "FP8 keys and values": [p["keys and values, FP8"] - p["keys and values, bfloat16"] for p in pairs],
        "INT8 keys and values": [p["keys and values, INT8"] - p["keys and values, bfloat16"] for p in pairs],
    }
    rows = [(name, f"{value:.6f} nats a token", "", None) for name, value in mean.items()]
    for name, values in more.items():
        worst = max(values)
        asked = name == "FP8 latents"
        said = f"{sum(values) / len(values):+.6f} more than bfloat16 (at most {worst:+.6f})"
        rows.append((name, said, f"at most {LIMIT} more" if asked else "", worst <= LIMIT if asked else None))
    finish("fp8_cache", rows, {"share": args.share, "texts": TEXTS, "tokens": TOKENS, "mean": mean, "more_than_bfloat16": more, "pairs": pairs}, args.check, args.json_out)


if __name__ == "__main__":
    main()
