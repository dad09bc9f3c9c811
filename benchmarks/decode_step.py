"""A decode step at a long context: absorbed latent attention with a quarter of the cache against the grouped-query model it was made from.

    .venv/bin/python benchmarks/decode_step.py [--context 8192] [--batches 1 4 16] [--rounds 5] [--threads 1] [--json-out FILE]

Both are compiled steps of the whole model (`ftc.cache.CompiledStep`), on caches of the given context filled with random numbers, one token of
each sequence a step. The latent model is the other one after gqa-to-mla at 128 of 512 elements a token and layer (96 latent, 32 with RoPE), calibrated on
random tokens: the weights are random, and the time of a step does not hang on them.
"""

import argparse
import functools

import torch
from ftc.models.decoder import Decoder, DecoderConfig
from measure import compare, finish, timing_options

import ftc
from ftc.cache import CompiledStep, PagedCache

ASKED, AIM = 1.0, 0.5
BLOCK, STEPS = 16, 4
RANK, ROPE = 96, 32


def decoder(layers: int, context: int) -> Decoder:
    torch.manual_seed(0)
    config = DecoderConfig(
        vocab_size=512,
        hidden_size=512,
        intermediate_size=1376,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        max_position_embeddings=2 * context,
    )
    return Decoder(config).eval()


def programs(layers: int, context: int) -> dict[str, ftc.capture]:
    """The two models, each with a cache."""
    model, generator = decoder(layers, context), torch.Generator().manual_seed(0)
    example = {"input_ids": torch.randint(0, 512, (2, 12), generator=generator)}
    texts = [torch.randint(0, 512, (64,), generator=generator) for _ in range(64)]
    latent = ftc.rewrite(model, [("gqa-to-mla", {"rank": RANK, "rope": ROPE})], example=example, calibration=texts)
    fused = [("fuse-qkv", {"expect": "any"}), ("fuse-gate-up", {"expect": "any"})]
    return {
        "grouped-query": ftc.rewrite(model, [*fused, "insert-kv-cache"], example=example),
        "latent, absorbed": ftc.rewrite(latent, [fused[1], "insert-kv-cache", ("absorb-mla", {"up_to": 1})]),
    }


def step_of(program, batch: int, context: int, steps: int) -> CompiledStep:
    """A compiled step whose sequences all hold `context` tokens of random numbers, with room for `steps` more."""
    columns = -(-(context + steps) // BLOCK)
    cache = PagedCache(program, batch * columns + 1)
    for tensor in cache.tensors().values():
        tensor.normal_(generator=torch.Generator().manual_seed(1))
    sequences = [cache.add() for _ in range(batch)]
    cache.reserve(dict.fromkeys(sequences, context + steps))
    step = CompiledStep(cache, batch, 1, columns)
    for row, sequence in enumerate(sequences):
        cache.lengths[sequence] = context
        step.join(row, sequence)
    return step


def run(step: CompiledStep, context: int) -> None:
    """STEPS steps from the same place each time."""
    for row, sequence in enumerate(step.rows):
        step.cache.lengths[sequence] = context
        step.join(row, sequence)
    for _ in range(STEPS):
        step.follow()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--context", type=int, default=8192)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--layers", type=int, default=2)
    timing_options(parser)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    made = programs(args.layers, args.context)
    rows, result = [], {"context": args.context, "layers": args.layers, "batches": {}}
    for batch in args.batches:
        torch._dynamo.reset()
        steps = {name: step_of(program, batch, args.context, STEPS + 1) for name, program in made.items()}
        for step in steps.values():
            step.forward([1] * batch)
        calls = [functools.partial(run, step, args.context) for step in steps.values()]
        timing = compare(*calls, tuple(steps), args.rounds)
        sizes = {name: step.cache.bytes_per_token for name, step in steps.items()}
        milliseconds = [t.median / STEPS * 1e3 for t in (timing.baseline, timing.candidate)]
        rows.append((f"{batch} sequences, grouped-query", f"{milliseconds[0]:.2f} ms a step", "", None))
        rows.append((f"{batch} sequences, latent", f"{milliseconds[1]:.2f} ms a step, {timing.ratio:.2f}x", f"{ASKED}x", timing.ratio <= ASKED))
        result["batches"][batch] = timing.as_dict() | {"ms": milliseconds, "bytes_per_token": sizes}
        del steps, calls
    finish("decode_step", rows, result | {"asked": ASKED, "aim": AIM}, args.check, args.json_out)


if __name__ == "__main__":
    main()
