"""metrics.jsonl: a half-written line is no line, and a resumed run replaces the steps it repeats."""

import json

from hypothesis import given
from hypothesis import strategies as st

from ftc.train.metrics_file import curve, curves, keep_steps_before, read_metrics


def rows(count):
    return [{"step": step, "loss": 1.0 / step, "time": 2.0 * step} for step in range(1, count + 1)]


@given(count=st.integers(1, 6), cut=st.integers(0, 30))
def test_a_truncated_file_gives_its_complete_lines(tmp_path_factory, count, cut):
    path = tmp_path_factory.mktemp("m") / "metrics.jsonl"
    text = "".join(json.dumps(row) + "\n" for row in rows(count))
    path.write_text(text[: len(text) - cut])
    found = read_metrics(path)
    assert found == rows(count)[: len(found)] and len(found) >= text[: len(text) - cut].count("\n")


@given(count=st.integers(0, 6), step=st.integers(1, 8))
def test_resuming_keeps_what_lies_before_and_its_time(tmp_path_factory, count, step):
    path = tmp_path_factory.mktemp("m") / "metrics.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows(count)))
    seconds = keep_steps_before(path, step)
    kept = read_metrics(path)
    assert kept == rows(min(count, step - 1))
    assert seconds == (kept[-1]["time"] if kept else 0.0)


def test_no_file_is_no_metrics(tmp_path):
    assert read_metrics(tmp_path / "absent.jsonl") == []


@given(count=st.integers(0, 50), every=st.integers(1, 9), most=st.integers(1, 20))
def test_a_curve_holds_its_own_rows_first_and_last_of_them(count, every, most):
    mixed = []
    for row in rows(count):
        mixed.append(row)
        if row["step"] % every == 0:
            mixed.append({"step": row["step"], "validation_bits_per_byte": {"a": 0.5, "b": 1.5}, "time": row["time"]})
    losses = curve(mixed, "loss", most)
    assert len(losses) <= 2 * most + 1
    if count:
        assert losses[0] == [1, 1.0] and losses[-1] == [count, 1.0 / count]
    held_out = curves(mixed, "validation_bits_per_byte", 1000)
    steps = range(every, count + 1, every)
    assert held_out == ({"a": [[step, 0.5] for step in steps], "b": [[step, 1.5] for step in steps]} if steps else {})
