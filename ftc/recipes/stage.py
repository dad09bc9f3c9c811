"""A stage of a recipe: a frozen dataclass whose fields are its options, and the registry of kinds."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, ClassVar

from ftc.errors import FtcError, nearest

ENTRY_POINT_GROUP = "ftc.stages"
REFERENCE = "@"  # "@train" is what the stage named train made


def place(output: str, default: Any = dataclasses.MISSING, *, words: tuple[str, ...] = ()) -> Any:
    """A field that names something on disk (a path, or a list of paths), or what an earlier stage made.

    `output`: which output of the stage "@name" stands for; "@name.other" asks for another one. `words` are values, or
    prefixes ending in a colon, that are no paths, such as "stdlib" and "preset:". Paths are relative to the recipe.
    """
    metadata = {"output": output, "words": words}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata) if default is not dataclasses.MISSING else field(metadata=metadata)


@dataclass(frozen=True)
class Result:
    """What a finished stage leaves: JSON-ready, kept in its stage.json.

    outputs: name -> path relative to the stage's folder. report: what report.html shows of it (see ftc.report_html).
    """

    outputs: dict[str, str] = field(default_factory=dict)
    report: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Context:
    """Where a stage runs: an empty folder of its own (or, when `resumable`, the one an interrupted run left)."""

    folder: Path
    base: Path  # the recipe's folder
    quiet: bool = False


@dataclass(frozen=True)
class Stage:
    """Base of all stages. Subclass it, set the class variables, add fields as options, and write `run`."""

    name: str

    kind: ClassVar[str] = ""
    summary: ClassVar[str] = ""
    outputs: ClassVar[tuple[str, ...]] = ()  # names that later stages may refer to
    resumable: ClassVar[bool] = False  # True: `run` can continue in the folder that an interrupted run left
    version: ClassVar[int] = 1  # raised when the stage gives other results for the same options

    def check(self, base: Path) -> None:
        """Raise FtcError for options that cannot work, before any stage has run. `base` is the recipe's folder.

        References are not resolved yet.
        """

    def depends_on(self, base: Path) -> Any:
        """JSON-ready: what else than the options, inputs and files named by them decides the result."""
        return None

    def run(self, context: Context) -> Result:
        """Do the work in `context.folder`; every place among the options is an absolute path by now."""
        raise NotImplementedError


@cache
def stage_kinds() -> dict[str, type[Stage]]:
    """Every kind of stage by name: ours, then those that installed packages add as entry points of `ftc.stages`."""
    from ftc.recipes.stages import STAGES

    kinds: dict[str, type[Stage]] = {stage.kind: stage for stage in STAGES}
    for point in entry_points(group=ENTRY_POINT_GROUP):
        if point.name in kinds:
            raise FtcError(
                f"the package {point.dist and point.dist.name} adds the stage kind {point.name!r}, which exists already"
            )
        kinds[point.name] = point.load()
    return kinds


def make_stage(values: Mapping[str, Any], where: str) -> Stage:
    """The stage that one `[[stage]]` table describes. Raises FtcError for an unknown kind or key and for wrong types."""
    from ftc.train.config import check_values

    values = dict(values)
    kind = values.pop("kind", None)
    kinds = stage_kinds()
    if kind is None:
        raise FtcError(f"{where} has no kind; {nearest('', kinds)}")
    if kind not in kinds:
        raise FtcError(f"{where} has the unknown kind {kind!r}; {nearest(str(kind), kinds)}")
    where = f"{where} ({kind})"
    values.setdefault("name", kind)
    try:
        check_values(kinds[kind], values, kind)
    except FtcError as error:
        raise FtcError(f"{where}: {str(error).replace(f'{kind}.', '', 1)}") from None
    for option in dataclasses.fields(kinds[kind]):
        required = option.default is dataclasses.MISSING and option.default_factory is dataclasses.MISSING
        if required and option.name not in values:
            raise FtcError(f"{where} lacks the key {option.name!r}")
    return kinds[kind](**values)


def places(stage: Stage) -> dict[str, tuple[list[str], dataclasses.Field]]:
    """The fields of `stage` made by `place` that have a value: name -> (values as a list, field)."""
    found = {}
    for option in dataclasses.fields(stage):
        if "output" in option.metadata:
            value = getattr(stage, option.name)
            values = list(value) if isinstance(value, list | tuple) else [value] if value else []
            if values:
                found[option.name] = (values, option)
    return found


def is_word(value: str, option: dataclasses.Field) -> bool:
    """Whether `value` is one of the words that a place takes instead of a path."""
    words = option.metadata["words"]
    return any(value.startswith(word) if word.endswith(":") else value == word for word in words)


def split_reference(value: str, option: dataclasses.Field) -> tuple[str, str]:
    """ "@train.tokenizer" as ("train", "tokenizer"), "@train" with the field's own output."""
    stage, _, output = value.removeprefix(REFERENCE).partition(".")
    return stage, output or option.metadata["output"]
