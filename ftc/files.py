"""Writing files so that an interrupted or failed write leaves what was there before, or nothing."""

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from ftc.errors import FtcError, FtcFailure

MARKER = "ftc.json"  # a folder is ours, and may be replaced, exactly when it holds this file
_KINDS = {
    "program": "a program that ftc saved",
    "huggingface": "a model that ftc saved",
    "train": "a training run",
    "run": "the run of a recipe",
    "stage": "a stage of a recipe's run",
    "sweep": "a sweep",
    "plan": "a plan",
}


def atomic_write(path: str | Path, content: str | bytes) -> None:
    """Write `content` to `path` in one step: a reader sees the old file or the new one, never half of it.

    Raises FtcFailure when the disk is full or not writable; the old file then still stands.
    """
    path = Path(path)
    data = content.encode() if isinstance(content, str) else content
    try:
        with made_parents(path), _removed_on_error() as made:
            handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
            made.append(Path(temporary))
            os.chmod(temporary, 0o666 & ~_umask())
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
    except OSError as error:
        raise could_not_write(path, error) from error


def could_not_write(path: str | Path, error: OSError) -> FtcFailure:
    """The failure for a write to `path` that the system refused."""
    return FtcFailure(f"could not write {path}: {error.strerror or error}; free space or choose another place")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@contextlib.contextmanager
def made_parents(path: Path) -> Iterator[None]:
    """The folders above `path`; those that were missing go again when the body fails."""
    missing = [folder for folder in path.parents if not folder.exists()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for folder in missing:  # innermost first; one that holds something by now stays
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise


@contextlib.contextmanager
def _removed_on_error() -> Iterator[list[Path]]:
    """A list of files and folders that are removed when the body fails."""
    made: list[Path] = []
    try:
        yield made
    except BaseException:
        for path in made:
            _remove(path)
        raise


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def folder_kind(path: str | Path) -> str | None:
    """What `ftc.json` says that the folder is ("program", "run", ...); None without one, or where it cannot be read."""
    try:
        return json.loads((Path(path) / MARKER).read_text()).get("kind")
    except (OSError, ValueError, AttributeError):
        return None


def check_replaceable(path: str | Path, kind: str | None = None) -> None:
    """Raise FtcError when `path` cannot become a folder of ours: it holds something that ftc did not write (no `ftc.json`
    in it), or something of another `kind`, or it lies below a file or in a folder that cannot be written to."""
    path = Path(path)
    if path.is_file():
        raise FtcError(f"{path} is a file; name a folder that does not exist yet, or one that ftc wrote")
    above = path if path.is_dir() else next(folder for folder in path.absolute().parents if folder.exists())
    if not above.is_dir():
        raise FtcError(f"{above} is a file, so nothing can be written to {path}; name another folder")
    if not os.access(above, os.W_OK | os.X_OK):
        raise FtcError(f"you may not write in {above}; name another folder than {path}")
    if not path.is_dir() or not any(path.iterdir()):
        return
    if not (path / MARKER).is_file():
        raise FtcError(f"{path} holds files that ftc did not write; name another folder, or empty this one first")
    found = folder_kind(path)
    if kind is not None and found != kind:
        holds = _KINDS.get(
            found, f"an {MARKER} that cannot be read" if found is None else f"something of kind {found!r}"
        )
        raise FtcError(
            f"{path} holds {holds}, which {_KINDS.get(kind, kind)} must not replace; name another folder, or remove "
            "that one first"
        )


@contextlib.contextmanager
def atomic_folder(path: str | Path, kind: str, *, replaces_any: bool = False) -> Iterator[Path]:
    """Fill a temporary sibling of `path` and rename it into place on success; on any error nothing is left behind.

    `kind` goes into the folder's `ftc.json` unless the body wrote one. Replaces an earlier folder of the same kind, or with
    `replaces_any` one of any kind, of ours only. Failures name `path`, not the sibling.
    """
    path = Path(path)
    check_replaceable(path, None if replaces_any else kind)
    made: list[Path] = []
    try:
        with made_parents(path), _removed_on_error() as made:
            temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
            made.append(temporary)
            os.chmod(temporary, 0o777 & ~_umask())
            yield temporary
            if not (temporary / MARKER).exists():
                atomic_write(temporary / MARKER, json.dumps({"kind": kind}) + "\n")
            _swap(temporary, path)
    except OSError as error:
        raise could_not_write(path, error) from error
    except FtcFailure as error:
        if not made or str(made[0]) not in str(error):
            raise
        raise type(error)(str(error).replace(str(made[0]), str(path))) from error


def _swap(temporary: Path, path: Path) -> None:
    """Put the folder `temporary` in the place of `path`, which goes."""
    old = path.with_name(f".{path.name}.old-{os.getpid()}")
    had_old = path.exists()
    if had_old:
        os.replace(path, old)
    try:
        os.replace(temporary, path)
    except OSError:
        if had_old:
            os.replace(old, path)
        raise
    shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def emptied_if_wrong(folder: str | Path, unless: Callable[[], bool] = lambda: False) -> Iterator[None]:
    """For a folder that is filled step by step: when it was empty or not there, and the body finds the input wrong
    (FtcError), it is so again. Whatever else ends the body leaves what was made, to be continued; so does `unless`."""
    folder = Path(folder)
    there = folder.is_dir()
    if there and any(folder.iterdir()):
        yield
        return
    try:
        with made_parents(folder):
            try:
                yield
            except FtcError:
                if not unless():
                    shutil.rmtree(folder, ignore_errors=True)
                    if there:
                        folder.mkdir()
                raise
    except OSError as error:
        raise could_not_write(folder, error) from error


def remove_leftovers(path: str | Path) -> None:
    """Remove the temporary siblings of `path` that a killed process left. For a place where no other process writes."""
    path = Path(path)
    for left in path.parent.glob(f".{path.name}.*"):
        _remove(left)
