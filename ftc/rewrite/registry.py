"""Finding passes by name: those in `ftc.passes`, one a file, and third parties' through the entry point group `ftc.passes`."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.metadata
import pkgutil
import re
import tomllib
import typing
from dataclasses import dataclass

from ftc.errors import FtcError, nearest
from ftc.rewrite.passes import CONTRACTS, check_expectation


@dataclass(frozen=True)
class PassInfo:
    """What `ftc passes` shows of a pass. `options` maps a name to (type, default, help)."""

    name: str
    contract: str
    summary: str
    options: dict[str, tuple[str, object, str]]
    inverse: bool
    source: str


@dataclass(frozen=True)
class Request:
    """A pass as asked for: the instance with its options, and the expectation."""

    pass_: object
    expect: str | int

    @property
    def name(self) -> str:
        return self.pass_.name

    def options(self) -> dict[str, object]:
        return {f.name: getattr(self.pass_, f.name) for f in dataclasses.fields(self.pass_)}


@functools.cache
def classes() -> dict[str, type]:
    """Every pass class by name. A third party's class may not take a name that exists: FtcError."""
    import ftc.passes

    found: dict[str, type] = {}
    for module in pkgutil.iter_modules(ftc.passes.__path__):
        for value in vars(importlib.import_module(f"ftc.passes.{module.name}")).values():
            if _is_pass(value) and value.__module__ == f"ftc.passes.{module.name}":
                if value.name.replace("-", "_") != module.name:
                    raise AssertionError(f"{value.name} stands in passes/{module.name}.py")
                found[value.name] = value
    for entry in importlib.metadata.entry_points(group="ftc.passes"):
        value = entry.load()
        if not _is_pass(value):
            raise FtcError(f"entry point {entry.name!r} of group ftc.passes gives {value!r}, not a pass: it needs name, contract, summary, apply")
        if value.name in found and found[value.name] is not value:
            raise FtcError(f"{_package(entry)} registers a pass named {value.name!r}, which exists already; rename it")
        found[value.name] = value
    return found


def _package(entry: importlib.metadata.EntryPoint) -> str:
    return f"{entry.dist.name} ({entry.value})" if entry.dist else entry.value


def _is_pass(value: object) -> bool:
    return (
        isinstance(value, type)
        and dataclasses.is_dataclass(value)
        and isinstance(getattr(value, "name", None), str)
        and getattr(value, "contract", None) in CONTRACTS
        and callable(getattr(value, "apply", None))
    )


def available() -> dict[str, PassInfo]:
    """Every pass that can be named, by name, in alphabetical order."""
    infos = {}
    for name, cls in sorted(classes().items()):
        hints = typing.get_type_hints(cls)
        options = {
            f.name: (_type_name(hints[f.name]), _default(f), str(f.metadata.get("help", ""))) for f in dataclasses.fields(cls)
        }
        infos[name] = PassInfo(name, cls.contract, cls.summary, options, cls.inverse, cls.__module__)
    return infos


def _default(field: dataclasses.Field) -> object:
    if field.default is not dataclasses.MISSING:
        return field.default
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else "required"


def _type_name(hint: object) -> str:
    return hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")


def parse_passes(passes) -> list[Request]:
    """Passes as asked for by name. Takes a list of names, (name, options) pairs and tables with a `name`, or the command
    line's `a,b{option=value,...}`. Pipelines of `ftc.passes` ("raise") stand for their members.

    Raises FtcError for unknown names, options and values of the wrong type, with the nearest valid one.
    """
    from ftc.passes import PIPELINES

    if isinstance(passes, str):
        passes = _split(passes)
    if not isinstance(passes, (list, tuple)):
        raise FtcError(f"passes must be a list or a string like 'fuse-qkv,fuse-gate-up', not {type(passes).__name__}")
    requests = []
    for item in passes:
        if isinstance(item, Request):
            requests.append(item)
            continue
        name, options = _name_and_options(item)
        if name in PIPELINES:
            requests += [make(member, options) for member in PIPELINES[name]]
        else:
            requests.append(make(name, options))
    return requests


def _name_and_options(item) -> tuple[str, dict]:
    if isinstance(item, str):
        if "{" in item:
            pairs = _split(item)
            if len(pairs) == 1:
                return pairs[0] if isinstance(pairs[0], tuple) else (pairs[0], {})
        return item, {}
    if isinstance(item, (tuple, list)) and len(item) == 2 and isinstance(item[0], str) and isinstance(item[1], dict):
        return item[0], dict(item[1])
    if isinstance(item, dict) and isinstance(item.get("name"), str):
        return item["name"], {k: v for k, v in item.items() if k != "name"}
    if _is_pass(type(item)):
        raise FtcError(f"pass {item.name} was given as an object; name it: ({item.name!r}, {{...options}})")
    raise FtcError(f"{item!r} names no pass; write 'name', ('name', {{'option': value}}) or {{name = 'name', option = value}}")


def make(name: str, options: dict) -> Request:
    """One pass with its options checked."""
    from ftc.passes import PIPELINES

    known = classes()
    if name not in known:
        raise FtcError(f"there is no pass {name!r}; {nearest(name, [*known, *PIPELINES])}")
    cls = known[name]
    options = dict(options)
    expect = check_expectation(options.pop("expect", getattr(cls, "default_expect", "some")), name)
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for option, value in options.items():
        if option not in fields:
            raise FtcError(f"pass {name} has no option {option!r}; {nearest(option, [*fields, 'expect'])}")
        if not _fits(value, hints[option]):
            raise FtcError(f"pass {name}: option {option} = {value!r} should be of type {_type_name(hints[option])}")
    missing = [f.name for f in fields.values() if _default(f) == "required" and f.name not in options]
    if missing:
        raise FtcError(f"pass {name} needs the option {missing[0]!r}: write {name}{{{missing[0]}=...}}")
    try:
        return Request(cls(**options), expect)
    except FtcError:
        raise
    except ValueError as error:
        raise FtcError(f"pass {name}: {error}") from error


def _fits(value: object, hint: object) -> bool:
    origin = typing.get_origin(hint)
    if origin is typing.Literal:
        return value in typing.get_args(hint)
    if origin in (typing.Union, type(int | None)):
        return any(_fits(value, part) for part in typing.get_args(hint))
    if hint is type(None):
        return value is None
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    kind = origin or hint
    return isinstance(value, kind) if isinstance(kind, type) else True


_COMMA = re.compile(r",(?![^\[]*\])")  # outside of a list
_ITEM = re.compile(r"\s*([A-Za-z0-9_-]+)\s*(\{[^{}]*\})?\s*(,|$)")


def _split(text: str) -> list:
    """`a,b{rank=4,kind='x'}` as [("a", {}), ("b", {...})]; option values are TOML values, bare words are strings."""
    items, position = [], 0
    while position < len(text):
        found = _ITEM.match(text, position)
        if found is None:
            raise FtcError(f"cannot read the passes {text!r} from {text[position:]!r}; write 'fuse-qkv,other-pass{{option=value}}'")
        options = {}
        for pair in filter(None, (part.strip() for part in _COMMA.split((found[2] or "{}")[1:-1]))):
            key, equals, raw = pair.partition("=")
            if not equals:
                raise FtcError(f"option {pair!r} of pass {found[1]} has no value; write {pair}=value")
            try:
                options[key.strip()] = tomllib.loads(f"v = {raw.strip()}")["v"]
            except tomllib.TOMLDecodeError:
                options[key.strip()] = raw.strip()
        items.append((found[1], options))
        position = found.end()
    if not items:
        raise FtcError("no pass was named; `ftc passes` lists them")
    return items
