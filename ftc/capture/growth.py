"""Regions that a pass adds to a program or takes away: a copy of a block with parameters of its own, running the block's code."""

import zlib
from collections.abc import Sequence

import torch
from torch import nn

from ftc.capture.program import Program, Region
from ftc.capture.skeleton import Container, adopt
from ftc.errors import FtcError

INITS = ("copy", "random")


def add_region(program: Program, name: str, like: str, init: str = "copy", seed: int = 0) -> Region:
    """Put a region of the structure of `like` at the dotted `name`, in place.

    init: "copy" starts with the values of `like`; "random" draws matrices anew, normal with the spread of what they would
    copy, from `seed` and the parameter's name alone, and copies the rest. FtcError when the place is taken.
    """
    check_place(program, name)
    model = program._regions[like]
    region = Region(name, model.kind, model.code)
    adopt(region, model, {}, {})
    for module in region.modules():
        for leaf, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[leaf] = nn.Parameter(torch.empty_like(parameter), requires_grad=parameter.requires_grad)
        for leaf, buffer in module._buffers.items():
            module._buffers[leaf] = None if buffer is None else buffer.detach().clone()
    owner = _owner(program, name)
    owner._modules[name.rpartition(".")[2]] = region
    program._regions[name] = region
    program._added[name] = {"like": like, "init": init, "seed": seed}
    model.code.twins[name] = model.code.twins[like]
    program.forget()
    fill_region(program, name)
    return region


@torch.no_grad()
def fill_region(program: Program, name: str) -> None:
    """Give an added region its initial values, in place: from what the region that it was made like holds now."""
    about = program._added[name]
    model = program._regions[about["like"]]
    for path, parameter in program._regions[name].named_parameters():
        value = model.fetch(path)
        parameter.copy_(drawn_like(value, f"{name}.{path}", about["seed"]) if is_drawn(about, parameter) else value)


def remove_region(program: Program, name: str) -> None:
    """Take an added region and its parameters away, in place, with the containers that are empty without it."""
    region = program._regions.pop(name)
    del program._added[name]
    region.code.twins.pop(name, None)
    while name:
        parent, _, leaf = name.rpartition(".")
        owner = program.get_submodule(parent)
        del owner._modules[leaf]
        if not parent or owner._modules or owner._parameters or owner._buffers:
            break
        name = parent
    program.forget()


def check_place(program: Program, name: str) -> None:
    """FtcError when something stands at `name` already."""
    try:
        taken = program.get_submodule(name)
    except AttributeError:
        return
    raise FtcError(f"{name} would be added, but the model has a {taken._get_name()} of that name; rename that first")


def normal(shape: Sequence[int], name: str, seed: int) -> torch.Tensor:
    """Standard normal numbers, float32 on the CPU; the same for the same name and seed, whatever was drawn before."""
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed * 1_000_003 + zlib.crc32(name.encode())))


def is_drawn(about: dict, parameter: torch.Tensor) -> bool:
    """Whether a parameter of an added region, described by `about`, begins as random numbers."""
    return about["init"] == "random" and parameter.ndim > 1


def drawn_like(like: torch.Tensor, name: str, seed: int) -> torch.Tensor:
    """Normal numbers of the shape, dtype and standard deviation of `like`, which is whole."""
    if like.device.type == "meta":
        return torch.empty_like(like)
    return (normal(like.shape, name, seed) * like.detach().float().std().cpu()).to(like.dtype).to(like.device)


def _owner(program: Program, name: str) -> nn.Module:
    """The module that holds `name`, made where it is missing: a list where its children are numbered."""
    parts = name.split(".")
    owner: nn.Module = program
    for part, child in zip(parts, parts[1:], strict=False):
        if part not in owner._modules:
            made = nn.ModuleList() if child.isdigit() else Container("Container")
            made.training = owner.training
            owner._modules[part] = made
        owner = owner._modules[part]
    return owner
