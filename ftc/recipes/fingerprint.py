"""What a stage's result depends on, as one hash: options, inputs, the content of files, and ftc's version."""

import dataclasses
import hashlib
import json
import platform
from collections.abc import Mapping
from pathlib import Path

import ftc
from ftc.data.huggingface import PREFIX
from ftc.errors import FtcFailure
from ftc.recipes.stage import REFERENCE, Stage, is_word, places, split_reference

_CHUNK_BYTES = 1 << 20


def stage_fingerprint(stage: Stage, base: Path, made_by: Mapping[str, str]) -> str:
    """The hash of everything that decides what `stage` makes; `made_by` gives the id of each finished stage's result."""
    options = {
        option.name: getattr(stage, option.name) for option in dataclasses.fields(stage) if option.name != "name"
    }
    for key, (values, option) in places(stage).items():
        options[key] = [_identity(value, option, base, made_by) for value in values]
    content = {
        "kind": stage.kind,
        "version": stage.version,
        "ftc": ftc.__version__,
        "options": options,
        "also": stage.depends_on(base),
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def content_hash(path: Path) -> str:
    """The hash of a file, or of the names and contents of all files in a folder (hidden ones left out)."""
    digest = hashlib.sha256()
    try:
        if path.is_file():
            _add(digest, path)
        else:
            for file in sorted(path.rglob("*")):
                name = file.relative_to(path)
                if file.is_file() and not any(part.startswith(".") for part in name.parts):
                    digest.update(f"\0{name.as_posix()}\0".encode())
                    _add(digest, file)
    except OSError as error:
        raise FtcFailure(f"could not read {path}: {error.strerror or error}") from error
    return digest.hexdigest()


def named_hash(value: str, base: Path) -> str:
    """`content_hash` of the place `value`; a word such as stdlib stands for itself and this Python."""
    path = base / Path(value.removeprefix(PREFIX)).expanduser()
    return content_hash(path) if path.exists() else f"{value} on Python {platform.python_version()}"


def _identity(value: str, option: dataclasses.Field, base: Path, made_by: Mapping[str, str]) -> str:
    if value.startswith(REFERENCE):
        stage, output = split_reference(value, option)
        return f"{made_by[stage]}.{output}"
    if is_word(value, option):
        return f"{value} on Python {platform.python_version()}"
    return content_hash(base / Path(value).expanduser())


def _add(digest, path: Path) -> None:
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
