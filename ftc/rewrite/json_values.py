"""Arguments and targets of graph nodes as JSON, and back without importing or running anything that a file names.

Scalars that JSON has stand for themselves; everything else is a table of one kind: `{"tuple": [...]}`, `{"dtype": "float32"}`.
"""

import math
import operator
import re
from collections.abc import Callable

import torch
from torch import fx

import ftc.dialect  # noqa: F401  (registers the ftc:: operators)
from ftc.errors import FtcError

_OPERATORS = "add sub mul truediv floordiv mod pow neg pos abs eq ne lt le gt ge and_ or_ xor not_ invert lshift rshift getitem index truth is_ is_not"
_SYM = "sym_int sym_float sym_max sym_min sym_ite sym_not sym_sum sym_sqrt _sym_sqrt sym_fresh_size"
PYTHON_FUNCTIONS: dict[str, Callable] = (
    {f"operator.{name}": getattr(operator, name) for name in _OPERATORS.split()}
    | {f"math.{name}": value for name, value in vars(math).items() if callable(value)}
    | {f"torch.{name}": getattr(torch, name) for name in _SYM.split() if hasattr(torch, name)}
)
_PYTHON_NAMES = {function: name for name, function in PYTHON_FUNCTIONS.items()}
_OPERATOR = re.compile(r"([A-Za-z_]\w*)\.([A-Za-z_]\w*)\.([A-Za-z_]\w*)", re.ASCII)
_IDENTIFIER = re.compile(r"[A-Za-z_]\w*", re.ASCII)
_DOTTED = re.compile(r"[^\"'\\\x00-\x1f]+")
_TORCH_KINDS = {"dtype": torch.dtype, "layout": torch.layout, "memory_format": torch.memory_format}


def _constants() -> dict[str, type]:
    from ftc.capture.masks import CausalMask

    return {"CausalMask": CausalMask}


def corrupt(what: str) -> FtcError:
    """The error for a graph file that says what no graph file says."""
    return FtcError(
        f"{what}; the file is corrupt or was not written by this version of ftc: write it again from the model"
    )


def identifier(text: object) -> str:
    """`text` when it can name an input (it ends up in generated code); FtcError otherwise."""
    if not isinstance(text, str) or not _IDENTIFIER.fullmatch(text):
        raise corrupt(f"{str(text)[:80]!r} cannot name an input of a graph")
    return text


def dotted(text: object) -> str:
    """`text` when it can name a parameter or a module; FtcError otherwise."""
    if not isinstance(text, str) or not _DOTTED.fullmatch(text):
        raise corrupt(f"{str(text)[:80]!r} cannot name a parameter or a module")
    return text


def target_text(node: fx.Node) -> str:
    """What a node calls or names, as text. Raises FtcError for a function that no file can hold."""
    target = node.target
    if isinstance(target, str):
        return target
    if isinstance(target, torch._ops.OpOverload):
        return str(target)
    if target in _PYTHON_NAMES:
        return _PYTHON_NAMES[target]
    raise FtcError(f"node {node.name} calls {target!r}, which a graph file cannot hold; use an operator of torch.ops")


def read_target(text: object) -> Callable:
    """The function that `target_text` named: an operator that is registered already, or one of `PYTHON_FUNCTIONS`."""
    if isinstance(text, str) and text in PYTHON_FUNCTIONS:
        return PYTHON_FUNCTIONS[text]
    found = _OPERATOR.fullmatch(text) if isinstance(text, str) else None
    if found is None:
        raise corrupt(f"{str(text)[:80]!r} is not an operator")
    namespace, name, overload = found.groups()
    try:
        schema = torch._C._get_schema(f"{namespace}::{name}", "" if overload == "default" else overload)
    except RuntimeError:
        raise FtcError(
            f"this PyTorch has no operator {text}; import the package that registers it, or use the versions named in ftc.json"
        ) from None
    if any(argument.name in ("filename", "path") for argument in schema.arguments):
        raise corrupt(f"operator {text} works on files, which no graph does")
    return getattr(getattr(getattr(torch.ops, namespace), name), overload)


def to_json(value: object, node_ref: Callable[[fx.Node], object]) -> object:
    """One argument as JSON; `node_ref` says what stands for a node. Raises FtcError for what no file can hold."""

    def each(items):
        return [to_json(item, node_ref) for item in items]

    if isinstance(value, fx.Node):
        return {"node": node_ref(value)}
    if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        value = _number(value)
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": str(value)}
    if isinstance(value, complex):
        return {"complex": [to_json(value.real, node_ref), to_json(value.imag, node_ref)]}
    if isinstance(value, tuple):
        return {"tuple": each(value)}
    if isinstance(value, list):
        return {"list": each(value)}
    if isinstance(value, dict):
        return {"dict": [each(pair) for pair in value.items()]}
    if isinstance(value, slice):
        return {"slice": each((value.start, value.stop, value.step))}
    for kind, cls in _TORCH_KINDS.items():
        if isinstance(value, cls):
            return {kind: str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    if getattr(value, "ftc_constant", False) and type(value) is _constants().get(type(value).__name__):
        return {"constant": type(value).__name__, "value": to_json(value.as_dict(), node_ref)}
    raise FtcError(
        f"a graph holds a {type(value).__name__} ({str(value)[:60]}), which a file cannot hold; pass tensors and plain values"
    )


def _number(value):
    if not value.node.expr.is_number:
        raise FtcError(f"a graph holds the size {value} outside its nodes; report the pass that put it there")
    kind = {torch.SymInt: int, torch.SymFloat: float, torch.SymBool: bool}[type(value)]
    return kind(value.node.expr)


def from_json(value: object, nodes: Callable[[object], fx.Node]) -> object:
    """What `to_json` wrote; `nodes` finds a node by what stood for it. Raises FtcError for anything else."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    try:
        if len(value) == 2 and "constant" in value:
            return _read_constant(value["constant"], from_json(value["value"], nodes))
        ((kind, inner),) = value.items()
        return _read(kind, inner, nodes)
    except FtcError:
        raise
    except Exception as error:
        raise corrupt(f"{str(value)[:80]} is not an argument ({error})") from error


def _read(kind: str, inner: object, nodes: Callable[[object], fx.Node]) -> object:
    def each(items):
        return [from_json(item, nodes) for item in items]

    if kind == "node":
        return nodes(inner)
    if kind == "float":
        return {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}[inner]
    if kind == "complex":
        real, imaginary = each(inner)
        return complex(real, imaginary)
    if kind == "tuple":
        return tuple(each(inner))
    if kind == "list":
        return each(inner)
    if kind == "dict":
        return dict(each(pair) for pair in inner)
    if kind == "slice":
        start, stop, step = each(inner)
        return slice(start, stop, step)
    if kind in _TORCH_KINDS:
        return torch_value(kind, inner)
    if kind == "device":
        return torch.device(inner)
    raise corrupt(f"{kind!r} is not a kind of argument")


def torch_value(kind: str, name: object) -> object:
    """`torch.<name>` when it is a dtype, layout or memory format; FtcError otherwise."""
    value = getattr(torch, name, None) if isinstance(name, str) else None
    if not isinstance(value, _TORCH_KINDS[kind]):
        raise corrupt(f"{str(name)[:40]!r} is not a {kind}")
    return value


def _read_constant(kind: object, data: dict) -> object:
    cls = _constants().get(kind)
    if cls is None:
        raise corrupt(f"{str(kind)[:40]!r} is not a kind of constant")
    torch_value("dtype", data["dtype"])
    plain = all(value is None or type(value) in (bool, int, float) for value in (data["window"], data["blocked"]))
    sizes = all(type(part) is int for size in data["shape"] for part in (size if isinstance(size, list) else [size]))
    if not plain or not sizes:
        raise corrupt(f"{str(data)[:80]} is not a {kind}")
    return cls.from_dict(data)
