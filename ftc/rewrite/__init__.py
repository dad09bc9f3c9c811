"""Rewriting: passes, lenses, contracts, certificates. The package itself is callable: `ftc.rewrite(model, passes, ...)`."""

import sys
import types


class _Callable(types.ModuleType):
    """Lets the package be the function of the same name, so that `ftc.rewrite` and `ftc.rewrite.lens` both work."""

    def __call__(self, model, passes, example=None, *, inplace=False, check=True, calibration=None):
        from ftc.rewrite.pipeline import rewrite

        return rewrite(model, passes, example, inplace=inplace, check=check, calibration=calibration)


sys.modules[__name__].__class__ = _Callable
