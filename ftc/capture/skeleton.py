"""The model's own code without its weights: what new variants are captured from, however the weights were rewritten."""

import contextlib
import copy
from collections.abc import Iterator

import torch
from torch import nn

from ftc.errors import FtcError

_SMALL_BUFFER = 1 << 20


def skeleton(model: nn.Module) -> nn.Module:
    """A deep copy of `model` with its parameters on the meta device; buffers up to 1M elements are copied for real.

    Takes no memory for weights. Raises FtcError when the model holds something that cannot be copied.
    """
    memo: dict[int, object] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=parameter.requires_grad)
    for buffer in model.buffers():
        small = buffer.numel() <= _SMALL_BUFFER
        memo[id(buffer)] = buffer.detach().clone() if small else torch.empty_like(buffer, device="meta")
    try:
        copied = copy.deepcopy(model, memo)
    except Exception as error:
        raise FtcError(
            f"{type(model).__name__} cannot be copied without its weights ({type(error).__name__}: {error}); "
            "remove hooks, locks or open files from the model before capturing it"
        ) from error
    config = getattr(copied, "config", None)
    if getattr(config, "use_cache", False):
        config.use_cache = False  # a cache is inserted by a pass, never captured
    return copied


@contextlib.contextmanager
def state_restored(module: nn.Module) -> Iterator[None]:
    """Undo what a traced forward left on the modules: attributes, parameters and buffers that it replaced."""
    before = [
        (m, dict(vars(m)), dict(m._parameters), dict(m._buffers), dict(m._modules)) for m in module.modules()
    ]
    try:
        yield
    finally:
        for m, attributes, parameters, buffers, modules in before:
            for name in [n for n in vars(m) if n not in attributes]:
                del m.__dict__[name]
            m.__dict__.update(attributes)
            for store, old in ((m._parameters, parameters), (m._buffers, buffers), (m._modules, modules)):
                store.clear()
                store.update(old)


class Container(nn.Module):
    """Holds the parameters of a module of the original model under their old names; has no code of its own."""

    def __init__(self, kind: str):
        super().__init__()
        self.kind = kind

    def _get_name(self) -> str:
        return self.kind


def mirror(module: nn.Module, replaced: dict[int, nn.Module], memo: dict[int, nn.Module] | None = None) -> nn.Module:
    """A tree of containers with the parameters and buffers of `module`.

    Parameters are new objects over the same memory: values are shared, but `.to(dtype)` on one tree leaves the other as
    it is. `replaced` maps id(original submodule) to what takes its place. Shared submodules stay shared.
    """
    memo = {} if memo is None else memo
    if id(module) in replaced:
        return replaced[id(module)]
    if id(module) in memo:
        return memo[id(module)]
    listed = type(module) in (nn.ModuleList, nn.ModuleDict)
    container = type(module)() if listed else Container(type(module).__name__)
    memo[id(module)] = container
    adopt(container, module, replaced, memo)
    return container


def adopt(container: nn.Module, module: nn.Module, replaced: dict[int, nn.Module], memo: dict) -> None:
    """Give `container` the parameters, buffers and mirrored children of `module`, and its train or eval mode."""
    for name, parameter in module._parameters.items():
        if parameter is not None and id(parameter) not in memo:
            memo[id(parameter)] = nn.Parameter(parameter.detach(), requires_grad=parameter.requires_grad)
        container.register_parameter(name, None if parameter is None else memo[id(parameter)])
    for name, buffer in module._buffers.items():
        container.register_buffer(name, buffer, persistent=name not in module._non_persistent_buffers_set)
    for name, child in module._modules.items():
        container._modules[name] = None if child is None else mirror(child, replaced, memo)
    container.training = module.training
