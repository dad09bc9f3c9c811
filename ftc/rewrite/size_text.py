"""Expressions of size symbols as text and back: `Eq(Mod(s0, 4), 0)`.

Function notation rather than Python's operators, because torch has several divisions and remainders that print alike
(`FloorDiv`, `CleanDiv`, `Mod`, `PythonMod`), and a file must give back the one that was written. Reading walks a parsed
expression over a table of known functions; no text of a file is ever evaluated.
"""

import ast
from collections.abc import Mapping

import sympy
from torch.utils._sympy import functions as torch_functions

from ftc.errors import FtcError

_SYMPY = (
    sympy.Add, sympy.Mul, sympy.Pow, sympy.Eq, sympy.Ne, sympy.Lt, sympy.Le, sympy.Gt, sympy.Ge, sympy.And, sympy.Or, sympy.Not,
    sympy.Rational, sympy.floor, sympy.ceiling, sympy.Abs,
)  # fmt: skip
_FUNCTIONS = {cls.__name__: cls for cls in _SYMPY} | {
    "sympy_Mod": sympy.Mod,
    "sympy_Max": sympy.Max,
    "sympy_Min": sympy.Min,
    **{
        name: cls
        for name, cls in vars(torch_functions).items()
        if isinstance(cls, type) and issubclass(cls, sympy.Basic) and cls.__module__ == torch_functions.__name__
    },
}
_NAMES = {cls: name for name, cls in _FUNCTIONS.items()}
_COMMUTATIVE = (sympy.Add, sympy.Mul, sympy.And, sympy.Or, torch_functions.Max, torch_functions.Min)
_LONGEST = 20_000  # characters; a condition on sizes has tens
_LARGEST_POWER = 64


def print_size(expr: object) -> str | int:
    """An expression as text, an integer as an int. Raises FtcError for a function that no file can hold."""
    expr = sympy.sympify(expr)
    return int(expr) if expr.is_Integer else _print(expr)


def _print(expr: sympy.Basic) -> str:
    if expr is sympy.true or expr is sympy.false:
        return str(bool(expr))
    if isinstance(expr, sympy.Symbol):
        return expr.name
    if expr.is_Integer:
        return str(int(expr))
    if expr.is_Float:
        return repr(float(expr))
    if expr.is_Rational:
        return f"Rational({expr.p}, {expr.q})"
    name = _NAMES.get(type(expr))
    if name is None:
        raise FtcError(f"a condition on sizes uses {type(expr).__name__}, which cannot be saved: {expr}")
    parts = [_print(arg) for arg in expr.args]
    return f"{name}({', '.join(sorted(parts) if isinstance(expr, _COMMUTATIVE) else parts)})"


def read_size(text: object, symbols: Mapping[str, sympy.Basic]) -> sympy.Basic:
    """The expression that `print_size` wrote, over the named symbols. Raises FtcError for anything else."""
    if isinstance(text, int) and not isinstance(text, bool):
        return sympy.Integer(text)
    if not isinstance(text, str) or len(text) > _LONGEST:
        raise FtcError(f"{str(text)[:80]!r} is not an expression of sizes; the graph file is corrupt")
    try:
        return _read(ast.parse(text, mode="eval").body, symbols)
    except FtcError:
        raise
    except Exception as error:
        raise FtcError(f"{text[:80]!r} is not an expression of sizes ({error}); the graph file is corrupt") from error


def _read(node: ast.expr, symbols: Mapping[str, sympy.Basic]) -> sympy.Basic:
    if isinstance(node, ast.Constant) and type(node.value) in (bool, int, float):
        return sympy.sympify(node.value)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_read(node.operand, symbols)
    if isinstance(node, ast.Name) and node.id in symbols:
        return symbols[node.id]
    if (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id in _FUNCTIONS
        and not node.keywords
    ):
        args = [_read(arg, symbols) for arg in node.args]
        if node.func.id == "Pow" and any(arg.is_number and abs(arg) > _LARGEST_POWER for arg in args[1:]):
            raise FtcError("an expression of sizes holds a huge power; the graph file is corrupt")
        return _FUNCTIONS[node.func.id](*args)
    raise FtcError(
        f"{ast.unparse(node)[:80]!r} is no known symbol, number or function of sizes; the graph file is corrupt"
    )
