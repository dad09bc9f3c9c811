"""A pipelined run as a user starts it: the first rank logs, measures and saves what stages on other ranks know."""

import json

import pytest
import torch

import ftc
from ftc.open_model import open_model
from ftc.train.metrics_file import METRICS_FILE, read_metrics

pytest.importorskip("torchtitan")


@pytest.mark.slow
def test_a_run_logs_parts_of_its_loss_and_saves_the_whole_model(data, tmp_path):
    from ftc.train.launch import train

    values = {
        "model": {"flavor": "tiny"},
        "ftc": {
            "data": str(data), "vocab_size": 300, "validation_fraction": 0.3, "validation_points": 1,
            "architecture": {"num_hidden_layers": 4},
            "passes": ["fuse-qkv", {"name": "add-mtp", "depth": 1}], "loss": {"name": "mtp", "weight": 0.4},
        },
        "training": {"steps": 3, "local_batch_size": 4, "seq_len": 32, "mixed_precision_param": "bfloat16"},
        "parallelism": {"pipeline_parallel_degree": 2, "pipeline_parallel_schedule": "DualPipeV"},
        "metrics": {"log_freq": 1},
        "lr_scheduler": {"warmup_steps": 2},
        "comm": {"trace_buf_size": 0},
        "debug": {"seed": 1},
    }  # fmt: skip
    result = train(values, tmp_path / "run", quiet=True, num_processes=2, max_restarts=0)
    rows = read_metrics(result.folder / METRICS_FILE)
    losses = [row for row in rows if "loss" in row]
    assert [row["step"] for row in losses] == [1, 2, 3]
    for row in losses:
        assert row["loss"] == pytest.approx(row["next_token_loss"] + 0.4 * row["mtp_loss_1"], rel=1e-3)
        assert row["grad_norm"] > 0 and row["tokens"] == 4 * 32 * row["step"]
    assert losses[-1]["loss"] == result.loss < losses[0]["loss"]
    held = [next(iter(row["validation_bits_per_byte"].values())) for row in rows if "validation_bits_per_byte" in row]
    assert held[-1] < held[0] and abs(held[-1] - result.validation["bits_per_byte"]) < 0.3  # of a sample, of all
    assert list(json.loads((result.folder / "environment.json").read_text())["axes"]) == ["pp"]

    program, plain = open_model(result.program_folder), open_model(result.model_folder)
    ids = torch.randint(300, (2, 12), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(ftc.rewrite(program, ["strip-mtp"])(input_ids=ids), plain(ids), rtol=1e-4, atol=1e-4)
    assert program.lm_head.weight.dtype == torch.float32, "weights are stored in the dtype of the training"
