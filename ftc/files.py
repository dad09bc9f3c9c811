"""Writing files so that an interrupted or failed write leaves what was there before, or nothing."""

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from ftc.errors import FtcError, FtcFailure

MARKER = "ftc.json"  # a folder is ours, and may be replaced, exactly when it holds this file


def atomic_write(path: str | Path, content: str | bytes) -> None:
    """Write `content` to `path` in one step: a reader sees the old file or the new one, never half of it.

    Raises FtcFailure when the disk is full or not writable; the old file then still stands.
    """
    path = Path(path)
    data = content.encode() if isinstance(content, str) else content
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        os.chmod(temporary, 0o666 & ~_umask())
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        raise FtcFailure(f"could not write {path}: {error.strerror or error}; free space or choose another place") from error


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def check_replaceable(path: str | Path) -> None:
    """Raise FtcError when `path` exists and holds something that ftc did not write (no `ftc.json` in it)."""
    path = Path(path)
    if path.is_file():
        raise FtcError(f"{path} is a file; name a folder that does not exist yet, or one that ftc wrote")
    if path.is_dir() and any(path.iterdir()) and not (path / MARKER).is_file():
        raise FtcError(f"{path} holds files that ftc did not write; name another folder, or empty this one first")


@contextlib.contextmanager
def atomic_folder(path: str | Path, kind: str) -> Iterator[Path]:
    """Fill a temporary sibling of `path` and rename it into place on success; on any error nothing is left behind.

    `kind` goes into the folder's `ftc.json` unless the body wrote one. Replaces an earlier folder of ours only.
    """
    path = Path(path)
    check_replaceable(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
        os.chmod(temporary, 0o777 & ~_umask())
    except OSError as error:
        raise FtcFailure(f"could not create {path}: {error.strerror or error}") from error
    try:
        yield temporary
        if not (temporary / MARKER).exists():
            atomic_write(temporary / MARKER, json.dumps({"kind": kind}) + "\n")
        old = None
        if path.exists():
            old = path.with_name(f".{path.name}.old-{os.getpid()}")
            os.replace(path, old)
        os.replace(temporary, path)
        if old is not None:
            shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise FtcFailure(f"could not write {path}: {error.strerror or error}; nothing was left behind") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
