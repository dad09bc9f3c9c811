"""Structures of calls as JSON and back: nested arguments and results, the keys of variants, and signatures.

Tuples, lists and dicts come back as themselves. Mappings with attributes (the outputs of Hugging Face models) and named
tuples come back as `Outputs`, whose class needs nothing but this file.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections import OrderedDict

import torch
from torch.utils._pytree import TreeSpec, register_pytree_node, tree_flatten, tree_unflatten

from ftc.capture.variants import Hole, types_of
from ftc.errors import FtcError
from ftc.rewrite.json_values import corrupt, from_json, identifier, to_json, torch_value


class Outputs(OrderedDict):
    """Results by name: `out["logits"]`, `out.logits` and `out[0]` all work; a field that is not there is None."""

    def __init__(self, items=(), fields: tuple[str, ...] = ()):
        super().__init__(items)
        self.__dict__["_fields"] = tuple(fields)

    def __getattr__(self, name: str):
        if name in self:
            return OrderedDict.__getitem__(self, name)
        if name in self.__dict__.get("_fields", ()):
            return None
        raise AttributeError(f"the outputs hold {', '.join(self)}, not {name!r}")

    def __getitem__(self, key):
        return OrderedDict.__getitem__(self, key) if isinstance(key, str) else self.to_tuple()[key]

    def to_tuple(self) -> tuple:
        """The values in order."""
        return tuple(self.values())


def _flatten(outputs: Outputs):
    return list(outputs.values()), (tuple(outputs), outputs._fields)


def _unflatten(values, context) -> Outputs:
    names, fields = context
    return Outputs(zip(names, values, strict=True), fields)


register_pytree_node(Outputs, _flatten, _unflatten, serialized_type_name="ftc.Outputs")


def spec_to_json(spec: TreeSpec) -> object:
    """The shape of nested arguments or results. Raises FtcError for containers that cannot come back."""
    if spec.is_leaf():
        return "*"
    children = [
        spec_to_json(child)
        for child in (spec.children() if callable(getattr(spec, "children", None)) else spec.children_specs)
    ]
    if spec.type in (tuple, list):
        return {spec.type.__name__: children}
    names = _field_names(spec)
    if spec.type is dict:
        return {"dict": [[to_json(key, None), child] for key, child in zip(spec.context, children, strict=True)]}
    if names is None:
        raise FtcError(
            f"a {spec.type.__name__} among the inputs or results cannot be saved; use tuples, lists, dicts or mappings with names"
        )
    fields = (
        [f.name for f in dataclasses.fields(spec.type)]
        if dataclasses.is_dataclass(spec.type)
        else list(getattr(spec.type, "_fields", ()))
    )
    if spec.type is Outputs:
        fields = list(spec.context[1])
    return {"outputs": [[name, child] for name, child in zip(names, children, strict=True)], "fields": fields}


def _field_names(spec: TreeSpec) -> list[str] | None:
    if spec.type is Outputs:
        return list(spec.context[0])
    if isinstance(spec.type, type) and issubclass(spec.type, tuple):
        return list(getattr(spec.type, "_fields", ())) or None
    context = spec.context
    count = spec.num_children
    if isinstance(context, (list, tuple)) and len(context) == count and all(isinstance(key, str) for key in context):
        return list(context)
    return None


def spec_from_json(data: object) -> TreeSpec:
    """The TreeSpec that `spec_to_json` wrote."""
    return tree_flatten(_dummy(data))[1]


def _dummy(data: object) -> object:
    if data == "*":
        return 0
    if "outputs" in data:
        return Outputs([(str(name), _dummy(child)) for name, child in data["outputs"]], tuple(map(str, data["fields"])))
    ((kind, children),) = data.items()
    if kind == "dict":
        return {from_json(key, _no_node): _dummy(child) for key, child in children}
    items = [_dummy(child) for child in children]
    return {"tuple": tuple, "list": list}[kind](items)


def _no_node(name: object):
    raise corrupt(f"node {name!r} outside a graph")


def leaf_to_json(leaf: object) -> object:
    """A leaf of a call: a plain value, or the place of a tensor."""
    return {"hole": leaf.index} if isinstance(leaf, Hole) else to_json(leaf, None)


def leaf_from_json(data: object) -> object:
    """What `leaf_to_json` wrote."""
    return Hole(int(data["hole"])) if isinstance(data, dict) and "hole" in data else from_json(data, _no_node)


def key_to_json(key: tuple) -> dict:
    """The key of a variant; see `Code.key`."""
    leaves, spec, tensors, mode, dtypes = key[:5]  # then the leaves' types, which the leaves tell
    return {
        "leaves": [leaf_to_json(leaf) for leaf in leaves],
        "spec": spec_to_json(spec),
        "tensors": [[_plain(dtype), device, dim] for dtype, device, dim in tensors],
        "mode": list(mode) if isinstance(mode, tuple) else mode,
        "dtypes": [_plain(dtype) for dtype in dtypes],
    }


def key_from_json(data: dict) -> tuple:
    """A key equal to the one that `key_to_json` wrote."""
    tensors = tuple((torch_value("dtype", dtype), str(device), int(dim)) for dtype, device, dim in data["tensors"])
    mode = tuple(map(bool, data["mode"])) if isinstance(data["mode"], list) else bool(data["mode"])
    dtypes = tuple(torch_value("dtype", dtype) for dtype in data["dtypes"])
    leaves = tuple(leaf_from_json(leaf) for leaf in data["leaves"])
    return (leaves, spec_from_json(data["spec"]), tensors, mode, dtypes, types_of(leaves))


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def describe_key(key: tuple, inputs: list, keep_mode: bool = True) -> str:
    """`input_ids int64 [s0, s1], use_cache=False, in eval mode`, for people. `inputs` holds (name, dtype, sizes) by tensor."""
    leaves, spec, _, mode = key[:4]
    shown = []
    structure = tree_unflatten([_Shown(leaf, inputs) for leaf in leaves], spec)
    args, kwargs = structure if isinstance(structure, tuple) and len(structure) == 2 else ((), {})
    shown += [str(arg) for arg in args] + [
        f"{name}={value}" if "[" not in str(value) else str(value) for name, value in kwargs.items()
    ]
    text = ", ".join(shown) or "no inputs"
    if keep_mode and isinstance(mode, bool):
        text += f", in {'train' if mode else 'eval'} mode"
    return text


class _Shown:
    def __init__(self, leaf: object, inputs: list):
        if isinstance(leaf, Hole) and leaf.index < len(inputs):
            name, dtype, sizes = inputs[leaf.index]
            self.text = f"{name} {_plain(dtype)} [{', '.join(map(str, sizes))}]"
        else:
            self.text = "a tensor" if isinstance(leaf, Hole) else repr(leaf)

    def __repr__(self) -> str:
        return self.text


class Opaque:
    """Stands for a default in a signature that is no plain value."""

    def __init__(self, text: str):
        self.text = text

    def __repr__(self) -> str:
        return self.text


def signature_to_json(signature: inspect.Signature) -> list[dict]:
    """Names, kinds and plain defaults of a forward's parameters."""
    rows = []
    for parameter in signature.parameters.values():
        row: dict = {"name": parameter.name, "kind": parameter.kind.name}
        if parameter.default is not inspect.Parameter.empty:
            try:
                row["default"] = to_json(parameter.default, None)
            except FtcError:
                row["opaque"] = repr(parameter.default)[:80]
        rows.append(row)
    return rows


def signature_from_json(rows: list[dict]) -> inspect.Signature:
    """The signature that `signature_to_json` wrote."""
    kinds = {kind.name: kind for kind in inspect._ParameterKind}
    parameters = []
    for row in rows:
        default = inspect.Parameter.empty
        if "default" in row:
            default = from_json(row["default"], _no_node)
        elif "opaque" in row:
            default = Opaque(str(row["opaque"]))
        parameters.append(inspect.Parameter(identifier(row["name"]), kinds[row["kind"]], default=default))
    return inspect.Signature(parameters)
