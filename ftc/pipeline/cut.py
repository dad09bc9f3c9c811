"""A program cut between its regions into stages."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import nn

from ftc.capture.program import Program, Region
from ftc.capture.skeleton import Container
from ftc.errors import FtcError
from ftc.pipeline.stages import Pieces, Stage, StageBody, read_by


def cut(program: Program, bounds: Sequence[int]) -> list[Stage]:
    """The stages of a captured program, in order; see `ftc.pipeline.stages` for how they are called.

    `bounds`: for each stage but the first, the index in `program.regions` of its first region; `(2, 4)` cuts six regions into three times
    two. Regions that passes added (multi-token prediction) stand behind the model's own. The embedding comes to the first stage, norm,
    head and loss to the last.

    Cut a program that was captured for its inputs (`ftc.capture(model, example)`), after the passes and after `ftc.parallel.bind`, before
    sharding and before it has memory, or after. Other structures of inputs are captured when they are first met, as long as the
    parameters that a stage then reads are there.

    The regions are the program's own objects, and so are the parameters of one stage alone. A parameter outside of the regions that several
    stages read (tied embedding and head; those of multi-token prediction) is held by each of them under the same name: the first keeps the
    program's, the others get copies, and `Stage.shared` tells. A tied parameter is held under the name that it has in
    `program.named_parameters()`, and under each name by which the stage reads it. What nothing reads stays on the first stage.

    The program is still needed, for what is captured later, and is not to be rewritten any more. Raises FtcError for a program without
    regions, bounds that are not increasing indices, a program without a captured graph, and what cannot be cut (`cut_graph`).
    """
    regions = program.regions
    bounds = _checked(program, bounds)
    num_stages = len(bounds) + 1
    parts = [regions[start:end] for start, end in itertools.pairwise((0, *bounds, len(regions)))]
    _check_apart(parts)
    stage_of = {region.ftc_name: stage for stage, part in enumerate(parts) for region in part}
    pieces = Pieces(program, stage_of, num_stages)
    read = _read(program, pieces)
    bodies = [StageBody(program, stage, pieces, part) for stage, part in enumerate(parts)]
    _fill(program, bodies, read)
    shared = _shared(program, bodies)
    return [Stage(body, num_stages, {n: s for n, s in shared.items() if body.index in s}) for body in bodies]


def _checked(program: Program, bounds: Sequence[int]) -> tuple[int, ...]:
    count = len(program.regions)
    bounds = tuple(bounds)
    if count == 0:
        raise FtcError("the program has no regions: no repeated blocks were found, so there is nowhere to cut it")
    if len(bounds) >= count:
        raise FtcError(f"{len(bounds) + 1} stages cannot be made of {count} regions, as each takes at least one; use at most {count}")
    wrong = [b for b, before in zip(bounds, (0, *bounds), strict=False) if isinstance(b, bool) or not isinstance(b, int) or not before < b < count]
    if wrong:
        raise FtcError(
            f"bounds {list(bounds)}: {wrong[0]!r} cannot be where a stage begins; bounds are increasing indices of regions, from 1 to {count - 1}"
        )
    if not program.code.all_variants():
        raise FtcError("the program has no graph yet to be cut; capture it for its inputs first: ftc.capture(model, example), or program.run_example(example)")
    return bounds


def _check_apart(parts: list[list[Region]]) -> None:
    """FtcError where regions of different stages are one weight in part."""
    holders: dict[int, tuple[int, str]] = {}
    for stage, part in enumerate(parts):
        for region in part:
            for name, parameter in region.named_parameters():
                other, known = holders.setdefault(id(parameter), (stage, f"{region.ftc_name}.{name}"))
                if other != stage:
                    raise FtcError(
                        f"{known} (stage {other}) and {region.ftc_name}.{name} (stage {stage}) are one parameter; regions that share weights have to be "
                        "on one stage"
                    )


def _read(program: Program, pieces: Pieces) -> list[set[str]]:
    """The names of attributes outside of the regions that each stage reads, in any variant, with all results that have names."""
    read: list[set[str]] = [set() for _ in range(pieces.num_stages)]
    for variant in program.code.all_variants():
        named = len(variant.captured.graph.output_node().kwargs) > 0
        for whole in (False, True) if named else (False,):
            for stage, piece in enumerate(pieces.of(variant, whole)[0]):
                read[stage] |= set(read_by(piece.graph)) - set(variant.captured.constants)
    return read


def _fill(program: Program, bodies: list[StageBody], read: list[set[str]]) -> None:
    """Give each body its regions, and the parameters and buffers that it reads; the first stage also what nobody reads."""
    own = dict(program.named_attributes())
    canonical = canonical_names(program)
    is_read = {id(own[name]) for names in read for name in names if name in own}
    unread = {name for name, tensor in own.items() if id(tensor) not in is_read}
    taken = {id(p): body.index for body in bodies for region in body.regions for p in region.parameters()}
    order = _in_order(program)
    for body, reads in zip(bodies, read, strict=True):
        wanted = (reads & set(own)) | (unread if body.index == 0 else set())
        wanted |= {canonical[id(own[name])] for name in wanted if id(own[name]) in canonical} & set(own)
        _grow(program, body, [name for name in order if name in wanted or name in body._regions], own, taken)
        body.forget()
        names: dict[int, list[str]] = {}
        for name, parameter in body.named_parameters(remove_duplicate=False):
            names.setdefault(id(parameter), []).append(name)
        body.tied = [tuple(tied) for tied in names.values() if len(tied) > 1]


def _grow(program: Program, body: StageBody, names: list[str], own: dict[str, torch.Tensor], taken: dict[int, int]) -> None:
    """Put regions, parameters and buffers in their places in the tree of `body`."""
    copies: dict[int, nn.Parameter] = {}
    for name in names:
        owner, leaf = _place_at(body, program, name)
        if name in body._regions:
            owner._modules[leaf] = body._regions[name]
        elif isinstance(own[name], nn.Parameter):
            owner.register_parameter(leaf, _held(own[name], body.index, taken, copies))
        else:
            persistent = leaf not in program.get_submodule(name.rpartition(".")[0])._non_persistent_buffers_set
            owner.register_buffer(leaf, own[name], persistent=persistent)


def _place_at(tree: nn.Module, program: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The container in `tree` for the dotted `name`, made with the kinds of `program`'s modules where it is missing, and the last word."""
    *path, leaf = name.split(".")
    original = program
    for part in path:
        original = original._modules[part]
        if part not in tree._modules:
            tree._modules[part] = Container(type(original).__name__ if not isinstance(original, Container) else original.kind)
            tree._modules[part].training = original.training
        tree = tree._modules[part]
    return tree, leaf


def _in_order(program: Program) -> list[str]:
    """Names of the regions and of what is outside of them, as they follow in the program's tree."""
    inside = tuple(f"{name}." for name in program._regions)
    names = []
    for prefix, module in program.named_modules():
        if prefix in program._regions:
            names.append(prefix)
        elif not (inside and prefix.startswith(inside)):
            dot = f"{prefix}." if prefix else ""
            names += [dot + name for store in (module._parameters, module._buffers) for name, tensor in store.items() if tensor is not None]
    return names


def _held(parameter: nn.Parameter, stage: int, taken: dict[int, int], copies: dict[int, nn.Parameter]) -> nn.Parameter:
    """The program's own parameter for the first stage that holds it, one copy of it for each of the others."""
    if taken.setdefault(id(parameter), stage) == stage:
        return parameter
    if id(parameter) not in copies:
        with torch.no_grad():
            copies[id(parameter)] = nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad)
    return copies[id(parameter)]


def canonical_names(program: nn.Module) -> dict[int, str]:
    """The name of each parameter in `named_parameters()`, by its id: of several names for one the first."""
    return {id(parameter): name for name, parameter in program.named_parameters()}


def _shared(program: Program, bodies: list[StageBody]) -> dict[str, tuple[int, ...]]:
    """The stages that hold each parameter which several hold, by its canonical name."""
    holders: dict[str, list[int]] = {}
    for body in bodies:
        for name, _ in body.named_parameters():
            holders.setdefault(name, []).append(body.index)
    return {name: tuple(stages) for name, stages in holders.items() if len(stages) > 1}
