"""Capture + raise of a model of 32 blocks over one of 4 blocks of the same structure: CPU and wall-clock time, in turns.

.venv/bin/python benchmarks/capture_time.py [--blocks 32] [--widths 64 512] [--rounds 5] [--json-out FILE]
"""

import argparse
import functools
import time

import torch
from ftc.models.decoder import Decoder, DecoderConfig
from measure import compare, finish, timing_options

import ftc

RATIO = 1.3


def decoder(blocks: int, width: int) -> Decoder:
    torch.manual_seed(0)
    config = DecoderConfig(
        vocab_size=512,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=blocks,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=width // 4,
        max_position_embeddings=256,
    )
    return Decoder(config)


def capture_and_raise(model: Decoder) -> float:
    """CPU seconds of the process for capture + raise with certificates."""
    start = time.process_time()
    program = ftc.rewrite(model, ["raise"], example={"input_ids": torch.zeros(2, 12, dtype=torch.long)})
    taken = time.process_time() - start
    assert program.report.as_dict()["passes"]["raise-attention"]["matches"] == len(model.layers)
    return taken


def timed(model: Decoder, cpu_seconds: list[float]) -> None:
    cpu_seconds.append(capture_and_raise(model))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", type=int, default=32)
    parser.add_argument("--few", type=int, default=4)
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 512])
    timing_options(parser)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows, result = [], {"blocks": args.blocks, "few": args.few, "widths": {}}
    for width in args.widths:
        models = {n: decoder(n, width) for n in (args.few, args.blocks)}
        cpu: dict[int, list[float]] = {args.few: [], args.blocks: []}
        few, many = (functools.partial(timed, models[n], cpu[n]) for n in (args.few, args.blocks))
        wall = compare(few, many, (f"{args.few} blocks", f"{args.blocks} blocks"), args.rounds)
        rows.append((f"width {width}: {args.few} blocks", str(wall.baseline), "", None))
        met = wall.ratio <= RATIO
        rows.append((f"width {width}: {args.blocks} blocks", f"{wall.candidate}, {wall.ratio:.2f}x", f"{RATIO}x", met))
        ratios = sorted(b / a for a, b in zip(cpu[args.few][1:], cpu[args.blocks][1:], strict=True))
        result["widths"][width] = {**wall.as_dict(), "cpu_ratio": ratios[len(ratios) // 2]}
    finish("capture_time", rows, result, args.check, args.json_out)


if __name__ == "__main__":
    main()
