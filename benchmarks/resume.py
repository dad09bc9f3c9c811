"""A run that lost a process, and a run that goes on with another number of processes, against the uninterrupted one.

    .venv/bin/python benchmarks/resume.py [--steps 60] [--kills 3] [--json-out FILE]

Each run is `ftc train --nproc 2` on the standard library's source with a checkpoint every 20 steps, written asynchronously. "kill" sends
SIGKILL to one of the two ranks some steps after a checkpoint and lets the run end by itself; then losses and all final weights
must have the same bits. "on n" continues from the checkpoint of step 20 on n ranks; the losses of the next 20 steps are compared.
"""

import argparse
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from measure import finish
from safetensors.torch import load_file

ASKED_SECONDS, ASKED_LOSS = 30.0, 1e-5
INTERVAL = 20
RUN = f"""
[model]
flavor = "quickstart"
[ftc]
vocab_size = 512
validate = false
architecture = {{ hidden_size = 64, intermediate_size = 176, num_hidden_layers = 2, num_attention_heads = 4, head_dim = 16 }}
[training]
steps = STEPS
local_batch_size = 2
global_batch_size = 8
seq_len = 128
mixed_precision_param = "float32"
[metrics]
log_freq = 1
[lr_scheduler]
warmup_steps = 5
[checkpoint]
enable = true
interval = {INTERVAL}
keep_latest_k = 0
last_save_model_only = false
async_mode = "async"
[comm]
trace_buf_size = 0
[debug]
seed = 1
"""


def start(run: Path, out: Path, ranks: int) -> subprocess.Popen:
    log = out.with_suffix(".out").open("w")
    command = [sys.executable, "-m", "ftc", "train", str(run), "--out", str(out), "--nproc", str(ranks)]
    return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)


def end(process: subprocess.Popen, out: Path) -> None:
    if process.wait():
        raise RuntimeError(f"the run in {out} ended with exit code {process.returncode}:\n{out.with_suffix('.out').read_text()[-2000:]}")


def losses(out: Path) -> dict[int, float]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines() if line.endswith("}")]
    return {row["step"]: row["loss"] for row in rows}


def last_step(out: Path) -> int:
    try:
        return max(losses(out), default=0)
    except (OSError, ValueError):
        return 0


def ranks_of(out: Path) -> list[int]:
    """Process ids of a run's ranks, the launcher left out."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().decode().split("\0")
        except OSError:
            continue
        if any(word.startswith(str(out)) for word in words) and "ftc.train" in words and "torch.distributed.run" not in words:
            found.append(int(folder.name))
    return sorted(found)


def killed(run: Path, out: Path, after: int) -> float:
    """Seconds from the loss of a rank to the next step; the run goes on to its end."""
    process = start(run, out, 2)
    while last_step(out) < after:
        if process.poll() is not None:
            end(process, out)
            raise RuntimeError(f"the run in {out} ended before step {after}")
        time.sleep(0.02)
    os.kill(ranks_of(out)[-1], signal.SIGKILL)
    lost, log = time.perf_counter(), out / "train.log"
    before = log.read_text().count("Training starts at step")
    while log.read_text().count("Training starts at step") < before + 2 and process.poll() is None:
        time.sleep(0.05)
    seconds = time.perf_counter() - lost
    end(process, out)
    return seconds


def same_bits(a: Path, b: Path) -> bool:
    """Whether two runs ended with the same weights, and had the same loss at every step."""
    files = sorted((a / "model").glob("*.safetensors"))
    weights = [(load_file(file), load_file(b / "model" / file.name)) for file in files]
    equal = all(ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours) for ours, theirs in weights)
    return bool(files) and equal and losses(a) == losses(b)


def continued(run: Path, whole: Path, out: Path, ranks: int) -> float:
    """Largest relative difference of the losses of the INTERVAL steps after the first checkpoint, continued on `ranks`."""
    shutil.copytree(whole, out)
    for folder in (out / "checkpoint").glob("step-*"):
        if folder.name != f"step-{INTERVAL}":
            shutil.rmtree(folder)
    end(start(run, out, ranks), out)
    expected, found = losses(whole), losses(out)
    return max(abs(found[s] - expected[s]) / expected[s] for s in range(INTERVAL + 1, 2 * INTERVAL + 1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--json-out", help="write the JSON line to this file too")
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    chance = random.Random(0)
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run.toml"
        run.write_text(RUN.replace("STEPS", str(args.steps)))
        whole = Path(folder) / "whole"
        end(start(run, whole, 2), whole)
        seconds, equal = [], []
        for number in range(args.kills):
            out = Path(folder) / f"killed{number}"
            after = chance.randrange(INTERVAL + 2, args.steps - 5)
            seconds.append(killed(run, out, after))
            equal.append(same_bits(whole, out))
            print(f"killed after step {after}: again after {seconds[-1]:.1f} s, same bits: {equal[-1]}", flush=True)
        errors = {ranks: continued(run, whole, Path(folder) / f"on{ranks}", ranks) for ranks in (1, 4)}
    spread = f"{statistics.median(seconds):.1f} s ({min(seconds):.1f} to {max(seconds):.1f})"
    rows = [
        ("kill -9 of one of 2 ranks: training again after", spread, f"{ASKED_SECONDS:.0f} s", max(seconds) <= ASKED_SECONDS),
        ("the same: losses and weights", f"same bits {sum(equal)} of {len(equal)}", "same bits", all(equal)),
        *((f"2 ranks, continued on {n}: loss of {INTERVAL} steps", f"{e:.1e}", f"{ASKED_LOSS:.0e}", e <= ASKED_LOSS) for n, e in errors.items()),
    ]
    finish("resume", rows, {"seconds": seconds, "same_bits": equal, "loss_error": errors}, json_out=args.json_out)


if __name__ == "__main__":
    main()
