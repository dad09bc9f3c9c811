"""Runs whose weights or sequences ranks share: the same run as on one process, and checkpoints that either can continue."""

import json
import shutil

import pytest
import torch

from ftc.errors import FtcError

pytest.importorskip("torchtitan")

PASSES = ["fuse-qkv", "fuse-gate-up", "chunk-cross-entropy"]
STEPS = 6


def run_file(data, **parallelism):
    return {
        "model": {"flavor": "tiny"},
        "ftc": {
            "data": str(data), "vocab_size": 300, "architecture": {"vocab_size": 320}, "passes": PASSES, "loss": "model",
            "validate": False,
        },
        "training": {
            "steps": STEPS, "local_batch_size": 1, "global_batch_size": 2, "seq_len": 32, "mixed_precision_param": "float32",
        },
        "parallelism": parallelism,
        "metrics": {"log_freq": 1},
        "lr_scheduler": {"warmup_steps": 2},
        "checkpoint": {"enable": True, "interval": 2, "last_save_model_only": False},
        "comm": {"trace_buf_size": 0},
        "debug": {"seed": 1},
    }  # fmt: skip


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def interrupted(result, folder):
    """A copy of a run's folder as it was after step 4."""
    shutil.copytree(result.folder, folder)
    (folder / "result.json").unlink()
    shutil.rmtree(folder / "checkpoint" / f"step-{STEPS}")
    (folder / "metrics.jsonl").write_text("".join((folder / "metrics.jsonl").read_text().splitlines(True)[:4]))
    return folder


def assert_alike(found, expected):
    assert [row["step"] for row in found] == [row["step"] for row in expected]
    for mine, theirs in zip(found, expected, strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-5), f"step {mine['step']}"
        assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4), f"step {mine['step']}"
        assert mine["tokens"] == theirs["tokens"]


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory):
    """The run on one process, on two that share weights, and on two that share sequences."""
    from ftc.train.launch import train

    work = tmp_path_factory.mktemp("runs")
    return {
        "one": train(run_file(data), work / "one", quiet=True),
        "tensor": train(run_file(data, tensor_parallel_degree=2), work / "tensor", quiet=True, num_processes=2),
        "context": train(run_file(data, context_parallel_degree=2), work / "context", quiet=True, num_processes=2),
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tensor", "context"])
def test_a_run_on_two_ranks_is_the_run_on_one(runs, name):
    import ftc.models

    import ftc

    one, found = runs["one"], runs[name]
    assert_alike(rows(found.folder), rows(one.folder))
    assert found.tokens == one.tokens
    models = [ftc.models.load(result.model_folder) for result in (one, found)]
    programs = [ftc.load(result.program_folder) for result in (one, found)]
    assert programs[1].axes == {} and [list(p.state_dict()) for p in programs[:1]] == [list(p.state_dict()) for p in programs[1:]]
    ids = torch.arange(20)[None]
    with torch.no_grad():
        logits = [model(input_ids=ids) for model in (*models, *programs)]
    for other in logits[1:]:
        torch.testing.assert_close(other, logits[0], rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_a_checkpoint_of_shared_weights_continues_on_one_process(runs, data, tmp_path):
    from ftc.train.launch import train

    folder = interrupted(runs["tensor"], tmp_path / "run")
    train(run_file(data), folder, quiet=True)
    assert "Loading the checkpoint from" in (folder / "train.log").read_text()
    assert_alike(rows(folder), rows(runs["tensor"].folder))


@pytest.mark.slow
def test_a_checkpoint_of_one_process_continues_on_four_that_share_and_shard_weights(runs, data, tmp_path):
    from ftc.train.launch import train

    folder = interrupted(runs["one"], tmp_path / "run")
    train(run_file(data, tensor_parallel_degree=2), folder, quiet=True, num_processes=4)
    assert "Loading the checkpoint from" in (folder / "train.log").read_text()
    assert_alike(rows(folder), rows(runs["one"].folder))


@pytest.mark.parametrize(
    ("processes", "changes", "message"),
    [
        (3, {"tensor_parallel_degree": 2}, "tensor_parallel 2 makes 2 processes, and there are 3"),
        (2, {"tensor_parallel_degree": 2, "context_parallel_degree": 2}, "makes 4 processes, and there are 2"),
        (2, {"tensor_parallel_degree": 0}, "tensor_parallel_degree is 0; it must be 1 or more"),
        (2, {"pipeline_parallel_degree": 2, "tensor_parallel_degree": 2}, "pipeline_parallel 2 x tensor_parallel 2 makes 4 processes"),
        (4, {"pipeline_parallel_degree": 2, "context_parallel_degree": 2}, "pipeline_parallel_degree is 2 beside context_parallel_degree = 2"),
        (1, {"pipeline_parallel_degree": 0}, "pipeline_parallel_degree is 0; it must be 1 or more"),
        (2, {"expert_parallel_degree": 2}, "only stacked experts can be divided: put \"raise-moe\" into"),
        (3, {"context_parallel_degree": 3}, "seq_len is 32, which .* = 3 cannot cut into 6 equal chunks; 30 or 36 can be"),
        (2, {"tensor_parallel_degree": 2, "enable_async_tensor_parallel": True}, "enable_async_tensor_parallel is not"),
        (2, {"context_parallel_degree": 2, "context_parallel_load_balancer": "ptrr"}, 'must be "headtail" or "none"'),
        (2, {"context_parallel_degree": 2, "context_parallel_rotate_method": "alltoall"}, 'must be "allgather"'),
        (2, {"tensor_parallel_degree": 2, "muon": True}, "orthogonalises whole matrices"),
        (2, {"context_parallel_degree": 2, "packed": True}, "document_mask shows each token"),
        (2, {"context_parallel_degree": 2, "teacher": True}, "would see only a rank's tokens"),
    ],
)
def test_what_cannot_be_divided_is_said_before_anything_is_built(monkeypatch, tmp_path, processes, changes, message):
    from ftc.train.config import dump_toml
    from ftc.train.division import check_parallelism
    from ftc.train.trainer import load_config

    values = run_file(tmp_path, **{k: v for k, v in changes.items() if k not in ("muon", "teacher", "packed")})
    if "muon" in changes:
        values["ftc"]["optimizer"] = "muon"
    if "packed" in changes:
        values["ftc"] |= {"packing": "documents", "document_mask": True}
    if "teacher" in changes:
        values["ftc"] |= {"passes": [], "loss": {"name": "kl", "teacher": "somewhere"}}
    (tmp_path / "run.toml").write_text(dump_toml(values))
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    with pytest.raises(FtcError, match=message):
        check_parallelism(load_config(["--job.config_file", str(tmp_path / "run.toml")]))


@pytest.mark.slow
def test_a_degree_that_the_heads_do_not_allow_is_the_users_error(data, tmp_path):
    from ftc.train.launch import train

    with pytest.raises(FtcError, match="degree of 3 does not fit the model: .* cannot be divided over 3 ranks; 2, 4"):
        train(run_file(data, tensor_parallel_degree=3), tmp_path / "run", quiet=True, num_processes=3, max_restarts=0)
    assert not (tmp_path / "run").exists()
