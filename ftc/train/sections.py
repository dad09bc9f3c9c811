"""The sections and keys that a run file may have, read from torchtitan's source: importing torchtitan takes seconds."""

import ast
import dataclasses
import importlib.util
import json
import os
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, Literal

from ftc.errors import FtcError
from ftc.train.config import JobConfig, check_values


def check_sections(values: dict[str, Any]) -> None:
    """Raise FtcError for the first section or key of a run file that neither torchtitan nor ftc has, or a value of the
    wrong type. Where torchtitan's source is not as expected, nothing is checked: the run itself checks it again."""
    config = _run_config()
    if config is not None:
        check_values(config, values)
    check_loggers(values.get("metrics", {}))


_LOGGERS = {"enable_tensorboard": ("tensorboard", "train"), "enable_wandb": ("wandb", "wandb")}  # key: package, extra


def check_loggers(metrics: Mapping[str, Any]) -> None:
    """Raise FtcError for a logger of `[metrics]` whose package is missing: torchtitan would train on without it."""
    for key, (package, extra) in _LOGGERS.items():
        if metrics.get(key) and importlib.util.find_spec(package) is None:
            raise FtcError(f"metrics.{key} needs {package}, which is not installed: pip install 'ftc[{extra}]'")


@cache
def _run_config() -> type | None:
    found = importlib.util.find_spec("torchtitan")
    if found is None or not found.submodule_search_locations:
        raise FtcError("training needs torchtitan, which is not installed: pip install 'ftc[train]'")
    source = Path(found.submodule_search_locations[0]) / "config" / "job_config.py"
    # Only the classes are run: they are plain dataclasses, while the file's imports pull in all of torchtitan.
    names: dict[str, Any] = {"__name__": __name__, "dataclass": dataclasses.dataclass, "field": dataclasses.field}
    names |= {"Any": Any, "Literal": Literal, "json": json, "os": os}
    try:
        tree = ast.parse(source.read_text(encoding="utf-8"))
        tree.body = [node for node in tree.body if isinstance(node, ast.ClassDef)]
        exec(compile(tree, str(source), "exec"), names)
        return _merged(names["JobConfig"], JobConfig)
    except Exception:  # another version of torchtitan may write it in any way
        return None


def _merged(base: type, ours: type) -> type:
    """The dataclass with the fields of both; where both have a section, with the keys of both, as torchtitan merges them."""
    kinds = {field.name: field.type for field in dataclasses.fields(base)}
    for field in dataclasses.fields(ours):
        both = dataclasses.is_dataclass(field.type) and dataclasses.is_dataclass(kinds.get(field.name))
        kinds[field.name] = _merged(kinds[field.name], field.type) if both else field.type
    return dataclasses.make_dataclass(base.__name__, [(name, kind, None) for name, kind in kinds.items()])
