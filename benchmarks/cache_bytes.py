"""Bytes that caches of one layer take at DeepSeek-V3's attention sizes, as allocated: keys and values of every head, latents, and FP8 latents.

    .venv/bin/python benchmarks/cache_bytes.py [--blocks 64] [--block-size 64] [--check] [--json-out FILE]

Each row captures a decoder of one layer (a narrow residual stream: no cache hangs on it), rewrites it with insert-kv-cache and makes the cache. Measured
is what torch's CPU allocator hands out meanwhile, by its own events, over the tokens that the blocks hold; predicted is what ftc.memory reads off the graph.
"""

import argparse

import torch
from measure import finish

HEADS, WIDTH, ROPE = 128, 128, 64
ASKED = {"MLA 512 + 64": 56.9, "MLA 448 + 64": 64.0, "MLA 512 + 64, FP8": 99.9}


def one_layer(latent: int | None):
    """A decoder of one layer in bfloat16 with 128 heads of 128, or a latent of so many elements and 64 with RoPE."""
    from ftc.models.decoder import Decoder
    from ftc.models.mla import LatentConfig
    from ftc.models.presets import preset

    sizes = {"num_hidden_layers": 1, "num_attention_heads": HEADS, "num_key_value_heads": HEADS, "head_dim": WIDTH}
    if latent is not None:
        sizes |= {"head_dim": ROPE, "latent": LatentConfig(latent, WIDTH, ROPE, WIDTH, q_lora_rank=32)}
    return Decoder(preset("tiny", **sizes)).to(torch.bfloat16).eval()


def measured(latent: int | None, form: str, blocks: int, block_size: int) -> dict:
    """Bytes allocated for the cache, those of its tensors, and both over its tokens; and the prediction for a token."""
    from ftc.cache import PagedCache
    from ftc.memory import Plan
    from ftc.memory.layers import layers_of
    from ftc.memory.predict import with_cache
    from ftc.train.allocator import allocator_events, peak_bytes

    program, before = with_cache(one_layer(latent), Plan(block_size=block_size), form)
    (layer,) = layers_of(program, before)
    cache, events = allocator_events(lambda: PagedCache(program, blocks))
    tokens = blocks * block_size
    storages = sum(t.untyped_storage().nbytes() for t in cache.tensors().values())
    return {"allocated": peak_bytes(events), "storages": storages, "tokens": tokens, "predicted_bytes_per_token": layer.bytes_per_token(form)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", type=int, default=64)
    parser.add_argument("--block-size", type=int, default=64)
    parser.add_argument("--check", action="store_true", help="exit with code 1 where a number is not met")
    parser.add_argument("--json-out", help="also write the line of JSON to this file")
    args = parser.parse_args()
    runs = {
        "MHA 128 x (128 + 128)": (None, "model"), "MLA 512 + 64": (512, "model"), "MLA 448 + 64": (448, "model"), "MLA 512 + 64, FP8": (512, "fp8"),
    }  # fmt: skip
    rows, found = [], {}
    for name, (latent, form) in runs.items():
        found[name] = measured(latent, form, args.blocks, args.block_size)
        each = found[name]
        each["bytes_per_token"] = each["allocated"] / each["tokens"]
        each["below_mha"] = next(iter(found.values()))["allocated"] / each["allocated"]
        error = each["predicted_bytes_per_token"] / each["bytes_per_token"] - 1
        asked = ASKED.get(name)
        said = f"{each['bytes_per_token']:,.0f} bytes a token, {each['below_mha']:.1f}x below MHA; predicted {error:+.2%}"
        met = abs(error) <= 0.01 and (asked is None or round(each["below_mha"], 1) >= asked)
        rows.append((name, said, "within 1%" if asked is None else f"{asked}x, within 1%", met))
    finish("cache_bytes", rows, {"block_size": args.block_size, "blocks": args.blocks, "dtype": "bfloat16", "caches": found}, args.check, args.json_out)


if __name__ == "__main__":
    main()
