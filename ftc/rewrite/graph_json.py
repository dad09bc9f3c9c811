"""Graphs as JSON and back, and the hash that certificates know them by.

A graph file holds the nodes, the contents of constants, and the size symbols with their example values, ranges and guards.
Reading it gives a graph over a ShapeEnv of its own, whose every `meta["val"]` was found again by running the nodes on fake
tensors. Nothing that a file names is imported or run: see `ftc.rewrite.json_values`.
"""

from __future__ import annotations

import base64
import hashlib
import json
import zlib
from dataclasses import dataclass, field
from pathlib import PurePath

import sympy
import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch.fx.experimental.symbolic_shapes import ShapeGuard
from torch.utils._sympy.numbers import int_oo
from torch.utils._sympy.value_ranges import ValueRanges

from ftc.capture.captured import CapturedGraph, InputSpec
from ftc.capture.fakes import WiderFakes
from ftc.capture.trace import World
from ftc.errors import FtcError
from ftc.rewrite.json_values import (
    corrupt,
    dotted,
    from_json,
    identifier,
    read_target,
    target_text,
    to_json,
    torch_value,
)
from ftc.rewrite.size_text import print_size, read_size

FORMAT = 1
_OPS = ("placeholder", "get_attr", "call_function", "call_module", "output")
_NO_NAMES = {"name", "source"}


# --------------------------------------------------------------------------------------------------------------- writing


class _Names:
    """The size symbols of a graph under the names s0, s1, ... in the order in which its inputs show them."""

    def __init__(self, graph: fx.Graph, captured: CapturedGraph | None):
        self.env = next((s.node.shape_env for n in graph.nodes for s in _symbolic(n.meta.get("val"))), None)
        found: dict[sympy.Symbol, None] = {}
        places = [n for n in graph.nodes if n.op == "placeholder"] + [
            n for n in graph.nodes if n.op in ("get_attr", "call_module")
        ]
        for node in places:
            for size in _symbolic(node.meta.get("val")):
                found |= dict.fromkeys(sorted(self.replaced(size.node.expr).free_symbols, key=str))
        for spec in captured.inputs if captured else ():
            for size in spec.sizes:
                if isinstance(size, sympy.Basic):
                    found |= dict.fromkeys(sorted(size.free_symbols, key=str))
        width = len(str(max(len(found) - 1, 0)))
        self.symbols = {
            old: sympy.Symbol(f"s{i:0{width}d}", positive=True, integer=True) for i, old in enumerate(found)
        }

    def replaced(self, expr: sympy.Basic) -> sympy.Basic:
        return self.env.replace(expr) if self.env is not None else expr

    def print(self, size: object) -> str | int:
        if isinstance(size, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            size = self.replaced(size.node.expr)
        return int(size) if isinstance(size, int) else print_size(size.xreplace(self.symbols))

    def rows(self) -> list[dict]:
        rows = []
        known = {} if self.env is None else getattr(self.env, "backed_var_to_val", None) or self.env.var_to_val
        for old, new in self.symbols.items():
            bounds = self.env.var_to_range.get(old) if self.env is not None else None
            row = {"name": new.name, "hint": int(known.get(old, 4)), "minimum": 2}
            if bounds is not None and bounds.lower.is_finite:
                row["minimum"] = max(2, int(bounds.lower))
            if bounds is not None and bounds.upper.is_finite and bounds.upper < 2**31:
                row["maximum"] = int(bounds.upper)
            rows.append(row)
        return rows

    def guards(self) -> list[str]:
        """What the trace assumed of the sizes, over the symbols that the inputs show."""
        if self.env is None:
            return []
        exprs = dict.fromkeys(self.replaced(guard.expr) for guard in self.env.guards)
        known = set(self.symbols)
        return sorted(
            self.print(e) for e in exprs if e not in (sympy.true, True) and e.free_symbols and e.free_symbols <= known
        )


_NO_SIZES = _Names(fx.Graph(), None)  # a graph of decisions is only run, never looked at


def _symbolic(val: object) -> list:
    if isinstance(val, torch.Tensor):
        return [s for s in val.shape if isinstance(s, torch.SymInt)]
    if isinstance(val, (tuple, list)):
        return [s for item in val for s in _symbolic(item)]
    return [val] if isinstance(val, torch.SymInt) else []


def graph_to_dict(graph: fx.Graph, captured: CapturedGraph | None = None) -> dict:
    """A graph as a JSON-ready dict. Constants come from `node.meta["constant"]`, else from `captured.constants`.

    Raises FtcError when a node holds something that no file can.
    """
    return _to_dict(graph, captured, _Names(graph, captured))


def _to_dict(graph: fx.Graph, captured: CapturedGraph | None, names: _Names) -> dict:
    return {
        "format": FORMAT,
        "symbols": names.rows(),
        "guards": names.guards(),
        "nodes": _rows(graph, captured.constants if captured else {}, names, lambda node: node.name, contents=True),
    }


def _rows(graph: fx.Graph, constants: dict[str, torch.Tensor], names: _Names, ref, contents: bool) -> list[dict]:
    rows = []
    for node in graph.nodes:
        row: dict = {"name": node.name, "op": node.op, "target": target_text(node)}
        if node.op in ("call_function", "call_module", "output"):
            row["args"] = [to_json(arg, ref) for arg in node.args]
            row["kwargs"] = {key: to_json(value, ref) for key, value in node.kwargs.items()}
        if node.op in ("placeholder", "get_attr", "call_module") and node.meta.get("val") is not None:
            row["val"] = _describe(node.meta["val"], names)
        if node.op == "get_attr":
            constant = node.meta.get("constant", constants.get(node.target))
            if isinstance(constant, torch.Tensor):
                row["constant"] = tensor_to_json(constant) if contents else _sha(constant)
        source = _source(node)
        if source:
            row["source"] = source
        rows.append(row)
    return rows


def _describe(val: object, names: _Names) -> object:
    if isinstance(val, torch.Tensor):
        row = {
            "dtype": str(val.dtype).removeprefix("torch."),
            "device": str(val.device),
            "sizes": [names.print(s) for s in val.shape],
        }
        if val.layout is not torch.strided:
            raise FtcError(f"a graph holds a tensor of layout {val.layout}, which cannot be saved; use a strided one")
        if not val.is_contiguous():
            row["strides"] = [names.print(s) for s in val.stride()]
        return row
    if isinstance(val, torch.SymInt):
        return {"int": names.print(val)}
    if isinstance(val, (tuple, list)):
        return {"items": [_describe(item, names) for item in val], "list": isinstance(val, list)}
    return {"plain": to_json(val, None)}


def _source(node: fx.Node) -> str | None:
    """The last line of the stack trace, its path without what is above the package."""
    lines = [
        line.strip() for line in (node.meta.get("stack_trace") or "").splitlines() if line.strip().startswith("File ")
    ]
    if not lines:
        return None
    path, *rest = lines[-1].removeprefix("File ").split(", ")
    path = path.strip('"').replace("\\", "/")
    short = path.rpartition("site-packages/")[2]
    if PurePath(short).is_absolute():
        short = "/".join(short.split("/")[-3:]).lstrip("/")
    return ", ".join([f'File "{short}"', *rest])


def tensor_to_json(tensor: torch.Tensor) -> dict:
    """The contents of a small tensor: dtype, sizes and bytes (zlib, base64)."""
    if isinstance(tensor, torch._subclasses.fake_tensor.FakeTensor) or tensor.device.type == "meta":
        raise FtcError("a constant of the graph has no data and cannot be saved")
    return {
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "sizes": list(tensor.shape),
        "zlib": base64.b64encode(zlib.compress(_bytes(tensor), 6)).decode(),
    }


def tensor_from_json(row: dict) -> torch.Tensor:
    """The tensor that `tensor_to_json` wrote. Raises FtcError when its bytes do not fit its sizes."""
    try:
        dtype = torch_value("dtype", row["dtype"])
        sizes = [int(size) for size in row["sizes"]]
        expected = torch.Size(sizes).numel() * dtype.itemsize
        reader = zlib.decompressobj()
        data = reader.decompress(base64.b64decode(row["zlib"], validate=True), expected + 1)
        if len(data) != expected:
            raise ValueError(f"{len(data)} bytes instead of {expected}")
        if not data:
            return torch.empty(sizes, dtype=dtype)
        return torch.frombuffer(bytearray(data), dtype=torch.uint8).view(dtype).reshape(sizes)
    except FtcError:
        raise
    except Exception as error:
        raise corrupt(f"a constant of the graph cannot be read ({error})") from error


def _bytes(tensor: torch.Tensor) -> bytes:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def _sha(tensor: torch.Tensor) -> list:
    return [str(tensor.dtype), list(tensor.shape), hashlib.sha256(_bytes(tensor)).hexdigest()]


def graph_hash(graph: fx.Graph) -> str:
    """sha256 of what a graph computes: operators, arguments, parameter and input names, their dtypes and sizes, and the
    contents of constants. Names of nodes and symbols, and places in the source, do not count."""
    names = _Names(graph, None)
    numbers = {node: number for number, node in enumerate(graph.nodes)}
    rows = _rows(graph, {}, names, numbers.__getitem__, contents=False)
    for row in rows:
        for key in _NO_NAMES & row.keys():
            del row[key]
        if row["op"] == "call_module":
            row.pop("val", None)  # found again from the region when it runs
    return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()


# --------------------------------------------------------------------------------------------------------------- reading


@dataclass
class _Reader:
    """A fresh world with the file's symbols in it, and the nodes read so far."""

    world: World
    symbols: dict[str, sympy.Symbol] = field(default_factory=dict)
    nodes: dict[str, fx.Node] = field(default_factory=dict)

    def add_symbol(self, row: dict) -> None:
        env, hint = self.world.env, row["hint"]
        low, high = row["minimum"], row.get("maximum")
        if (
            type(hint) is not int
            or type(low) is not int
            or hint < max(low, 2)
            or (high is not None and not hint <= high)
        ):
            raise corrupt(f"the size symbol {row} has no valid example value")
        symbol = self.symbols[identifier(row["name"])] = sympy.Symbol(row["name"], positive=True, integer=True)
        values = getattr(env, "backed_var_to_val", None)
        (values if values is not None else env.var_to_val)[symbol] = sympy.Integer(hint)
        env.var_to_range[symbol] = ValueRanges(sympy.Integer(low), int_oo if high is None else sympy.Integer(high))
        env.var_to_sources[symbol] = []
        slocs = getattr(env, "var_to_range_sloc", None)
        if slocs is not None:
            from torch.fx.experimental.symbolic_shapes import ValueRangesSLoc

            slocs[symbol] = ValueRangesSLoc(env._get_sloc(), env._get_sloc())

    def size(self, text: object):
        """An int, or a SymInt of the world."""
        expr = read_size(text, self.symbols)
        if expr.is_Integer:
            return int(expr)
        hint = expr.xreplace({s: self.hint(s) for s in expr.free_symbols})
        return self.world.env.create_symintnode(expr, hint=int(hint))

    def hint(self, symbol: sympy.Symbol) -> sympy.Integer:
        env = self.world.env
        return (getattr(env, "backed_var_to_val", None) or env.var_to_val)[symbol]

    def value(self, row: dict) -> object:
        """The fake value that `_describe` wrote."""
        if "dtype" in row:
            sizes = [self.size(text) for text in row["sizes"]]
            dtype, device = torch_value("dtype", row["dtype"]), torch.device(row["device"])
            with self.world.mode:
                if "strides" in row:
                    return torch.empty_strided(
                        sizes, [self.size(text) for text in row["strides"]], dtype=dtype, device=device
                    )
                return torch.empty(sizes, dtype=dtype, device=device)
        if "int" in row:
            return self.size(row["int"])
        if "items" in row:
            items = [self.value(item) for item in row["items"]]
            return items if row["list"] else tuple(items)
        return from_json(row["plain"], self.node)

    def node(self, name: object) -> fx.Node:
        if name not in self.nodes:
            raise corrupt(f"a graph uses a node {str(name)[:40]!r} that does not come before")
        return self.nodes[name]


def graph_from_dict(d: dict) -> fx.Graph:
    """The graph that `graph_to_dict` wrote, with `meta["val"]` everywhere and `meta["constant"]` on constants.

    Raises FtcError when the dict is none, or calls what no graph calls.
    """
    return _read_graph(d)[0]


def _read_graph(d: dict, evaluate: bool = True) -> tuple[fx.Graph, _Reader]:
    try:
        if d["format"] != FORMAT:
            raise FtcError(
                f"a graph file has format {d['format']!r}, this version of ftc reads {FORMAT}; write it again from the model"
            )
        reader = _Reader(World.new(duck=False))
        for row in d["symbols"]:
            reader.add_symbol(row)
        guards = [read_size(text, reader.symbols) for text in d["guards"]]
        graph = fx.Graph()
        for row in d["nodes"]:
            _add_node(graph, row, reader)
        if [node.op for node in graph.nodes].count("output") != 1 or list(graph.nodes)[-1].op != "output":
            raise corrupt("a graph does not end in one output")
        if evaluate:
            _evaluate(graph, reader)
        _add_guards(reader.world.env, guards)
        graph.lint()
        return graph, reader
    except FtcError:
        raise
    except Exception as error:
        raise corrupt(f"a graph cannot be read ({type(error).__name__}: {str(error)[:200]})") from error


def _add_node(graph: fx.Graph, row: dict, reader: _Reader) -> None:
    op, target, name = row["op"], row["target"], identifier(row["name"])
    if op not in _OPS:
        raise corrupt(f"{str(op)[:40]!r} is not a kind of node")
    if op == "call_function":
        target = read_target(target)
    elif op == "placeholder":
        identifier(target)
    else:
        dotted(target)
    args = tuple(from_json(arg, reader.node) for arg in row.get("args", ()))
    kwargs = {identifier(key): from_json(value, reader.node) for key, value in row.get("kwargs", {}).items()}
    node = graph.create_node(op, target, args, kwargs, name)
    if name in reader.nodes:
        raise corrupt(f"two nodes of a graph are called {name!r}")
    reader.nodes[name] = node
    if "constant" in row:
        node.meta["constant"] = tensor_from_json(row["constant"])
    if "val" in row:
        node.meta["val"] = reader.value(row["val"])
    if "source" in row:
        node.meta["stack_trace"] = f"  {row['source']}\n"


def _evaluate(graph: fx.Graph, reader: _Reader) -> None:
    """Give every computed node its `meta["val"]`, by running it on those of its arguments."""
    # The Python dispatcher, as in tracing: without it some C++ kernels (aten.pad) fix the sizes that they see.
    with torch.no_grad(), enable_python_dispatcher(), reader.world.mode, WiderFakes():
        for node in graph.nodes:
            if node.op == "call_function":
                args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), lambda n: n.meta["val"])
                try:
                    node.meta["val"] = node.target(*args, **kwargs)
                except Exception as error:
                    raise corrupt(
                        f"node {node.name} ({node.target}) does not fit its arguments ({str(error)[:200]})"
                    ) from error
            elif node.op == "output":
                node.meta["val"] = fx.node.map_arg(node.args[0], lambda n: n.meta["val"])


def _add_guards(env, guards: list[sympy.Basic]) -> None:
    known = {guard.expr for guard in env.guards}
    for expr in guards:
        if expr not in known and expr is not sympy.true:
            env.guards.append(ShapeGuard(expr, env._get_sloc(), False))


# -------------------------------------------------------------------------------------------------------- captured graphs


def captured_to_dict(captured: CapturedGraph) -> dict:
    """A captured graph with the conditions under which it holds, JSON-ready."""
    names = _Names(captured.graph, captured)
    decisions = captured.decisions
    return {
        "graph": graph_to_dict(captured.graph, captured),
        "inputs": [
            {
                "name": s.name,
                "dtype": str(s.dtype).removeprefix("torch."),
                "device": s.device,
                "sizes": [names.print(x) for x in s.sizes],
            }
            for s in captured.inputs
        ],
        "guards": [names.print(guard) for guard in captured.guards],
        "decisions": None if decisions is None else _to_dict(decisions, captured, _NO_SIZES),
        "decided": [to_json(value, None) for value in captured.decided],
        **{
            key: {
                names.symbols[symbol].name: int(value)
                for symbol, value in getattr(captured, key).items()
                if symbol in names.symbols
            }
            for key in ("hints", "minimum", "maximum")
        },
    }


def captured_from_dict(d: dict) -> CapturedGraph:
    """The captured graph that `captured_to_dict` wrote. Raises FtcError when the dict is none."""
    graph, reader = _read_graph(d["graph"])
    try:
        decisions = None if d["decisions"] is None else _read_graph(d["decisions"], evaluate=False)[0]
        constants = {
            n.target: n.meta["constant"] for g in (graph, decisions) if g for n in g.nodes if "constant" in n.meta
        }
        inputs = [
            InputSpec(
                identifier(s["name"]),
                torch_value("dtype", s["dtype"]),
                torch.device(s["device"]).type,
                tuple(_size(x, reader) for x in s["sizes"]),
            )
            for s in d["inputs"]
        ]
        placeholders = [node.target for node in graph.nodes if node.op == "placeholder"]
        if placeholders != [spec.name for spec in inputs]:
            raise corrupt(f"a graph takes {placeholders}, its inputs are {[spec.name for spec in inputs]}")
        guards = [read_size(text, reader.symbols) for text in d["guards"]]
        decided = tuple(from_json(value, reader.node) for value in d["decided"])
        ranges = [
            {reader.symbols[name]: int(value) for name, value in d[key].items()}
            for key in ("hints", "minimum", "maximum")
        ]
        return CapturedGraph(graph, inputs, constants, guards, decisions, decided, *ranges)
    except FtcError:
        raise
    except Exception as error:
        raise corrupt(f"a captured graph cannot be read ({type(error).__name__}: {str(error)[:200]})") from error


def _size(text: object, reader: _Reader) -> int | sympy.Basic:
    expr = read_size(text, reader.symbols)
    return int(expr) if expr.is_Integer else expr
