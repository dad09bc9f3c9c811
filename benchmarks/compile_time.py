"""Compiling a model of 24 equal blocks: `program.compile()` against torch.compile of the model and of each block.

    .venv/bin/python benchmarks/compile_time.py [--blocks 24] [--width 512] [--rounds 5] [--json-out FILE]

Cold: seconds of a fresh process with an empty Inductor cache and caches off, from the eager model to the end of the first
call (forward; with --train also backward). For the program that includes the capture. Warm: a step of the compiled program over
a step of the compiled model, in one process, in turns.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time

import torch
from measure import compare, finish

COLD_RATIO, BLOCKS_RATIO, WARM_RATIO = 0.4, 1.1, 1.05
WAYS = ("model", "blocks", "program")


def llama(blocks: int, width: int):
    """A Llama of transformers with random weights, in eval mode."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = dict(hidden_size=width, intermediate_size=3 * width, num_hidden_layers=blocks, vocab_size=1024)
    config = LlamaConfig(**sizes, num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=512)
    return LlamaForCausalLM(config).eval()


def step(model, ids: torch.Tensor, train: bool, **inputs):
    """One forward, and one backward with `train`."""
    with torch.set_grad_enabled(train):
        logits = model(input_ids=ids, **inputs).logits
        if train:
            logits.float().logsumexp(-1).mean().backward()
    return logits


def compiled(model, way: str, ids: torch.Tensor):
    """The model compiled in one of WAYS, and what its calls need besides the ids."""
    import ftc

    if way == "program":
        return ftc.capture(model, {"input_ids": ids}).compile(), {}
    if way == "model":
        return torch.compile(model), {"use_cache": False}
    for block in model.model.layers:
        block.compile()
    return model, {"use_cache": False}


def cold(args: argparse.Namespace) -> None:
    """What the fresh process does: print the seconds of one way."""
    import torch._inductor.compile_fx  # noqa: F401

    import ftc.capture.program  # noqa: F401  imports are not counted for any way

    torch.set_num_threads(args.threads)
    torch.compiler.config.force_disable_caches = True
    model, ids = llama(args.blocks, args.width), torch.randint(1024, (2, args.tokens))
    step(model, ids, args.train, use_cache=False)
    start, before = time.perf_counter(), sum(os.times()[:4])
    fast, inputs = compiled(model, args.cold, ids)
    step(fast, ids, args.train, **inputs)
    wall, cpu = time.perf_counter() - start, sum(os.times()[:4]) - before
    frames = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    print(json.dumps({"seconds": wall, "cpu_seconds": cpu, "frames": frames}))


def cold_seconds(args: argparse.Namespace, way: str, train: bool) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--cold", way, "--blocks", args.blocks, "--width", args.width]
        command += ["--tokens", args.tokens, "--threads", args.threads, *(["--train"] if train else [])]
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": folder, "OMP_NUM_THREADS": str(args.threads)}
        done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"compiling the {way} failed:\n{done.stdout}{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", type=int, default=24)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5, help="of the cold measurements")
    parser.add_argument("--warm-rounds", type=int, default=20)
    parser.add_argument("--skip-warm", action="store_true")
    parser.add_argument("--train", action="store_true", help="cold: forward and backward")
    parser.add_argument("--cold", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--json-out", help="also write the line of JSON to this file")
    parser.add_argument("--check", action="store_true", help="exit with code 1 where a number is not met")
    args = parser.parse_args()
    if args.cold:
        return cold(args)
    torch.set_num_threads(args.threads)
    taken: dict[str, list[dict]] = {way: [] for way in WAYS}
    for number in range(args.rounds):
        for way in WAYS if number % 2 == 0 else reversed(WAYS):
            taken[way].append(cold_seconds(args, way, args.train))
    rows, result = [], {k: getattr(args, k) for k in ("blocks", "width", "tokens", "rounds", "train")}
    for way in WAYS:
        seconds = sorted(t["seconds"] for t in taken[way])
        cpu = [t["cpu_seconds"] for t in taken[way]]  # with the compiler's processes; steadier on a busy machine
        result[way] = {"seconds": seconds, "cpu_seconds": cpu, "frames": taken[way][0]["frames"]}
        text = f"{statistics.median(seconds):.1f} s ({seconds[0]:.1f} to {seconds[-1]:.1f}), CPU {statistics.median(cpu):.1f} s, {result[way]['frames']} frames"
        rows.append((f"cold, {way}", text, "", None))
    for other, asked in (("model", COLD_RATIO), ("blocks", BLOCKS_RATIO)):
        ratios = [a["seconds"] / b["seconds"] for a, b in zip(taken["program"], taken[other], strict=True)]
        ratio = result[f"cold_over_{other}"] = statistics.median(ratios)
        text = f"{ratio:.2f}x ({min(ratios):.2f} to {max(ratios):.2f})"
        rows.append((f"cold, program over {other}", text, f"{asked}x", ratio <= asked))
    if not args.skip_warm:
        warm(args, rows, result)
    finish("compile_time", rows, result, args.check, args.json_out)


def warm(args: argparse.Namespace, rows: list, result: dict) -> None:
    ids = torch.randint(1024, (2, args.tokens))
    for train in (False, True):
        torch._dynamo.reset()
        (model, model_inputs), (program, _) = (
            compiled(llama(args.blocks, args.width), w, ids) for w in ("model", "program")
        )

        def baseline(model=model, inputs=model_inputs, train=train):
            return step(model, ids, train, **inputs)

        def candidate(program=program, train=train):
            return step(program, ids, train)

        timing = compare(baseline, candidate, ("model", "program"), args.warm_rounds, warmup=3)
        what = "forward and backward" if train else "forward"
        result[f"warm {what}"] = timing.as_dict()
        rows.append((f"warm {what}, model", str(timing.baseline), "", None))
        text = f"{timing.candidate}, {timing.ratio:.3f}x"
        rows.append((f"warm {what}, program", text, f"{WARM_RATIO}x", timing.ratio <= WARM_RATIO))


if __name__ == "__main__":
    main()
