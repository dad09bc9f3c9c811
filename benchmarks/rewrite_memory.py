"""Peak resident memory of an in-place rewrite of a model of 4 GiB of float32, loaded from safetensors: `fuse-qkv, fuse-gate-up`, or with `--latent`
`gqa-to-mla` at a quarter of the cache, calibration and all.

    .venv/bin/python benchmarks/rewrite_memory.py [--latent] [--blocks N] [--width 2048] [--json-out FILE]

One process writes the model to a temporary folder, a fresh one loads and rewrites it, and its own highest resident memory is
taken (everything in the process: Python, libraries, the model, the proof of the rewrite). Needs disk space for the model.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time

import torch
from measure import finish

PARAMETER_RATIO, ALLOWANCE = 1.15, 0.7 * 2**30
PASSES = ["fuse-qkv", "fuse-gate-up"]
CONVERSION_RATIO = 1.3  # of the checkpoint, with everything in the process
ROWS, LENGTH = 24, 64  # of calibration text, random ids


def config(args: argparse.Namespace):
    from ftc.models.decoder import DecoderConfig

    return DecoderConfig(
        vocab_size=8192,
        hidden_size=args.width,
        intermediate_size=args.width * 11 // 4,
        num_hidden_layers=args.blocks,
        num_attention_heads=args.width // 64,
        num_key_value_heads=args.width // (256 if args.latent else 64),
        head_dim=64,
        max_position_embeddings=256,
    )


def write(args: argparse.Namespace) -> None:
    """Save a random model to `args.folder`."""
    import ftc.models
    from ftc.models.decoder import Decoder

    with torch.device("meta"):
        model = Decoder(config(args))
    model = model.to_empty(device="cpu")
    for parameter in model.parameters():
        torch.nn.init.uniform_(parameter.detach(), -0.02, 0.02)
    ftc.models.save(model, args.folder)
    print(json.dumps({"bytes": sum(p.numel() * p.element_size() for p in model.parameters())}))


def rewrite(args: argparse.Namespace) -> None:
    """Load, rewrite in place with proof, and print the peaks."""
    import ftc.models

    import ftc

    def peak() -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    torch.set_num_threads(args.threads)
    before = peak()
    model = ftc.models.load(args.folder)
    loaded, start = peak(), time.perf_counter()
    ids = torch.zeros(2, 12, dtype=torch.long)
    passes, calibration = PASSES, None
    if args.latent:
        passes = [("gqa-to-mla", {"cache": 0.25})]
        calibration = torch.randint(0, 8192, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
    program = ftc.rewrite(model, passes, example={"input_ids": ids}, inplace=True, calibration=calibration)
    seconds = time.perf_counter() - start
    matches = {name: entry["matches"] for name, entry in program.report.as_dict()["passes"].items()}
    print(json.dumps({"imports": before, "loaded": loaded, "peak": peak(), "seconds": seconds, "matches": matches}))


def child(action: str, folder: str, args: argparse.Namespace) -> dict:
    command = [sys.executable, __file__, "--action", action, "--folder", folder]
    command += ["--latent"] if args.latent else []
    command += ["--blocks", str(args.blocks), "--width", str(args.width), "--threads", str(args.threads)]
    done = subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": str(args.threads)}, capture_output=True, text=True
    )
    if done.returncode != 0:
        raise RuntimeError(f"{action} failed:\n{done.stdout}{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--latent", action="store_true", help="convert to latent attention in place of fusing")
    parser.add_argument("--blocks", type=int, help="20, with --latent 24")
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--directory", help="where the temporary folder goes")
    parser.add_argument("--action", choices=("write", "rewrite"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    parser.add_argument("--json-out", help="also write the line of JSON to this file")
    parser.add_argument("--check", action="store_true", help="exit with code 1 where a number is not met")
    args = parser.parse_args()
    args.blocks = args.blocks or (24 if args.latent else 20)
    if args.action:
        return {"write": write, "rewrite": rewrite}[args.action](args)
    with tempfile.TemporaryDirectory(dir=args.directory) as folder:
        free = shutil.disk_usage(folder).free
        if free < 8 * 2**30:
            sys.exit(
                f"{folder} has {free / 2**30:.1f} GiB free; the model needs up to 8 GiB: choose another --directory"
            )
        size = child("write", os.path.join(folder, "model"), args)["bytes"]
        runs = [child("rewrite", os.path.join(folder, "model"), args) for _ in range(args.rounds)]
    worst = max(runs, key=lambda run: run["peak"])
    allowed = CONVERSION_RATIO * size if args.latent else PARAMETER_RATIO * size + ALLOWANCE
    gib = 2**30
    rows = [
        ("parameters", f"{size / gib:.2f} GiB", "", None),
        ("peak after imports", f"{worst['imports'] / gib:.2f} GiB", "", None),
        ("peak after loading", f"{worst['loaded'] / gib:.2f} GiB", "", None),
        (
            "peak after the rewrite",
            f"{worst['peak'] / gib:.2f} GiB",
            f"{allowed / gib:.2f} GiB",
            worst["peak"] <= allowed,
        ),
        (
            "matches",
            str(worst["matches"]),
            f"{args.blocks} each",
            all(n == args.blocks for n in (worst["matches"][p] for p in (["gqa-to-mla"] if args.latent else PASSES))),
        ),
        ("seconds", f"{worst['seconds']:.1f}", "", None),
    ]
    result = {
        "blocks": args.blocks,
        "width": args.width,
        "parameter_bytes": size,
        "allowed_bytes": int(allowed),
        "runs": runs,
    }
    finish("conversion_memory" if args.latent else "rewrite_memory", rows, result, args.check, args.json_out)


if __name__ == "__main__":
    main()
