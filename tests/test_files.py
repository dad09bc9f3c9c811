"""Files and folders are written whole or not at all, and only over what ftc wrote itself."""

import errno
import json
import os

import pytest

from ftc.errors import FtcError, FtcFailure
from ftc.files import MARKER, atomic_folder, atomic_write, check_replaceable, emptied_if_wrong, remove_leftovers


def folder_of(path, kind):
    atomic_write(path / MARKER, json.dumps({"kind": kind}))
    return path


@pytest.mark.parametrize("kind", ["program", "huggingface", "train", "run", "stage"])
@pytest.mark.parametrize("found", ["program", "huggingface", "train", "run", "stage"])
def test_a_folder_is_replaced_by_its_own_kind_only(tmp_path, kind, found):
    path = folder_of(tmp_path / "out", found)
    if kind == found:
        check_replaceable(path, kind)
        return
    with pytest.raises(FtcError, match=f"{path} holds .* must not replace; name another folder"):
        check_replaceable(path, kind)
    with pytest.raises(FtcError, match="must not replace"), atomic_folder(path, kind):
        raise AssertionError("the body ran")
    assert json.loads((path / MARKER).read_text()) == {"kind": found}


def test_a_marker_that_cannot_be_read_is_not_replaced(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / MARKER).write_text("{")
    with pytest.raises(FtcError, match="cannot be read"):
        check_replaceable(tmp_path / "out", "program")


def test_a_place_below_a_file_is_refused_before_any_work(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(FtcError, match="thesis.txt is a file, so nothing can be written"):
        check_replaceable(tmp_path / "thesis.txt" / "a" / "b", "program")
    with pytest.raises(FtcError, match="thesis.txt is a file; name a folder"):
        check_replaceable(tmp_path / "thesis.txt", "program")


@pytest.mark.skipif(os.geteuid() == 0, reason="the root user may write anywhere")
def test_a_place_that_may_not_be_written_is_refused_before_any_work(tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(FtcError, match="you may not write in"):
        check_replaceable(tmp_path / "locked" / "out", "program")


def no_room(*_arguments, **_options):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_failed_write_leaves_neither_a_file_nor_new_folders(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", no_room)
    with pytest.raises(FtcFailure, match=f"could not write {tmp_path / 'a' / 'b' / 'c'}: No space left.*free space"):
        atomic_write(tmp_path / "a" / "b" / "c", "text")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "error", [FtcFailure("no"), KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")]
)
def test_a_failed_folder_leaves_nothing_or_the_old_one(tmp_path, error):
    for old in (None, folder_of(tmp_path / "old" / "out", "program")):
        path = old or tmp_path / "new" / "deep" / "out"
        with pytest.raises((FtcFailure, KeyboardInterrupt)), atomic_folder(path, "program") as folder:
            (folder / "half").write_text("half")
            raise error
    assert [str(p.relative_to(tmp_path)) for p in sorted(tmp_path.rglob("*"))] == [
        "old",
        "old/out",
        f"old/out/{MARKER}",
    ]


def test_a_failure_names_the_folder_and_not_its_temporary_sibling(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", no_room)
    with (
        pytest.raises(FtcFailure, match=f"could not write {tmp_path / 'out' / 'weights'}: "),
        atomic_folder(tmp_path / "out", "program") as folder,
    ):
        atomic_write(folder / "weights", b"0")


@pytest.mark.parametrize("there", [True, False])
def test_a_folder_is_empty_again_after_wrong_input_but_not_after_a_failure(tmp_path, there):
    out = tmp_path / "a" / "out"
    if there:
        out.mkdir(parents=True)
    with pytest.raises(FtcError), emptied_if_wrong(out):
        atomic_write(out / "half", "half")
        raise FtcError("wrong")
    assert out.is_dir() == there and out.parent.is_dir() == there
    with pytest.raises(FtcFailure), emptied_if_wrong(out):
        atomic_write(out / "half", "half")
        raise FtcFailure("stopped")
    assert (out / "half").is_file()
    with pytest.raises(FtcError), emptied_if_wrong(out):
        raise FtcError("wrong")
    assert (out / "half").is_file()


def test_leftovers_of_a_killed_process_go(tmp_path):
    (tmp_path / ".out.abc").mkdir()
    (tmp_path / ".out.def").write_text("half")
    (tmp_path / ".other.abc").mkdir()
    remove_leftovers(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == [".other.abc"]
