"""Runs through torchtitan, end to end on a tiny model: what is left in the folder, resuming, and what goes wrong."""

import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from tiny_runs import losses, run_file

from ftc.errors import FtcError, FtcFailure, Interrupted
from ftc.evaluate import evaluate
from ftc.train import launch
from ftc.train.launch import train
from ftc.train.metrics_file import METRICS_FILE, curves, read_metrics

pytest.importorskip("torchtitan")


def mfus(folder):
    return [row["mfu"] for row in read_metrics(folder / METRICS_FILE) if "mfu" in row]


def held_out(folder):
    return curves(read_metrics(folder / METRICS_FILE), "validation_bits_per_byte", 100)


@pytest.mark.slow
def test_a_resumed_run_has_the_same_bits_as_an_uninterrupted_one(data, tmp_path):
    import ftc.models
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from ftc.data.tokenizer import load_tokenizer

    whole = train(run_file(data, metrics__enable_tensorboard=True), tmp_path / "whole", quiet=True)
    assert whole.steps == 6 and whole.tokens == 6 * 2 * 32
    assert list(losses(whole.folder)) == [1, 2, 3, 4, 5, 6]
    ((source, curve),) = held_out(whole.folder).items()
    assert [step for step, _ in curve] == [1, 2, 3, 4, 5, 6] and curve[-1][1] < curve[0][1]
    assert whole.validation["curve"][source]["trigram_bits_per_byte"] > 0
    assert whole.validation["bits_per_byte"] > 0 and whole.validation["trigram_bits_per_byte"] > 0

    (events,) = (whole.folder / "tb").glob("*/events.out.tfevents.*")
    written = EventAccumulator(str(events.parent)).Reload()
    assert [e.step for e in written.Scalars(f"validation_bits_per_byte/{source}")] == [1, 2, 3, 4, 5, 6]
    assert [e.value for e in written.Scalars("mfu(%)")] == pytest.approx(mfus(whole.folder), rel=0.05)
    assert 0 < max(mfus(whole.folder)) < 100

    model, tokenizer = ftc.models.load(whole.model_folder), load_tokenizer(whole.model_folder)
    texts = [(data / f"{n}.txt").read_text() for n in range(8)]
    assert evaluate(model, tokenizer, {"all": texts}, context=32, progress=False)["all"]["tokens"] > 0

    # The same run, killed while it worked: its folder keeps the checkpoints up to step 4.
    parts = tmp_path / "parts"
    train(run_file(data), parts, quiet=True)
    for name in ("result.json", "checkpoint/step-6"):
        path = parts / name
        subprocess.run(["rm", "-r", str(path)], check=True)
    rows = [row for row in read_metrics(parts / METRICS_FILE) if row["step"] <= 5]
    (parts / METRICS_FILE).write_text("".join(json.dumps(row) + "\n" for row in rows))
    resumed = train(run_file(data), parts, quiet=True)
    assert "Loading the checkpoint from" in (parts / "train.log").read_text()
    assert losses(parts) == losses(whole.folder)
    assert held_out(parts) == held_out(whole.folder)
    weights = [ftc.models.load(result.model_folder).state_dict() for result in (whole, resumed)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])

    # Finished: nothing runs again. Another configuration over its checkpoints: refused, unless begun anew.
    before = (parts / "train.log").stat().st_mtime_ns
    assert train(run_file(data), parts, quiet=True) == resumed
    assert (parts / "train.log").stat().st_mtime_ns == before
    with pytest.raises(FtcError, match=r"training\.seq_len \(32, now 16\)"):
        train(run_file(data, training__seq_len=16), parts, quiet=True)


@pytest.mark.slow
def test_a_rewritten_model_trains_alike_and_is_saved_in_both_forms(data, tmp_path):
    import ftc.models

    import ftc

    plain = run_file(data, ftc__optimizer="torchtitan", ftc__validate=False)
    passes = ["fuse-qkv", "fuse-gate-up", "chunk-cross-entropy"]
    rewritten = run_file(data, ftc__optimizer="torchtitan", ftc__validate=False, ftc__passes=passes, ftc__loss="model")
    results = [
        train(values, tmp_path / name, quiet=True) for values, name in ((plain, "plain"), (rewritten, "rewritten"))
    ]
    for step, loss in losses(results[0].folder).items():
        assert losses(results[1].folder)[step] == pytest.approx(loss, rel=1e-3), f"step {step}"
    assert results[0].program_folder is None
    ids = torch.arange(20)[None]
    with torch.no_grad():
        logits = [
            ftc.models.load(results[0].model_folder)(input_ids=ids),
            ftc.models.load(results[1].model_folder)(input_ids=ids),
            ftc.load(results[1].program_folder)(input_ids=ids),
        ]
    torch.testing.assert_close(logits[1], logits[2], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits[0], logits[1], rtol=2e-2, atol=2e-2)


@pytest.mark.slow
def test_too_little_text_is_the_users_error_and_leaves_nothing(data, tmp_path):
    with pytest.raises(FtcError, match=rf"the training text of '{data.name}' has \d+ tokens; windows of 100000 need 200000"):
        train(run_file(data, training__seq_len=100_000), tmp_path / "b", quiet=True)
    assert not list(tmp_path.iterdir())


def test_errors_before_the_start_leave_nothing_behind(data, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(FtcError, match="unknown key 'ftc.dta'; did you mean 'data'"):
        train(run_file(data, ftc__dta="x"), out, quiet=True)
    assert not out.exists()
    out.mkdir()
    (out / "precious.txt").write_text("mine")
    with pytest.raises(FtcError, match="did not write"):
        train(run_file(data), out, quiet=True)
    with pytest.raises(FtcError, match="did not write"):
        train(run_file(data), out, quiet=True, restart=True)
    assert (out / "precious.txt").read_text() == "mine"


def stand_in(monkeypatch, code):
    """Run `code` in place of the trainer; it finds its run file in sys.argv[-1]. Only the launcher's own Popen is replaced."""

    def start(command, **options):
        return subprocess.Popen([sys.executable, "-c", code, command[-1]], **options)

    own = SimpleNamespace(Popen=start, PIPE=subprocess.PIPE, TimeoutExpired=subprocess.TimeoutExpired)
    monkeypatch.setattr(launch, "subprocess", own)


def test_ctrl_c_stops_the_child_and_says_how_to_continue(data, tmp_path, monkeypatch):
    stand_in(
        monkeypatch,
        "import os, pathlib, sys, time; pathlib.Path(sys.argv[-1]).with_name('pid').write_text(str(os.getpid())); time.sleep(60)",
    )
    pid = tmp_path / "out" / "pid"

    def interrupt(*_):
        deadline = time.time() + 20
        while not (pid.is_file() and pid.read_text()) and time.time() < deadline:
            time.sleep(0.02)
        raise KeyboardInterrupt

    monkeypatch.setattr(launch, "_show", interrupt)
    with pytest.raises(Interrupted, match="was interrupted; the same command continues it from the beginning"):
        train(run_file(data), tmp_path / "out", quiet=True)
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), signal.SIGCONT)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "signal SIGKILL"),
        ("raise RuntimeError('the reason')", "RuntimeError: the reason"),
    ],
)
def test_a_child_that_dies_is_a_failure_that_names_the_cause_and_the_log(data, tmp_path, monkeypatch, code, message):
    stand_in(monkeypatch, code)
    with pytest.raises(FtcFailure, match=message) as caught:
        train(run_file(data), tmp_path / "out", quiet=True)
    assert "train.log" in str(caught.value) and "\n" not in str(caught.value)


FILL = """
import os, pathlib, sys
folder = pathlib.Path(sys.argv[-1]).parent
for step in (10, 20):
    (folder / f"checkpoint/step-{step}").mkdir(parents=True)
    (folder / f"checkpoint/step-{step}/weights").write_bytes(bytes(1000))
    if step == 10:
        (folder / "checkpoint/step-10/.metadata").write_text("whole")
try:
    with open(folder / "checkpoint/step-20/weights", "wb", buffering=0) as file:
        for _ in range(20_000):  # bounded, should the disk be a large one
            file.write(bytes(1000))
finally:
    os._exit(1)  # as where the reason finds no room in the log
"""


def test_a_full_disk_is_said_and_half_a_checkpoint_goes(data, small_disk, monkeypatch):
    out = small_disk("300k") / "out"
    stand_in(monkeypatch, FILL)
    with pytest.raises(FtcFailure, match="disk is full: .*free space, then the same command continues from step 10"):
        train(run_file(data), out, quiet=True)
    assert [path.name for path in (out / "checkpoint").iterdir()] == ["step-10"]


@pytest.mark.parametrize("there", [True, False])
def test_wrong_input_found_by_the_child_leaves_the_folder_as_it_was(data, tmp_path, monkeypatch, there):
    code = "import pathlib, sys; pathlib.Path(sys.argv[-1]).with_name('tokens').mkdir(); print('error: too short', file=sys.stderr); sys.exit(2)"
    stand_in(monkeypatch, code)
    out = tmp_path / "new" / "out"
    if there:
        out.mkdir(parents=True)
    with pytest.raises(FtcError, match="too short"):
        train(run_file(data), out, quiet=True)
    assert (list(out.iterdir()) == []) if there else (list(tmp_path.iterdir()) == [])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"training__stepz": 3}, "unknown key 'training.stepz'; did you mean 'steps'"),
        ({"trainig__steps": 3}, "unknown section 'trainig'; did you mean 'training'"),
        ({"training__seq_len": "long"}, "training.seq_len is 'long'; it must be a whole number"),
        ({"ftc__passes": ["fuse-qvk"]}, "fuse-qvk.*did you mean 'fuse-qkv'"),
        ({"ftc__architecture": {"hiden_size": 8}}, "hiden_size.*did you mean 'hidden_size'"),
        ({"model__flavor": "tinny"}, "tinny.*did you mean 'tiny'"),
        ({"ftc__data": "/no/such/text"}, "/no/such/text"),
        ({"ftc__tokenizer": "/no/such/tokenizer"}, "/no/such/tokenizer"),
    ],
)
def test_what_can_be_seen_is_refused_before_anything_is_written(data, tmp_path, changes, message):
    with pytest.raises(FtcError, match=message):
        train(run_file(data, **changes), tmp_path / "out", quiet=True)
    assert not list(tmp_path.iterdir())
