"""Peak memory that `ftc train --dry-run` estimates against what torch's CPU allocator hands out in the run, on 1 and 2 ranks.

    .venv/bin/python benchmarks/dry_run_memory.py [--only NAME ...] [--json-out FILE]

Each configuration trains six steps in fresh processes under gloo. Measured is the lowest peak of steps 2 to 6 on the rank that the estimate
is of (0, but in pipelines), by the allocator's own events (ftc.train.allocator); the highest stands beside it. All these steps do the same, but where one of gloo's
threads happens to release a buffer last, the profiler does not see it.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

from measure import finish, mebibytes

LIMIT = 0.05
STEPS = 6  # all but the first do the same; what gloo's threads release is not recorded, which only adds
FUSED = ["raise", "fuse-qkv", "fuse-gate-up"]
CHUNKED = {"ftc.passes": [*FUSED, "chunk-cross-entropy"]}


def pipeline(schedule: str, *bounds: int) -> dict:
    return {"parallelism.pipeline_parallel_degree": 2, "parallelism.pipeline_parallel_schedule": schedule, "ftc.pipeline_bounds": list(bounds)}


# name: (ranks, changes)
RUNS = {
    "plain": (1, {}),
    "recomputation": (1, {"activation_checkpoint.mode": "full"}),
    "fused, chunked cross-entropy": (1, CHUNKED),
    "accumulation": (1, {"training.global_batch_size": 8}),
    "bfloat16 (autocast)": (1, {"training.mixed_precision_param": "bfloat16"}),
    "muon": (1, {"ftc.optimizer": "muon"}),
    "FSDP2": (2, {}),
    "FSDP2, recomputation": (2, {"activation_checkpoint.mode": "full"}),
    "FSDP2, keeping products": (
        2, {"activation_checkpoint.mode": "selective", "activation_checkpoint.selective_ac_option": "op"},
    ),
    "FSDP2, fused, chunked cross-entropy": (2, CHUNKED),
    "FSDP2, accumulation": (2, {"training.global_batch_size": 16}),
    "FSDP2, bfloat16": (2, {"training.mixed_precision_param": "bfloat16"}),
    "FSDP2, bfloat16, all of these": (
        2,
        {"training.mixed_precision_param": "bfloat16", "activation_checkpoint.mode": "full", **CHUNKED,
         "training.global_batch_size": 16},
    ),
    "pipeline, 1F1B": (2, pipeline("1F1B", 2)),
    "pipeline, ZBV, bfloat16": (2, {**pipeline("ZBVZeroBubble", 1, 2, 3), "training.mixed_precision_param": "bfloat16"}),
    "pipeline, DualPipe, recomputation": (2, {**pipeline("DualPipe", 2), "activation_checkpoint.mode": "full"}),
    "replicas": (2, {"parallelism.data_parallel_replicate_degree": 2, "parallelism.data_parallel_shard_degree": 1}),
}  # fmt: skip


def tables(changes: dict, data: str, vocabulary: int) -> dict:
    from ftc.train.launch import resolve

    values = {
        "model": {"name": "ftc", "flavor": "quickstart"},
        "ftc": {"data": data, "vocab_size": vocabulary, "architecture": {"num_hidden_layers": 4}},
        "training": {"steps": STEPS, "local_batch_size": 4, "seq_len": 256, "mixed_precision_param": "float32"},
        "metrics": {"log_freq": 1},
        "lr_scheduler": {"warmup_steps": 1},
        "comm": {"trace_buf_size": 0},
        "debug": {"seed": 1},
    }
    return resolve(values, changes)


def measure_rank(path: str) -> None:
    """Train the steps as this process's rank, and print the peak of each."""
    from ftc.train.allocator import step_peaks
    from ftc.train.loop import running
    from ftc.train.trainer import load_config

    with running(load_config([f"--job.config_file={path}"])) as trainer:
        batches = trainer.batch_generator(trainer.dataloader)

        def step() -> None:
            trainer.step += 1
            trainer.train_step(batches)

        peaks = step_peaks(step, STEPS)
    print(json.dumps(peaks), flush=True)


def measured(path: Path, ranks: int, which: int) -> list[int]:
    """The peaks of rank `which`, of every step but the first."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    processes = []
    for rank in range(ranks):
        environment = os.environ | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
        environment |= {"LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        command = [sys.executable, __file__, "--rank-of", str(path)]
        processes.append(
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        )
    outputs = [process.communicate() for process in processes]
    for process, (_, errors) in zip(processes, outputs, strict=True):
        if process.returncode:
            raise RuntimeError(f"{path} failed:\n{errors[-3000:]}")
    return json.loads(outputs[which][0].splitlines()[-1])[1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", help="names of configurations")
    parser.add_argument("--data", default="stdlib")
    parser.add_argument("--vocabulary", type=int, default=2048, help="of the tokenizer, which the text must fill")
    parser.add_argument("--rank-of", help=argparse.SUPPRESS)
    parser.add_argument("--json-out", help="also write the line of JSON to this file")
    parser.add_argument("--check", action="store_true", help="exit with code 1 where a number is not met")
    args = parser.parse_args()
    if args.rank_of:
        return measure_rank(args.rank_of)
    from ftc.train.config import dump_toml
    from ftc.train.dry_run import dry_run

    rows, found = [], {}
    with tempfile.TemporaryDirectory() as work:
        for number, (name, (ranks, changes)) in enumerate(RUNS.items()):
            if args.only and name not in args.only:
                continue
            values = tables(changes, args.data, args.vocabulary)
            path = Path(work) / f"{number}.toml"
            # One folder for the tokenized text of all runs.
            path.write_text(dump_toml(values | {"job": {"dump_folder": str(Path(work) / "run")}}))
            estimate = dry_run(values, num_ranks=ranks)
            peaks = measured(path, ranks, estimate.rank)
            real = min(peaks)
            error = estimate.peak_bytes / real - 1
            found[name] = {"ranks": ranks, "estimated": estimate.peak_bytes, "measured": real, "error": error}
            found[name] |= {"measured_steps": peaks}
            found[name] |= {"phase": estimate.peak_phase}
            said = f"{mebibytes(estimate.peak_bytes)} estimated, {mebibytes(real)} measured, {error:+.1%} (highest {mebibytes(max(peaks))})"
            print(name, said, flush=True)
            rows.append((name, said, f"within {LIMIT:.0%}", abs(error) <= LIMIT))
    finish("dry_run_memory", rows, {"limit": LIMIT, "runs": found}, args.check, args.json_out)


if __name__ == "__main__":
    main()
