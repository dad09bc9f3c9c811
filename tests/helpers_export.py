"""Region graphs for tests: export one block and bring it to the region-graph format, without the capture machinery."""

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn
from torch.export import Dim
from torch.export.graph_signature import InputKind


def tensors_dynamic(value: Any, sizes: dict[int, Any]) -> Any:
    """dynamic_shapes for one argument: every tensor dim whose size is a key of `sizes` is dynamic."""
    if isinstance(value, torch.Tensor):
        return {index: Dim.AUTO for index, size in enumerate(value.shape) if size in sizes}
    if isinstance(value, tuple | list):
        return type(value)(tensors_dynamic(item, sizes) for item in value)
    if isinstance(value, dict):
        return {key: tensors_dynamic(item, sizes) for key, item in value.items()}
    return None


def region_graph(
    block: nn.Module, args: tuple, kwargs: dict[str, Any] | None = None, dynamic: tuple[int, ...] = ()
) -> fx.Graph:
    """Export `block` and return its region graph; dims whose example size is in `dynamic` are symbolic."""
    kwargs = kwargs or {}
    shapes = None
    if dynamic:
        sizes = dict.fromkeys(dynamic)
        shapes = (
            tuple(tensors_dynamic(a, sizes) for a in args),
            {k: tensors_dynamic(v, sizes) for k, v in kwargs.items()},
        )
        shapes = _by_signature(block, *shapes)
    exported = torch.export.export(block, args, kwargs, dynamic_shapes=shapes, strict=False)
    return clean(exported)


def _by_signature(block: nn.Module, args: tuple, kwargs: dict) -> dict[str, Any]:
    import inspect

    bound = inspect.signature(block.forward).bind(*args, **kwargs)
    return dict(bound.arguments)


def clean(exported: torch.export.ExportedProgram) -> fx.Graph:
    """The region graph of an exported program: parameters as get_attr, tensor inputs only, no assertions, no casts to the same dtype."""
    copy = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    kinds = {spec.arg.name: spec for spec in exported.graph_signature.input_specs}
    for node in exported.graph.nodes:
        if node.op == "placeholder":
            spec = kinds[node.name]
            if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR):
                mapping[node] = new = copy.create_node("get_attr", spec.target, name=node.name)
                if spec.kind == InputKind.BUFFER:
                    new.meta["constant"] = (exported.state_dict | dict(exported.constants))[spec.target]
                elif spec.kind == InputKind.CONSTANT_TENSOR:
                    new.meta["constant"] = exported.constants[spec.target]
            elif isinstance(node.meta.get("val"), torch.Tensor):
                mapping[node] = new = copy.placeholder(node.name)
            else:
                continue
            new.meta.update(node.meta)
        elif node.op == "output":
            outputs = tuple(arg for arg in _flat(node.args[0]) if isinstance(arg, fx.Node))
            copy.output(tuple(mapping[arg] for arg in outputs)).meta.update(node.meta)
        elif node.op == "call_function" and "_assert" in getattr(node.target, "__name__", ""):
            continue
        elif node.target is torch.ops.aten.to.dtype and node.args[0].meta["val"].dtype == node.args[1]:
            mapping[node] = mapping[node.args[0]]
        else:
            mapping[node] = copy.node_copy(node, mapping.__getitem__)
    copy.eliminate_dead_code()
    copy.lint()
    return copy


def _flat(value: Any) -> list[Any]:
    return [item for part in value for item in _flat(part)] if isinstance(value, tuple | list) else [value]


def first_block(model: nn.Module, run: Callable[[], Any], index: int = 0) -> tuple[nn.Module, tuple, dict[str, Any]]:
    """The block at `index` of the model's first module list with the inputs it received in `run()`; caches are left out."""
    blocks = next(module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) > index)
    seen: list[tuple[tuple, dict]] = []
    hook = blocks[index].register_forward_pre_hook(
        lambda module, args, kwargs: seen.append((args, kwargs)), with_kwargs=True
    )
    try:
        with torch.no_grad():
            run()
    finally:
        hook.remove()
    return blocks[index], *seen[0]


def targets(graph: fx.Graph) -> list[str]:
    """The targets of the call_function nodes, as strings, in order."""
    return [
        str(node.target) for node in graph.nodes if node.op == "call_function" and node.target is not operator.getitem
    ]
