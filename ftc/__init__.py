"""ftc: a compiler for decoder language models.

    program = ftc.rewrite(model, ["fuse-qkv", "fuse-gate-up"], example={"input_ids": ids})

Captures plain PyTorch models as FX graphs, rewrites graphs and weights by passes, and proves every rewrite. Heavy modules
are imported on first use, so that `ftc --help` is quick.
"""

from importlib import import_module

__version__ = "0.1.0"

_PUBLIC = {
    "Program": "ftc.capture.program",
    "explain": "ftc.rewrite.explain",
    "load": "ftc.rewrite.store",
    "verify": "ftc.rewrite.verify",
    "FtcError": "ftc.errors",
    "FtcFailure": "ftc.errors",
}


def __getattr__(name: str):
    if name in ("capture", "rewrite", "models", "passes"):  # packages; the first two are callable
        return import_module(f"ftc.{name}")
    if name in _PUBLIC:
        value = globals()[name] = getattr(import_module(_PUBLIC[name]), name)
        return value
    raise AttributeError(f"module 'ftc' has no attribute {name!r}")
