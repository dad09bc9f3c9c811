"""Region graphs for tests: export one block and bring it to the region-graph format, without the capture machinery."""

import inspect
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn
from torch.export import Dim
from torch.export.graph_signature import InputKind
from torch.utils import _pytree as pytree


class _Flat(nn.Module):
    """`block` as a module of flat tensor arguments, so that any signature exports."""

    def __init__(self, block: nn.Module, leaves: list[Any], spec: pytree.TreeSpec):
        super().__init__()
        self.block, self.leaves, self.spec = block, leaves, spec

    def forward(self, *tensors: torch.Tensor) -> Any:
        given = iter(tensors)
        leaves = [next(given) if isinstance(leaf, torch.Tensor) else leaf for leaf in self.leaves]
        args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        return self.block(*args, **kwargs)


def region_graph(
    block: nn.Module, args: tuple, kwargs: dict[str, Any] | None = None, dynamic: tuple[int, ...] = ()
) -> fx.Graph:
    """Export `block` and return its region graph; dims whose example size is in `dynamic` are symbolic."""
    bound = inspect.signature(block.forward).bind(*args, **(kwargs or {}))
    with_paths, spec = pytree.tree_flatten_with_path((bound.args, bound.kwargs))
    names = list(bound.signature.parameters)
    leaves = [leaf for _, leaf in with_paths]
    flat = _Flat(block, leaves, spec).train(block.training)
    tensors = tuple(leaf for leaf in leaves if isinstance(leaf, torch.Tensor))
    shapes = (tuple({i: Dim.AUTO for i, size in enumerate(tensor.shape) if size in dynamic} for tensor in tensors),)
    graph = clean(torch.export.export(flat, tensors, dynamic_shapes=shapes if dynamic else None, strict=False))
    paths = [_path(path, names) for path, leaf in with_paths if isinstance(leaf, torch.Tensor)]
    for node in [node for node in graph.nodes if node.op == "placeholder"]:
        node.target = paths[int(node.name.rsplit("_", 1)[1])]
        node._rename(node.target)
    for node in graph.nodes:
        if node.op == "get_attr":
            node.target = node.target.removeprefix("block.")
    return graph


def _path(path: tuple, names: list[str]) -> str:
    where, key, *rest = (getattr(entry, "idx", getattr(entry, "key", entry)) for entry in path)
    if where == 0 and key >= len(names) - 1 and rest == []:  # the last parameter may be *args
        return names[key] if key < len(names) else f"{names[-1]}_{key}"
    return "_".join([names[key] if where == 0 else key, *map(str, rest)])


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
