"""Capture: a model's blocks and shell as FX graphs, with variants for inputs of different structure.

The package itself is callable: `ftc.capture(model, example)`; see `ftc.capture.program.capture`.
"""

import sys
import types


class _Callable(types.ModuleType):
    """Lets the package be the function of the same name, so that `ftc.capture` and `ftc.capture.program` both work."""

    def __call__(self, model, example=None, *, inplace=False):
        from ftc.capture.program import capture

        return capture(model, example, inplace=inplace)


sys.modules[__name__].__class__ = _Callable
