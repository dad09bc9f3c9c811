"""Which state of two modules differs, and whether a run reads it: the quick half of the proof that twins may share a graph.

Two blocks of the same classes whose state is equal run the same operations. A layer index is the usual difference, and it
matters only where the block reads it. Where these checks cannot tell, the operations themselves are compared (`fingerprint`).
"""

import contextlib
import functools
import types
from collections.abc import Iterator

import torch
from torch import nn

Place = tuple[str, str]  # dotted name of a submodule, name of an attribute
_SCALARS = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)


def differing(one: nn.Module, other: nn.Module) -> frozenset[Place] | None:
    """The attributes, integers and strings, in which two modules differ; None when they differ in more, or might.

    Train or eval mode is not compared. Parameters and buffers are compared by shape, dtype and aliasing, not by value.
    """
    ours, theirs = list(one.named_modules()), list(other.named_modules())
    if [(name, type(m)) for name, m in ours] != [(name, type(m)) for name, m in theirs]:
        return None
    pairs = {id(a): b for (_, a), (_, b) in zip(ours, theirs, strict=True)}
    different = set()
    for (path, a), (_, b) in zip(ours, theirs, strict=True):
        mine, its = vars(a), vars(b)
        if mine.keys() != its.keys():
            return None
        for key in mine:
            if key == "training" or _equal(mine[key], its[key], pairs):
                continue
            if type(mine[key]) not in (int, str) or type(mine[key]) is not type(its[key]):
                return None
            different.add((path, key))
    return frozenset(different)


def _equal(a: object, b: object, pairs: dict[int, object]) -> bool:
    """Whether two values are certainly the same to a program; `pairs` maps id(object of the one) to its counterpart."""
    if type(a) is not type(b):
        return False
    if isinstance(a, nn.Module):
        return pairs.get(id(a)) is b
    if isinstance(a, torch.Tensor):
        if id(a) in pairs:
            return pairs[id(a)] is b
        pairs[id(a)] = b
        same = (a.shape, a.dtype, a.stride(), a.requires_grad, a.device) == (b.shape, b.dtype, b.stride(), b.requires_grad, b.device)
        return same and (isinstance(a, nn.Parameter) or (a.device.type != "meta" and torch.equal(a, b)))
    if a is b:
        return True
    if isinstance(a, _SCALARS):
        return a == b and repr(a) == repr(b)
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(_equal(x, y, pairs) for x, y in zip(a, b, strict=True))
    if isinstance(a, dict):
        return list(a) == list(b) and all(_equal(a[k], b[k], pairs) for k in a)
    if isinstance(a, (set, frozenset)):
        return a == b and all(isinstance(x, _SCALARS) for x in a)
    if isinstance(a, types.MethodType):
        return a.__func__ is b.__func__ and _equal(a.__self__, b.__self__, pairs)
    if isinstance(a, functools.partial):
        return a.func is b.func and _equal((a.args, a.keywords), (b.args, b.keywords), pairs)
    return False


@contextlib.contextmanager
def watched(module: nn.Module, places: frozenset[Place]) -> Iterator[set[Place]]:
    """Yields the set of those `places` that are read while inside, through classes put in for the time being."""
    reads: set[Place] = set()
    keys_by_path: dict[str, list[str]] = {}
    for path, key in places:
        keys_by_path.setdefault(path, []).append(key)
    owners = [(path, module.get_submodule(path), keys) for path, keys in keys_by_path.items()]
    classes = [type(owner) for _, owner, _ in owners]
    try:
        for path, owner, keys in owners:
            cls = type(owner)
            members = {key: _watching_property(path, key, reads) for key in keys}
            names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__}
            owner.__class__ = type(cls.__name__, (cls,), {**members, **names})
        yield reads
    finally:
        for (_, owner, _), cls in zip(owners, classes, strict=True):
            owner.__class__ = cls


def _watching_property(path: str, key: str, reads: set[Place]) -> property:
    def get(self):
        reads.add((path, key))
        return self.__dict__[key]

    def put(self, value):
        self.__dict__[key] = value

    return property(get, put)
