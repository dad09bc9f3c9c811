"""ftc: a compiler for decoder language models. See README.md."""

__version__ = "0.1.0"

_PUBLIC = {
    "capture": "ftc.capture.program",
    "Program": "ftc.capture.program",
}


def __getattr__(name: str):
    if name in _PUBLIC:
        from importlib import import_module

        value = getattr(import_module(_PUBLIC[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'ftc' has no attribute {name!r}")
