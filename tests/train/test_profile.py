"""Where a step's time goes: tables of a real run, and of made-up events whose answer is known."""

import json
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("torchtitan")

from ftc.errors import FtcError
from ftc.train.profile import profile
from ftc.train.profile_table import PHASE, REGION, Profile, Roof, operations

CPU = torch.autograd.DeviceType.CPU


def event(name, parent=None, microseconds=10.0, number=-1, shapes=None, memory=0):
    return SimpleNamespace(
        name=name, cpu_parent=parent, self_cpu_time_total=microseconds, self_device_time_total=0, sequence_nr=number,
        input_shapes=shapes, device_type=CPU, self_cpu_memory_usage=memory, self_device_memory_usage=0,
    )  # fmt: skip


def made_up():
    forward = event(PHASE + "forward", microseconds=0)
    block = event(REGION + "layers.0", forward, 0)
    linear = event("aten::mm", block, 100, 7, [[4, 8], [8, 16]], 256)
    head = event("aten::mm", forward, 50, 9, [[4, 8], [8, 2]])
    engine = event("autograd::engine::evaluate_function: MmBackward0", forward, 1, 7)
    again = event(REGION + "layers.0", engine, 0)
    recomputed = event("aten::mm", again, 90, 3, [[4, 8], [8, 16]])
    gradient = event("aten::mm", engine, 200, -1, [[8, 4], [4, 16]])
    shells = event("autograd::engine::evaluate_function: MmBackward0", forward, 2, 9)
    step = event("aten::_fused_adamw_", event(PHASE + "optimizer", None, 0), 30)
    return [forward, block, linear, head, engine, again, recomputed, gradient, shells, step, event("aten::copy_", None, 5)]


def test_each_operator_has_its_phase_and_region():
    found = [(op.name.split("::")[1], op.phase, op.region, round(op.seconds * 1e6)) for op in operations(made_up(), 4)]
    assert found == [
        ("mm", "forward", "layers.0", 100),
        ("mm", "forward", "shell", 50),
        ("engine", "backward", "layers.0", 1),
        ("mm", "recomputation", "layers.0", 90),
        ("mm", "backward", "layers.0", 200),
        ("engine", "backward", "shell", 2),
        ("_fused_adamw_", "optimizer", "", 30),
        ("copy_", "other", "", 5),
    ]


@pytest.mark.parametrize("bandwidth, limit", [(1.0e6, "memory"), (1.0e12, "compute")])
def test_products_stand_on_the_roofline(bandwidth, limit):
    made = Profile(operations(made_up(), 4), 500e-6, 1, Roof(1e9, bandwidth), "float32", "cpu")
    (row,) = [r for r in made.products() if r["phase"] == "forward" and r["shapes"] == "4x8 @ 8x16"]
    flops, moved = 2 * 4 * 8 * 16, 4 * (4 * 8 + 8 * 16 + 4 * 16)
    assert (row["flops"], row["bytes"]) == (flops, moved) and row["limit"] == limit
    assert row["bound"] == min(1e9, flops / moved * bandwidth)
    assert row["of_roof"] == pytest.approx(flops / 100e-6 / row["bound"])
    assert sum(r["seconds"] for r in made.by_region()) == pytest.approx(made.total) == pytest.approx(478e-6)


@pytest.fixture(scope="module")
def found(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("profiled")
    values = {
        "model": {"flavor": "tiny"},
        "ftc": {"data": str(data), "vocab_size": 300, "validation_fraction": 0.3},
        "training": {"local_batch_size": 4, "seq_len": 64, "mixed_precision_param": "float32"},
        "activation_checkpoint": {"mode": "full"},
        "comm": {"trace_buf_size": 0},
        "debug": {"seed": 1},
    }
    return profile(values, out, steps=2), out


def test_a_run_is_accounted_for(found):
    result, out = found
    rows = {(r["phase"], r["region"]): r for r in result["regions"]}
    for layer in ("layers.0", "layers.1"):
        once = rows["forward", layer]["flops"]
        # Two layers of width 64, 4 heads and 2 key-value heads of 16, an MLP of 176, on 256 tokens.
        products, attention = 2 * 256 * 64 * (64 + 2 * 32 + 64 + 3 * 176), 2 * 2 * (4 * 4) * 64 * 64 * 16
        assert once == products + attention
        assert rows["backward", layer]["flops"] == 2 * products + 2.5 * attention  # attention's own product once more
        # Early stop: what nothing after it keeps is not computed again, which is the last product.
        assert rows["recomputation", layer]["flops"] <= once and rows["recomputation", layer]["flops"] > once / 2
    assert {phase for phase, _ in rows} >= {"forward", "backward", "recomputation", "optimizer", "data"}
    assert 0.3 < result["in_operators"] <= 1.0
    assert sum(r["share"] for r in result["regions"]) == pytest.approx(result["in_operators"])
    assert result["peak_bytes"] > 4 * 3 * 256 * 300  # at least logits, their softmax and their gradient
    trace = json.loads((out / "trace.rank0.json").read_text())
    assert any(e.get("name") == REGION + "layers.1" for e in trace["traceEvents"])


def test_nothing_but_the_profile_is_written(found):
    _, out = found
    assert sorted(p.name for p in out.iterdir() if not p.name.startswith(".")) == ["ftc.json", "profile.json", "profile.log", "trace.rank0.json"]


def test_two_ranks_have_a_trace_each(data, tmp_path):
    values = {
        "model": {"flavor": "tiny"},
        "ftc": {"data": str(data), "vocab_size": 300},
        "training": {"local_batch_size": 2, "seq_len": 32, "mixed_precision_param": "float32"},
        "comm": {"trace_buf_size": 0},
    }
    result = profile(values, tmp_path, steps=1, num_processes=2)
    assert all((tmp_path / f"trace.rank{rank}.json").is_file() for rank in (0, 1))
    assert any(r["operator"].startswith("c10d::") for r in result["operators"])


def test_bad_input(tmp_path, data):
    (tmp_path / "mine.txt").write_text("not ours")
    values = {"model": {"flavor": "tiny"}, "ftc": {"data": str(data), "vocab_size": 300}}
    with pytest.raises(FtcError, match=str(tmp_path)):
        profile(values, tmp_path)
    with pytest.raises(FtcError, match="0 steps"):
        profile(values, tmp_path / "new", steps=0)
    with pytest.raises(FtcError, match="there is no data at nowhere.txt"):
        profile(values | {"ftc": {"data": "nowhere.txt"}}, tmp_path / "new")
    assert not (tmp_path / "new").exists()
