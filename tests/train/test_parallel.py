"""The same step on one process and on several: losses and every gradient agree, whatever is sharded and rewritten."""

import json
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from ftc.train.config import dump_toml

pytest.importorskip("torchtitan")

FUSED = ["raise", "fuse-qkv", "fuse-gate-up"]
CHUNKED = {"ftc.passes": [*FUSED, "chunk-cross-entropy"], "ftc.loss": "model"}
MTP = {"ftc.passes": ["fuse-qkv", {"name": "add-mtp", "depth": 1, "init": "random"}]}
TP, CP = {"parallelism.tensor_parallel_degree": 2}, {"parallelism.context_parallel_degree": 2}
TIED = {"ftc.architecture": {"vocab_size": 320, "tie_word_embeddings": True}}
COMPILED = {"compile.enable": True, "compile.components": ["model"], "compile.backend": "aot_eager"}
# name: (ranks, batch of a rank, changes); every step sees four windows
RUNS = {
    "one": (1, 4, {}),
    "one_accumulating": (1, 1, {"training.global_batch_size": 4}),
    "fsdp_2": (2, 2, {}),
    "fsdp_4": (4, 1, {}),
    "hsdp_2_2": (
        4, 1, {"parallelism.data_parallel_replicate_degree": 2, "parallelism.data_parallel_shard_degree": 2},
    ),
    "replicas_2": (
        2, 2, {"parallelism.data_parallel_replicate_degree": 2, "parallelism.data_parallel_shard_degree": 1},
    ),
    "fsdp_2_accumulating": (2, 1, {"training.global_batch_size": 4}),
    "fsdp_2_recomputing": (2, 2, {"activation_checkpoint.mode": "full"}),
    "fsdp_2_keeping_products": (
        2, 2, {"activation_checkpoint.mode": "selective", "activation_checkpoint.selective_ac_option": "op"},
    ),
    "fused_one": (1, 4, {"ftc.passes": FUSED}),
    "fused_fsdp_2": (2, 2, {"ftc.passes": FUSED}),
    "chunked_one": (1, 4, CHUNKED),
    "chunked_fsdp_2": (2, 2, CHUNKED),
    "tied_one": (1, 4, TIED),
    "tied_fsdp_2": (2, 2, TIED),
    "tp_2": (2, 4, TP),
    "tp_2_whole_vocabulary": (2, 4, {**TP, "parallelism.disable_loss_parallel": True}),
    "tp_2_recomputing": (2, 4, {**TP, "activation_checkpoint.mode": "full"}),
    "tp_2_keeping_products": (
        2, 4, {**TP, "activation_checkpoint.mode": "selective", "activation_checkpoint.selective_ac_option": "op"},
    ),
    "tp_2_compiled": (2, 4, {**TP, **COMPILED}),
    "tp_2_accumulating": (2, 2, {**TP, "training.global_batch_size": 4}),
    "tp_2_fsdp_2": (4, 2, TP),
    "tp_2_replicas_2": (
        4, 2, {**TP, "parallelism.data_parallel_replicate_degree": 2, "parallelism.data_parallel_shard_degree": 1},
    ),
    "tp_2_cp_2": (4, 4, {**TP, **CP}),
    "cp_2": (2, 4, CP),
    "cp_2_in_order": (2, 4, {**CP, "parallelism.context_parallel_load_balancer": "none"}),
    "cp_2_recomputing": (2, 4, {**CP, "activation_checkpoint.mode": "full"}),
    "cp_2_compiled": (2, 4, {**CP, **COMPILED}),
    "cp_2_fsdp_2": (4, 2, CP),
    "fused_tp_2": (2, 4, {**TP, "ftc.passes": FUSED}),
    "fused_tp_4": (4, 4, {"parallelism.tensor_parallel_degree": 4, "ftc.passes": FUSED}),
    "fused_cp_2": (2, 4, {**CP, "ftc.passes": FUSED}),
    "chunked_tp_2": (2, 4, {**TP, **CHUNKED}),
    "chunked_cp_2": (2, 4, {**CP, **CHUNKED}),
    "chunked_cp_2_in_order": (2, 4, {**CP, **CHUNKED, "parallelism.context_parallel_load_balancer": "none"}),
    "chunked_tp_2_fsdp_2": (4, 2, {**TP, **CHUNKED}),
    "chunked_tp_2_cp_2": (4, 4, {**TP, **CP, **CHUNKED}),
    "tied_tp_2_fsdp_2": (4, 2, {**TP, **TIED}),
    "mtp_one": (1, 4, MTP),
    "mtp_fsdp_2": (2, 2, MTP),
    "mtp_tp_2": (2, 4, {**TP, **MTP}),
    "mtp_tp_2_fsdp_2": (4, 2, {**TP, **MTP}),
}  # fmt: skip
PAIRS = [
    *(("one", name) for name in RUNS if name.startswith(("one_", "fsdp", "hsdp", "replicas", "tp", "cp"))),
    *((f"{kind}_one", name) for kind in ("fused", "chunked", "tied", "mtp") for name in RUNS
      if name.startswith(kind) and name != f"{kind}_one"),
]  # fmt: skip


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_file(work: Path, data: Path, name: str) -> str:
    ranks, batch, changes = RUNS[name]
    values = {
        "model": {"name": "ftc", "flavor": "tiny"},
        "ftc": {"data": str(data), "vocab_size": 300, "validation_fraction": 0.3, "architecture": {"vocab_size": 320}},
        "training": {"steps": 2, "local_batch_size": batch, "seq_len": 32, "mixed_precision_param": "float32"},
        "metrics": {"log_freq": 1},
        "lr_scheduler": {"warmup_steps": 1},
        "comm": {"trace_buf_size": 0},
        "debug": {"seed": 1},
    }
    for dotted, value in changes.items():
        section, key = dotted.split(".")
        values.setdefault(section, {})[key] = value
    path = work / f"{name}.toml"
    path.write_text(dump_toml(values))
    return str(path)


def finished(ranks: list[subprocess.Popen], seconds: float) -> list[int]:
    """Exit codes; when one rank fails, or time is over, the others, which would wait for it, are killed."""
    end = time.monotonic() + seconds
    while any(rank.poll() is None for rank in ranks):
        if any(rank.poll() for rank in ranks) or time.monotonic() > end:
            time.sleep(1)
            for rank in ranks:
                rank.kill()
        time.sleep(0.1)
    return [rank.wait() for rank in ranks]


@pytest.fixture(scope="module")
def results(tmp_path_factory, data):
    work = tmp_path_factory.mktemp("ranks")
    jobs = [
        {"name": n, "ranks": RUNS[n][0], "port": free_port(), "arguments": ["--job.config_file", run_file(work, data, n)]}
        for n in RUNS
    ]
    (work / "jobs.json").write_text(json.dumps(jobs))
    script = Path(__file__).with_name("ranks_worker.py")
    logs = [(work / f"rank{rank}.log").open("w") for rank in range(4)]
    ranks = [
        subprocess.Popen([sys.executable, str(script), str(rank), str(work)], stdout=log, stderr=subprocess.STDOUT)
        for rank, log in enumerate(logs)
    ]
    codes = finished(ranks, seconds=300)
    failed = next((i for i, code in enumerate(codes) if code not in (0, -signal.SIGKILL)), 0)
    assert codes == [0] * 4, (work / f"rank{failed}.log").read_text()[-3000:]
    return {name: torch.load(work / f"{name}.pt", weights_only=True) for name in RUNS}


@pytest.mark.slow
@pytest.mark.parametrize(("alone", "together"), PAIRS)
def test_losses_and_gradients_equal_those_of_one_process(results, alone, together):
    expected, found = results[alone], results[together]
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-5)
    largest = max(g.abs().max() for g in expected["gradients"].values())
    assert found["gradients"].keys() == expected["gradients"].keys()
    for name, gradient in expected["gradients"].items():
        scale = max(gradient.abs().max(), 1e-3 * largest)
        assert (found["gradients"][name] - gradient).abs().max() <= 1e-5 * scale, name


@pytest.mark.slow
def test_another_seed_gives_other_gradients(results):
    """The comparison above can fail: a run of other weights does not pass it."""
    one, tied = results["one"]["gradients"], results["tied_one"]["gradients"]
    name = next(name for name in one if name.endswith("down_proj.weight"))
    assert (one[name] - tied[name]).abs().max() > 1e-3 * one[name].abs().max()
