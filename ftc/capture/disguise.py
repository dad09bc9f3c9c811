"""Letting a model run its eager path while it is being traced.

Libraries take another path when they notice tracing (they build masks that eager execution would skip, for one), and the
captured graph would then differ from the model. They notice by asking `torch.compiler.is_compiling()`, which our
tracer leaves False, or by comparing against `torch._subclasses.FakeTensor`, which this module hides from them.
"""

import contextlib
import sys
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def tracing_hidden() -> Iterator[None]:
    """Hide `torch._subclasses.FakeTensor` from code outside torch for the duration of the block (not reentrant-unsafe)."""
    package = torch._subclasses
    if "FakeTensor" not in vars(package):  # an outer block hides it already
        yield
        return
    real = package.FakeTensor
    previous = vars(package).get("__getattr__")

    def lookup(name: str):
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if name == "FakeTensor" and (caller == "torch" or caller.startswith(("torch.", "ftc"))):
            return real
        raise AttributeError(f"module {package.__name__!r} has no attribute {name!r}")

    del package.FakeTensor
    package.__getattr__ = lookup
    try:
        yield
    finally:
        package.FakeTensor = real
        if previous is None:
            del package.__getattr__
        else:
            package.__getattr__ = previous
