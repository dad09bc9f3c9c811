"""A dry run finds what the run would: its errors, its sizes, and its memory to 5%."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ftc.commands.dry_run import parse_bytes
from ftc.errors import FtcError

pytest.importorskip("torchtitan")

from ftc.train.dry_run import dry_run  # noqa: E402

FUSED = ["raise", "fuse-qkv", "fuse-gate-up"]


def run_file(**changes):
    values = {
        "model": {"flavor": "tiny"},
        "ftc": {"data": "/far/away", "vocab_size": 320},
        "training": {"steps": 2, "local_batch_size": 4, "seq_len": 64, "mixed_precision_param": "float32"},
        "debug": {"seed": 1},
    }
    for dotted, value in changes.items():
        section, key = dotted.split("__")
        values[section] = values.get(section, {}) | {key: value}
    return values


def products(layers=2, width=64, inner=176, queries=64, keys=32, vocabulary=320):
    """Weights that a token is multiplied with, of the preset tiny."""
    return layers * (width * (queries + 2 * keys) + queries * width + 3 * width * inner) + width * vocabulary


def test_sizes_and_flops_are_those_of_the_architecture():
    found = dry_run(run_file())
    weights = products() + 64 * 320 + (2 * 2 + 1) * 64  # embedding and norms
    assert found.num_parameters == weights and found.parameter_bytes == 4 * weights
    assert found.gradient_bytes == 4 * weights
    assert 8 * weights <= found.optimizer_bytes < 8 * weights + 1000
    tokens = 4 * 64
    attention = 2 * 2 * 2 * tokens * 64 * 64  # layers, q k and p v, 2 FLOPs; every query meets every key
    assert found.tokens == tokens
    assert found.model_flops == pytest.approx(3 * (2 * tokens * products() + attention) + attention / 2, rel=0.05)
    assert found.rank_flops == found.model_flops
    assert found.missing and "/far/away" in found.missing[0]


def test_recomputation_costs_a_second_forward_and_saves_activations():
    plain, again = dry_run(run_file()), dry_run(run_file(activation_checkpoint__mode="full"))
    assert again.model_flops == plain.model_flops
    blocks = 2 * 4 * 64 * products(vocabulary=0)
    assert again.rank_flops - again.model_flops == pytest.approx(blocks, rel=0.25)
    assert again.activation_bytes < 0.7 * plain.activation_bytes


def test_shards_divide_what_is_stored():
    one, eight = dry_run(run_file()), dry_run(run_file(), num_ranks=8)
    assert eight.batch_degree == 8 and eight.tokens == 8 * one.tokens
    for name in ("parameter_bytes", "gradient_bytes", "optimizer_bytes"):
        assert getattr(eight, name) == pytest.approx(getattr(one, name) / 8, rel=0.03)
    assert eight.activation_bytes == pytest.approx(one.activation_bytes, rel=0.4)


def test_sixteen_bits_need_no_second_run_file():
    half = dry_run(run_file(training__mixed_precision_param="bfloat16", ftc__passes=FUSED), num_ranks=2)
    assert half.activation_bytes < dry_run(run_file(ftc__passes=FUSED), num_ranks=2).activation_bytes


@pytest.mark.parametrize(
    ("changes", "ranks", "message"),
    [
        ({"ftc__passes": ["fuse-qvk"]}, None, "did you mean 'fuse-qkv'"),
        ({"training__stepz": 3}, None, "did you mean 'steps'"),
        ({"ftc__architecture": {"vocab_size": 100}}, None, "320 ids, but the model knows 100"),
        ({"training__global_batch_size": 6}, 2, "must be a multiple of 8"),
        ({"parallelism__data_parallel_shard_degree": 4}, 6, "6 ranks do not go with .*shard_degree = 4"),
        ({"parallelism__pipeline_parallel_degree": 2, "parallelism__context_parallel_degree": 2}, 4, "is 2 beside context_parallel_degree"),
        ({"activation_checkpoint__mode": "memory_budget"}, None, "compile.enable = true"),
        ({"ftc__model": "/no/such/model"}, None, "nothing is there"),
        ({}, 0, "0 ranks cannot train"),
    ],
)
def test_what_a_run_would_refuse_is_refused(changes, ranks, message):
    with pytest.raises(FtcError, match=message):
        dry_run(run_file(**changes), num_ranks=ranks)
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize(("text", "size"), [("80GiB", 80 * 2**30), ("24 GB", 24 * 10**9), ("512mib", 2**29), ("7", 7)])
def test_sizes_are_read_in_both_units(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "0GiB", "many", "-4GB", "4 gigs"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(FtcError, match="is not a size"):
        parse_bytes(text)


def test_the_command_says_what_does_not_fit(tmp_path, capsys):
    from ftc.cli import run
    from ftc.train.config import dump_toml

    path = tmp_path / "run.toml"
    path.write_text(dump_toml(run_file()))
    before = sorted(tmp_path.iterdir())
    assert run(["train", str(path), "--dry-run", "--nproc", "2", "--device-memory", "1MiB", "--json"]) == 1
    said = capsys.readouterr()
    found = json.loads(said.out)
    assert found["ranks"] == 2 and found["fits"] is False and found["missing"]
    assert "does not fit into 1.0 MiB" in said.err
    assert run(["train", str(path), "--dry-run", "--device-memory", "1GiB"]) == 0
    shown = capsys.readouterr()
    assert "missing before the run" in shown.out + shown.err and "fits:" in shown.out + shown.err
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.slow
def test_the_estimate_is_within_5_percent_of_the_allocator(data):
    """One and two ranks; the benchmark measures the rest."""
    script = Path(__file__).parents[2] / "benchmarks" / "dry_run_memory.py"
    names = ["plain", "FSDP2, bfloat16, all of these"]
    done = subprocess.run(
        [sys.executable, str(script), "--data", str(data), "--vocabulary", "300", "--check", "--only", *names],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    runs = json.loads(done.stdout.splitlines()[-1])["runs"]
    assert list(runs) == names and all(abs(run["error"]) <= 0.05 for run in runs.values())


def test_microbatches_add_flops_and_hardly_memory():
    two, eight = (dry_run(run_file(training__global_batch_size=size)) for size in (8, 32))
    assert eight.model_flops == 4 * two.model_flops and eight.tokens == 4 * two.tokens
    assert 0 < eight.peak_bytes - two.peak_bytes < 0.02 * two.peak_bytes


def test_a_ledger_sees_freed_storage_after_an_operator_that_is_written_out():
    from torch._subclasses.fake_tensor import FakeTensorMode

    from ftc.train.ledger import Ledger

    with FakeTensorMode(), Ledger() as ledger:
        held = torch.empty(1000)
        hidden, weight = torch.empty(8, 4), torch.empty(6, 4)
        torch.ops.ftc.chunk_cross_entropy(hidden, weight, None, torch.zeros(8, dtype=torch.int64))
        before = ledger.current_bytes
        held.untyped_storage().resize_(0)
        assert before - ledger.current_bytes == 4000
    assert torch.UntypedStorage.resize_ is ledger._resize


@pytest.mark.parametrize("axis", ["tensor", "context"])
def test_ranks_that_share_a_sample_share_its_flops(axis):
    one, two = dry_run(run_file()), dry_run(run_file(**{f"parallelism__{axis}_parallel_degree": 2}))
    assert two.ranks == 2 and two.batch_degree == 1 and two.tokens == one.tokens
    assert two.num_parameters == one.num_parameters
    assert two.flops_per_token == pytest.approx(one.flops_per_token, rel=0.1)
    assert two.parameter_bytes == pytest.approx(one.parameter_bytes / 2, rel=0.1)
    assert two.activation_bytes < one.activation_bytes
