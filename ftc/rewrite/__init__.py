"""Rewriting: passes, lenses, contracts, certificates. The package itself is callable: `ftc.rewrite(model, passes, ...)`."""

import sys
import types


class _Callable(types.ModuleType):
    """Lets the package be the function of the same name, so that `ftc.rewrite` and `ftc.rewrite.lens` both work."""

    def __call__(self, model, passes, example=None, *, inplace=False, check=True, calibration=None, tokenizer=None, tell=None):
        from ftc.rewrite.pipeline import rewrite

        options = {"inplace": inplace, "check": check, "calibration": calibration, "tokenizer": tokenizer, "tell": tell}
        return rewrite(model, passes, example, **options)


sys.modules[__name__].__class__ = _Callable
