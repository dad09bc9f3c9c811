"""A full disk costs a checkpoint and not the run; nothing else is forgiven."""

import errno

import pytest

pytest.importorskip("torchtitan")

from ftc.train import adapter  # noqa: E402, F401  readies a machine without an accelerator
from ftc.train.checkpoints import TolerantCheckpoints  # noqa: E402


class Disk:
    """A checkpoint manager that writes half a checkpoint and then raises `error`."""

    interval = 5

    def __init__(self, folder, error):
        self.folder, self.error, self.saved = folder, error, []

    def save(self, step, last_step=False):
        (self.folder / f"step-{step}").mkdir()
        if self.error is not None:
            raise self.error
        (self.folder / f"step-{step}" / ".metadata").write_text("whole")


@pytest.fixture
def folder(tmp_path):
    for name, last in (("step-1", ".metadata"), ("step-2", "model.safetensors.index.json")):
        (tmp_path / name).mkdir()
        (tmp_path / name / last).write_text("whole")
    return tmp_path


def steps(folder):
    return sorted(path.name for path in folder.iterdir())


FULL = OSError(errno.ENOSPC, "No space left on device")


def test_without_room_the_half_checkpoint_goes_and_the_whole_ones_stay(folder):
    TolerantCheckpoints(Disk(folder, FULL), folder).save(3)
    assert steps(folder) == ["step-1", "step-2"]


def test_with_room_it_saves_and_passes_on_what_it_does_not_know(folder):
    manager = TolerantCheckpoints(Disk(folder, None), folder)
    manager.save(3)
    assert steps(folder) == ["step-1", "step-2", "step-3"] and manager.interval == 5


@pytest.mark.parametrize(("error", "last"), [(FULL, True), (OSError(errno.EIO, "broken"), False), (ValueError("x"), False)])
def test_the_last_checkpoint_and_other_errors_are_not_given_up(folder, error, last):
    with pytest.raises(type(error)):
        TolerantCheckpoints(Disk(folder, error), folder).save(3, last_step=last)


def test_the_time_that_training_waits_is_counted(folder):
    manager = TolerantCheckpoints(Disk(folder, None), folder)
    manager.save(3)
    waited = manager.seconds
    manager.save(4, last_step=True)
    assert 0 < waited < 60 and manager.seconds == waited
