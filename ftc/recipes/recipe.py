"""Read a recipe and check all of it before anything runs."""

import re
import tomllib
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from ftc.errors import FtcError, nearest
from ftc.recipes.stage import REFERENCE, Stage, is_word, make_stage, places, split_reference

_NAME = re.compile(r"[a-z0-9][a-z0-9_-]*")
_RECIPE_KEYS = {"name": str, "title": str, "description": str}


@dataclass(frozen=True)
class Recipe:
    """A checked recipe. `base` is the folder that relative paths start from, `text` the file's own text."""

    name: str
    title: str
    description: str
    stages: tuple[Stage, ...]
    base: Path
    text: str


def shipped_recipes() -> dict[str, Path]:
    """The recipes that come with ftc, by name."""
    folder = Path(str(resources.files("ftc.recipes")))
    return {path.stem: path for path in sorted(folder.glob("*.toml"))}


def load_recipe(recipe: str | Path) -> Recipe:
    """Read a recipe from a file, or a shipped one by name.

    Raises FtcError for a file that is missing or no TOML, an unknown key, kind, reference or stage name, a value of the
    wrong type, a missing input file, and whatever a stage's own check finds.
    """
    path = Path(recipe)
    if not path.is_file():
        shipped = shipped_recipes()
        if str(recipe) not in shipped:
            raise FtcError(
                f"there is no recipe {str(recipe)!r}: neither a file nor a shipped one; {nearest(str(recipe), shipped)}"
            )
        path = shipped[str(recipe)]
    try:
        text = path.read_text(encoding="utf-8")
        values = tomllib.loads(text)
    except OSError as error:
        raise FtcError(f"cannot read the recipe {path}: {error.strerror}") from error
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise FtcError(f"the recipe {path} is not valid TOML: {error}") from error
    return parse_recipe(values, path.absolute().parent, text, default_name=path.stem)


def parse_recipe(values: dict[str, Any], base: Path, text: str = "", default_name: str = "recipe") -> Recipe:
    """The recipe in the tables `values`, checked; `base` is where its relative paths start."""
    for key in values:
        if key not in ("recipe", "stage"):
            raise FtcError(f"unknown section {key!r} in the recipe; {nearest(key, ('recipe', 'stage'))}")
    head = values.get("recipe", {})
    if not isinstance(head, dict):
        raise FtcError("recipe is not a table; write [recipe] with name, title and description")
    for key, value in head.items():
        if key not in _RECIPE_KEYS:
            raise FtcError(f"unknown key recipe.{key}; {nearest(key, _RECIPE_KEYS)}")
        if not isinstance(value, str):
            raise FtcError(f"recipe.{key} is {value!r}; it must be a string")
    tables = values.get("stage", [])
    if not isinstance(tables, list) or not tables or not all(isinstance(table, dict) for table in tables):
        raise FtcError("the recipe has no stages; write each one as a table [[stage]] with kind and name")
    stages = tuple(make_stage(table, f"stage {number}") for number, table in enumerate(tables, 1))
    name = head.get("name", default_name)
    _check_name(name, "recipe.name")
    _check_stages(stages, base)
    return Recipe(name, head.get("title", name), head.get("description", ""), stages, base, text)


def _check_name(name: str, where: str) -> None:
    if not _NAME.fullmatch(name):
        raise FtcError(f"{where} is {name!r}; use lower-case letters, digits, - and _ (it names a folder)")


def _check_stages(stages: tuple[Stage, ...], base: Path) -> None:
    earlier: dict[str, Stage] = {}
    names = [stage.name for stage in stages]
    for stage in stages:
        _check_name(stage.name, f"the name of a stage of kind {stage.kind}")
        if stage.name in earlier:
            raise FtcError(f"two stages are named {stage.name!r}; give one of them another name")
        for key, (values, option) in places(stage).items():
            for value in values:
                where = f"stage {stage.name!r}: {key} = {value!r}"
                if value.startswith(REFERENCE):
                    _check_reference(*split_reference(value, option), where, earlier, names)
                elif not is_word(value, option) and not (base / Path(value).expanduser()).exists():
                    raise FtcError(f"{where}: nothing is there (relative paths start at the recipe's folder, {base})")
        try:
            stage.check(base)
        except FtcError as error:
            raise FtcError(f"stage {stage.name!r}: {error}") from error
        earlier[stage.name] = stage


def _check_reference(stage: str, output: str, where: str, earlier: dict[str, Stage], names: list[str]) -> None:
    if stage not in earlier:
        later = "comes later; move it up" if stage in names else f"is not in the recipe; {nearest(stage, earlier)}"
        raise FtcError(f"{where}: the stage {stage!r} {later}")
    if output not in earlier[stage].outputs:
        raise FtcError(f"{where}: {stage!r} makes no {output!r}; {nearest(output, earlier[stage].outputs)}")
