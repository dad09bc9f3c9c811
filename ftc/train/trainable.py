"""Training a part of a model: which parameters change, and which stay as they are."""

from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn

from ftc.errors import FtcError, nearest


def train_only(model: nn.Module, patterns: Sequence[str]) -> None:
    """Freeze, in place, each parameter that no pattern names; without patterns all are trained.

    A pattern is the name of a parameter, or of a module for all that it holds, with `*` for any part: "mtp",
    "model.layers.*.mlp", "*norm*". Raises FtcError for one that names nothing.
    """
    if not patterns:
        return
    parameters = dict(model.named_parameters(remove_duplicate=False))
    chosen = set()
    for pattern in patterns:
        found = {id(p) for name, p in parameters.items() if fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")}
        if not found:
            modules = {name.rpartition(".")[0] for name in parameters}
            raise FtcError(f"ftc.trainable names {pattern!r}, but nothing in the model is called so; {nearest(pattern, modules | set(parameters))}")
        chosen |= found
    for parameter in parameters.values():
        parameter.requires_grad_(id(parameter) in chosen)
