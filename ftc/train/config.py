"""The `[ftc]` section of a run's TOML file, as torchtitan's custom config module, and the check of all keys and types."""

import dataclasses
import json
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from ftc.data.source_table import Source
from ftc.errors import FtcError, nearest

try:  # not settable by flags: a list of names and tables, and a table
    from tyro.conf import Suppress as _FromFileOnly
except ImportError:  # the section can be read and checked without torchtitan's dependencies
    _FromFileOnly = "from file only"


@dataclass
class Ftc:
    """What ftc adds to a torchtitan run."""

    model: str = ""
    """A checkpoint to start from (Hugging Face folder, llama2.c file, or a folder that `ftc rewrite` wrote); empty: the preset that [model] flavor names."""
    architecture: Annotated[dict[str, Any], _FromFileOnly] = field(default_factory=dict)
    """Fields of the preset to change, such as hidden_size."""
    data: str = "stdlib"
    """A file or folder of txt, md, py, jsonl or parquet, `stdlib`, or `hf:` with the name or folder of a dataset."""
    sources: Annotated[list[Any], _FromFileOnly] = field(default_factory=list)
    """Instead of `data`: a mixture, one table [[ftc.sources]] each (ftc.data.source_table)."""
    packing: Literal["stream", "documents"] = "stream"
    """`stream`: windows cut from texts one after the other; `documents`: windows filled with whole documents."""
    document_mask: bool = False
    """Attention and positions begin anew with each document of a window."""
    validation_data: str = ""
    """A source of its own for validation; empty: held out of `data` by whole file."""
    validation_fraction: float = 0.1
    tokenizer: str = ""
    """tokenizer.json, tokenizer.bin, or a folder with one; empty: a byte-level BPE is trained on the training text."""
    vocab_size: int = 4096
    """Of the tokenizer that is trained."""
    passes: Annotated[list[Any], _FromFileOnly] = field(default_factory=list)
    """Pass names, or tables with `name` and options, applied before training by the converter `ftc`."""
    trainable: list[str] = field(default_factory=list)
    """Modules or parameters to train (`mtp`, `model.layers.*.mlp`), the rest stays as it is; empty: all (ftc.train.trainable)."""
    loss: Annotated[str | dict[str, Any], _FromFileOnly] = "auto"
    """A loss by name, or a table with `name` and options (ftc.train.losses); `auto`: next-token, or what a pass asks for."""
    initialization: Literal["model", "bigram"] = "model"
    """`bigram`: embedding and head begin as the best bigram model of the training text (ftc.train.initialization)."""
    optimizer: Literal["torchtitan", "muon"] = "torchtitan"
    """`muon`: orthogonalised momentum on the blocks' matrices (lr: muon_lr), AdamW on everything else."""
    muon_lr: float = 0.02
    embedding_lr: float = 0.0
    """AdamW's learning rate of the embedding, with `muon`; 0: that of [optimizer]."""
    validate: bool = True
    """Measure bits per byte on the validation text at the end, beside those of a trigram model."""
    validation_points: int = 10
    """How often to measure a small sample of the validation text during training; 0: only at the end."""
    stop_below: float = 0.0
    """The run ends early, as if its steps were done, when the mean of the last five logged losses is below this; 0: never."""
    pipeline_bounds: list[int] = field(default_factory=list)
    """Where the stages of a pipeline begin, but for the first: indices of regions, `[2, 4]`; empty: cut by measured cost."""
    hang_seconds: float = 0.0
    """After so long without a step's end each rank writes where it stands; 0: half of the timeouts of [comm]; negative: never."""


@dataclass
class ActivationCheckpoint:
    mode: Literal["selective", "full", "memory_budget", "none"] = "none"


@dataclass
class JobConfig:
    """Merged into torchtitan's JobConfig by its ConfigManager (`job.custom_config_module`)."""

    ftc: Ftc = field(default_factory=Ftc)
    activation_checkpoint: ActivationCheckpoint = field(default_factory=ActivationCheckpoint)


def check_values(config_class: type, values: dict[str, Any], where: str = "") -> None:
    """Raise FtcError for the first key of the TOML `values` that `config_class` lacks, or whose value has the wrong type."""
    fields = {f.name: f for f in dataclasses.fields(config_class)}
    for key, value in values.items():
        place = f"{where}.{key}" if where else key
        if key not in fields:
            kind = "key" if where else "section"
            raise FtcError(f"unknown {kind} {place!r}; {nearest(key, fields)}")
        wanted = fields[key].type
        if dataclasses.is_dataclass(wanted):
            if not isinstance(value, dict):
                raise FtcError(f"{place} is {value!r}, but it is a section: write [{place}]")
            check_values(wanted, value, place)
        elif not _fits(value, wanted):
            raise FtcError(f"{place} is {value!r}; it must be {_describe(wanted)}")


def check_passes(passes: list[Any]) -> None:
    """Raise FtcError for an entry that is neither a name nor a table with a name; the registry checks names and options."""
    for entry in passes:
        if not isinstance(entry, str) and not (isinstance(entry, dict) and isinstance(entry.get("name"), str)):
            raise FtcError(f'ftc.passes holds {entry!r}; an entry is "name" or {{ name = "...", option = value }}')


def differences(
    old: Mapping[str, Any], new: Mapping[str, Any], free_sections: Sequence[str] = (), free_keys: Sequence[str] = ()
) -> dict[str, str]:
    """The keys, section.name, in which two configurations differ, each with both values, but for those that are free to."""
    found = {}
    for section in sorted(set(old) | set(new)):
        if section not in free_sections:
            before, after = old.get(section, {}), new.get(section, {})
            for key in sorted(set(before) | set(after)):
                if before.get(key) != after.get(key) and f"{section}.{key}" not in free_keys:
                    found[f"{section}.{key}"] = f"{section}.{key} ({before.get(key)!r}, now {after.get(key)!r})"
    return found


def sources_of(section: Mapping[str, Any]) -> list[Source]:
    """The sources that the `[ftc]` table `section` names: its `sources`, or `data` as the only one.

    Raises FtcError for unknown keys, values of the wrong type, and `data` beside `sources`.
    """
    tables = section.get("sources", [])
    if not tables:
        return [Source(section.get("data", Ftc.data), validation=section.get("validation_data", ""))]
    for key, instead in (("data", "path"), ("validation_data", "validation")):
        if section.get(key, getattr(Ftc, key)) != getattr(Ftc, key):
            raise FtcError(f"ftc.{key} stands beside [[ftc.sources]]; leave it out and give each source its {instead}")
    sources = []
    for number, table in enumerate(tables, 1):
        place = f"ftc.sources[{number}]"
        if not isinstance(table, dict):
            raise FtcError(f"{place} is {table!r}; a source is a table: write [[ftc.sources]]")
        check_values(Source, table, place)
        if "path" not in table:
            raise FtcError(f"{place} has no path; name a file, a folder, stdlib or hf:NAME")
        sources.append(Source(**table))
    return sources


def _fits(value: Any, wanted: Any) -> bool:
    origin, arguments = typing.get_origin(wanted), typing.get_args(wanted)
    if origin is Annotated:
        return _fits(value, arguments[0])
    if wanted is Any:
        return True
    if origin is Literal:
        return value in arguments
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, argument) for argument in arguments)
    if origin is list:
        return isinstance(value, list) and all(_fits(item, arguments[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict)
    if wanted is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if wanted is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, wanted) if isinstance(wanted, type) else True


def _describe(wanted: Any) -> str:
    if typing.get_origin(wanted) is Annotated:
        return _describe(typing.get_args(wanted)[0])
    if typing.get_origin(wanted) is Literal:
        return "one of " + ", ".join(map(str, typing.get_args(wanted)))
    names = {str: "a string", int: "a whole number", float: "a number", bool: "true or false"}
    return names.get(wanted, f"of type {wanted}")


def read_toml(path: str | Path) -> dict[str, Any]:
    """The file's tables; raises FtcError naming the file when it is missing or broken."""
    import tomllib

    try:
        return tomllib.loads(Path(path).read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise FtcError(f"cannot read the run file {path}: {error}") from error
    except tomllib.TOMLDecodeError as error:
        raise FtcError(f"{path} is not valid TOML: {error}") from error


def dump_toml(values: dict[str, Any]) -> str:
    """`values` (tables of strings, numbers, booleans, lists and tables, None left out) as TOML text."""
    top, tables = [], []
    _dump_table(values, "", top, tables)
    return "\n".join(top + tables) + "\n"


def _dump_table(values: dict[str, Any], path: str, top: list[str], tables: list[str]) -> None:
    lines = [
        f"{_key(key)} = {_toml(value)}"
        for key, value in values.items()
        if not isinstance(value, dict) and value is not None
    ]
    if path:
        tables.append(f"\n[{path}]")
        tables.extend(lines)
    else:
        top.extend(lines)
    for key, value in values.items():
        if isinstance(value, dict):
            _dump_table(value, f"{path}.{_key(key)}" if path else _key(key), top, tables)


def _key(key: str) -> str:
    return key if key.replace("_", "a").replace("-", "a").isalnum() and key.isascii() else _string(key)


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{_key(key)} = {_toml(item)}" for key, item in value.items()) + " }"
    return _string(str(value))


def _string(text: str) -> str:
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
