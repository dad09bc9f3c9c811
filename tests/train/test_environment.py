"""The machines of a run compared before its first step: what is an error, what a warning, what passes."""

import copy
import json

import pytest
from ranks_in_an_environment import checked

from ftc.errors import FtcError
from ftc.train.environment import check_disk, compare, crossing, source_digest


def machine(host, **changes):
    found = {
        "host": host, "clock": 1000.0, "versions": {"python": "3.11.7", "torch": "2.13.0", "ftc source": "abc"}, "device": "cpu",
        "variables": {}, "sees_folder": True, "folder": "runs/a", "free_bytes": 1, "settings": {"training.steps": "10"},
        "shared_memory_bytes": None,
    }  # fmt: skip
    for key, value in changes.items():
        found[key] = found[key] | value if isinstance(value, dict) else value
    return found


def test_equal_machines_pass():
    assert compare([machine("a"), machine("a"), machine("b", clock=1000.5)]) == ([], [])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"versions": {"torch": "2.11.0"}}, "different versions of torch: 2.13.0 on a; 2.11.0 on b; install the same on all"),
        ({"versions": {"ftc source": "abd"}}, "different versions of ftc's own source files (by digest): abc on a; abd on b"),
        ({"versions": {"NCCL": "2.27.3"}}, "different versions of NCCL: none on a; 2.27.3 on b"),
        ({"settings": {"training.steps": "20"}}, "different values of training.steps: 10 on a; 20 on b"),
        ({"sees_folder": False}, "b cannot see what the first rank writes to runs/a; the run's folder must be shared"),
    ],
)
def test_what_would_spoil_a_run_is_an_error_that_names_the_machines(changes, said):
    errors, warnings = compare([machine("a"), machine("a"), machine("b", **changes)])
    assert len(errors) == 1 and said in errors[0] and warnings == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"clock": 1007.5}, "the clock of b is +7.5 s from that of a"),
        ({"device": "NVIDIA H200"}, "different devices, and wait for the slowest: cpu on a; NVIDIA H200 on b"),
        ({"variables": {"NCCL_ALGO": "Ring"}}, "NCCL_ALGO differs: unset on a; Ring on b"),
    ],
)
def test_what_only_slows_or_confuses_is_a_warning(changes, said):
    errors, warnings = compare([machine("a"), machine("b", **changes)])
    assert errors == [] and len(warnings) == 1 and said in warnings[0]


def test_an_axis_of_every_layer_across_machines_is_warned_of():
    axis = {"degree": 8, "ranks": [0, 1], "hosts": 2, "right": True, "bytes_per_second": 2.5e9}
    (said,) = crossing({"tp": axis, "fsdp": axis, "cp": axis | {"hosts": 1}})
    assert "axis tp lies across 2 machines (2.50 GB/s)" in said and "parallelism.tensor_parallel_degree" in said


def test_the_disk_must_hold_one_checkpoint_and_should_hold_all_that_are_kept(tmp_path):
    new = tmp_path / "checkpoint"
    assert check_disk(new, 100, 2, free=300) is None
    assert "3 beside each other will not fit" in check_disk(new, 100, 2, free=299)
    with pytest.raises(FtcError, match=r"a checkpoint takes about 2\.00 GiB, and 1\.00 GiB are free .* set checkpoint\.enable = false"):
        check_disk(new, 2 << 30, 2, free=1 << 30)
    (new / "step-10").mkdir(parents=True)  # rotation makes room
    assert "unless old checkpoints make room" in check_disk(new, 100, 2, free=99)
    assert check_disk(new, 100, 2, free=100) is None


def test_the_digest_is_of_the_code():
    assert source_digest() == source_digest() and len(source_digest()) == 12


def test_ranks_compare_themselves_and_try_their_axes(ranks, tmp_path):
    warnings = ranks.run(checked, str(tmp_path), size=4)
    assert warnings == [[], [], [], []]
    written = json.loads((tmp_path / "environment.json").read_text())
    (host,) = written["machines"]
    assert host["versions"]["torch"] and host["free_bytes"] > 0 and "settings" not in host
    assert {axis: values["degree"] for axis, values in written["axes"].items()} == {"fsdp": 2, "tp": 2}
    assert all(values["right"] and values["hosts"] == 1 and values["bytes_per_second"] > 0 for values in written["axes"].values())
    assert [p.name for p in tmp_path.iterdir()] == ["environment.json"]


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        ("settings", "different values of training.steps: 10 on .*; 11 on other"),
        ("folder", "other cannot see what the first rank writes"),
        ("all_reduce", "all-reduce gives wrong values: the ranks of axis (fsdp|tp)"),
    ],
)
def test_every_rank_raises_what_one_of_them_has_wrong(ranks, tmp_path, broken, said):
    import re

    found = ranks.run(checked, str(tmp_path), broken, size=2)
    assert all(re.search(said, each) for each in found), found
    assert copy.copy(found[0]) == found[1]
