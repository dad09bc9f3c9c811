"""A training step of ours against torchtitan's own Llama of the same sizes, both by torchtitan's trainer, one process.

    .venv/bin/python benchmarks/training_step.py [--only NAME ...] [--rounds 5] [--json-out FILE]

    overhead       nothing compiled, no pass: what the adapter and the captured program cost
    overhead-512   the same, as wide as the compiled case
    compiled       fuse-qkv, fuse-gate-up, chunk-cross-entropy, compiled by region, against torchtitan's compiled by block

Each side is a process of its own that takes a step when told to; the two take turns. Time is that of `Trainer.train_step`
(forward, backward, clipping, optimizer). Peak memory is by the allocator's own events of a further step: ftc.train.allocator on
CPU, torch.cuda.max_memory_allocated on CUDA.
"""

import argparse
import dataclasses
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from measure import Comparison, Timing, finish, mebibytes

OURS, TITANS = "ftc", "torchtitan"
# multiple_of of torchtitan's Llama is 256: intermediate is 8/3 of the width, rounded up to it.
SMALL = {"width": 256, "intermediate": 768, "layers": 6, "heads": 16, "kv_heads": 16, "vocabulary": 2048}
WIDE = {"width": 512, "intermediate": 1536, "layers": 6, "heads": 8, "kv_heads": 4, "vocabulary": 32000}
FUSED = ["fuse-qkv", "fuse-gate-up", "chunk-cross-entropy"]
# name: (sizes, rows, tokens of a row, passes, compile, (time, its aim, memory))
CASES: dict[str, tuple[dict, int, int, list, bool, tuple]] = {
    "overhead": (SMALL, 4, 512, [], False, (1.02, None, 1.02)),
    "overhead-512": (WIDE, 2, 512, [], False, (1.02, None, 1.02)),
    "compiled": (WIDE, 8, 1024, FUSED, True, (1.0, 0.9, 0.7)),
}


def run_file(case: str, side: str, folder: Path) -> Path:
    """The TOML file of one side."""
    from ftc.train.config import dump_toml

    sizes, rows, length, passes, compiled, _ = CASES[case]
    architecture = {
        "vocab_size": sizes["vocabulary"], "hidden_size": sizes["width"], "intermediate_size": sizes["intermediate"],
        "num_hidden_layers": sizes["layers"], "num_attention_heads": sizes["heads"], "num_key_value_heads": sizes["kv_heads"],
        "head_dim": sizes["width"] // sizes["heads"], "max_position_embeddings": length, "tie_word_embeddings": False,
    }  # fmt: skip
    values: dict[str, Any] = {
        "job": {"dump_folder": str(folder / side)},
        "model": {"name": OURS, "flavor": "tiny"} if side == OURS else {"name": "llama3", "flavor": "benchmark"},
        "training": {"steps": 10_000, "local_batch_size": rows, "seq_len": length, "mixed_precision_param": "float32"},
        "compile": {"enable": compiled},
        "comm": {"trace_buf_size": 0},
        "metrics": {"log_freq": 10_000},
        "debug": {"seed": 0},
    }
    if side == OURS:
        values["model"]["converters"] = [OURS]
        values["ftc"] = {"architecture": architecture, "passes": passes}
    path = folder / f"{side}.toml"
    path.write_text(dump_toml(values))
    return path


class _NoData:
    """In place of tokenizer, data and loader: the batches are made here."""

    def __init__(self, vocab_size: int):
        self.vocab_size, self.bos_id, self.eos_id = vocab_size, None, None
        self.tokenizer, self.sources = self, ()
        self.mixture, self.seq_len, self.num_samples = self, 0, 0

    def state_dict(self) -> dict:
        return {}

    def close(self) -> None:
        pass


def build(case: str, side: str, path: Path) -> Any:
    """A trainer for one side, without data: ours, or torchtitan's as it is."""
    from ftc.train.trainer import load_config, set_single_process_environment

    set_single_process_environment()
    job_config = load_config([f"--job.config_file={path}"])
    from torchtitan.models import llama3
    from torchtitan.protocols import train_spec as specs
    from torchtitan.train import Trainer as TitansTrainer

    from ftc.train import adapter
    from ftc.train.loop import Trainer

    sizes, *_ = CASES[case]
    nothing = _NoData(sizes["vocabulary"])
    adapter.prepared_data = lambda job_config: nothing
    llama3.llama3_args["benchmark"] = llama3.TransformerModelArgs(
        dim=sizes["width"], n_layers=sizes["layers"], n_heads=sizes["heads"], n_kv_heads=sizes["kv_heads"],
        vocab_size=sizes["vocabulary"],
    )  # fmt: skip
    spec = adapter.train_spec() if side == OURS else llama3.get_train_spec()
    no_data = {"build_tokenizer_fn": None, "build_dataloader_fn": lambda **_: nothing}
    specs._extra_train_specs[job_config.model.name] = dataclasses.replace(spec, **no_data)
    return (Trainer if side == OURS else TitansTrainer)(job_config)


def work(case: str, side: str, path: str) -> None:
    """Answer "step" with seconds by the clock and of the CPU, "peak" with bytes, a line each, until the input ends."""
    trainer = build(case, side, Path(path))
    sizes, rows, length, *_ = CASES[case]
    with_labels = side == OURS and adapter_objective(trainer).with_labels
    generator = torch.Generator().manual_seed(0)

    def batches():
        while True:
            ids_BT = torch.randint(sizes["vocabulary"], (rows, length + 1), generator=generator)
            labels_BT = ids_BT[:, 1:].contiguous()
            yield {"input": ids_BT[:, :-1].contiguous(), **({"labels": labels_BT} if with_labels else {})}, labels_BT

    stream = trainer.batch_generator(batches())

    def step() -> None:
        trainer.step += 1
        trainer.train_step(stream)
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    print("ANSWER", json.dumps(sum(p.numel() for p in trainer.model_parts[0].parameters())), flush=True)
    for line in sys.stdin:
        if line.strip() == "peak":
            answer = peak(step)
        else:
            started, worked = time.perf_counter(), time.process_time()
            step()
            answer = [time.perf_counter() - started, time.process_time() - worked]
        print("ANSWER", json.dumps(answer), flush=True)


def adapter_objective(trainer: Any) -> Any:
    from ftc.train.adapter import objective_of

    return objective_of(trainer.job_config)


def peak(step: Any) -> int:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated()
    from ftc.train.allocator import step_peaks

    return step_peaks(step, 1)[0]


class Side:
    """The process of one side."""

    def __init__(self, case: str, side: str, folder: Path):
        self.log = folder / f"{side}.log"
        command = [sys.executable, __file__, "--worker", case, side, str(run_file(case, side, folder))]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True)
        self.num_parameters = self._answer()

    def ask(self, what: str) -> Any:
        self.process.stdin.write(what + "\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        for line in self.process.stdout:
            if line.startswith("ANSWER "):
                return json.loads(line.removeprefix("ANSWER "))
        raise RuntimeError(f"a side stopped:\n{self.log.read_text()[-4000:]}")

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def measure(case: str, rounds: int, steps: int) -> dict[str, Any]:
    """Both sides in turns: seconds of `steps` steps a round, and the peak of one more step."""
    with tempfile.TemporaryDirectory() as folder:
        sides = {side: Side(case, side, Path(folder)) for side in (TITANS, OURS)}
        if sides[TITANS].num_parameters != sides[OURS].num_parameters:
            raise RuntimeError(f"the sides differ in size: {({s: v.num_parameters for s, v in sides.items()})} parameters")
        first = {name: side.ask("step") for name, side in sides.items()}
        for side in sides.values():
            side.ask("step")
        taken: dict[str, list[list[float]]] = {name: [] for name in sides}
        for number in range(rounds):
            for name in (TITANS, OURS) if number % 2 == 0 else (OURS, TITANS):
                parts = zip(*(sides[name].ask("step") for _ in range(steps)), strict=True)
                taken[name].append([sum(part) / steps for part in parts])
        peaks = {name: side.ask("peak") for name, side in sides.items()}
        for side in sides.values():
            side.close()
    clock, cpu = (Comparison(*(Timing(n, tuple(t[i] for t in taken[n])) for n in (TITANS, OURS))) for i in (0, 1))
    found = {"time": clock.as_dict(), "cpu_time": cpu.as_dict(), "peak_bytes": peaks, "peak_ratio": peaks[OURS] / peaks[TITANS], "first_step_s": first}
    return found | {"parameters": sides[OURS].num_parameters}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3, help="steps of a round; 1 where a step takes long")
    parser.add_argument("--json-out", help="write the JSON line to this file too")
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return work(*args.worker)
    rows, result = [], {}
    for case in args.only:
        sizes, batch, length, passes, compiled, (slower, aim, larger) = CASES[case]
        steps = 1 if compiled else args.steps
        found = measure(case, args.rounds, steps)
        result[case] = {"sizes": sizes, "tokens": batch * length, "passes": passes, "steps_per_round": steps, **found}
        time_, peaks = found["time"], found["peak_bytes"]
        seconds = f"{time_[OURS]['median_s']:.3f} s / {time_[TITANS]['median_s']:.3f} s"
        aimed = f" (aim {aim:.2f}x)" if aim else ""
        rows += [
            (f"{case}: time of a step", f"{time_['ratio']:.3f}x ({time_['ratio_min']:.3f} to {time_['ratio_max']:.3f}), {seconds}",
             f"{slower:.2f}x{aimed}", time_["ratio"] <= slower),
            (f"{case}: CPU time of a step, which work beside it disturbs less",
             f"{found['cpu_time']['ratio']:.3f}x ({found['cpu_time']['ratio_min']:.3f} to {found['cpu_time']['ratio_max']:.3f})", "", None),
            (f"{case}: peak memory", f"{found['peak_ratio']:.3f}x, {mebibytes(peaks[OURS])} / {mebibytes(peaks[TITANS])}",
             f"{larger:.2f}x", found["peak_ratio"] <= larger),
        ]  # fmt: skip
    finish("training_step", rows, result, json_out=args.json_out)


if __name__ == "__main__":
    main()
