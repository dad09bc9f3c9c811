"""Moving the weights of a region or program through lenses, and back to the original model's form."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from ftc.capture.skeleton import Container
from ftc.errors import FtcError, FtcFailure
from ftc.rewrite.lens import Lens
from ftc.rewrite.shard import Shard


def apply_lenses(host: nn.Module, lenses: Sequence[Lens]) -> None:
    """Replace the parameters of `host` (a Region or Program) that the lenses consume by those they make, in place.

    One lens at a time, so that peak memory grows by one lens's targets. Parameters stay parameters, with requires_grad of
    any source; names are relative to `host`.
    """
    for lens in (lens.at(host.ftc_name) for lens in lenses):
        if isinstance(lens, Shard):
            continue  # weights stay whole until the program is bound to a group
        sources = {name: host.fetch(name) for name in (*lens.sources, *lens.reads)}
        trained = any(t.requires_grad for t in sources.values()) or not lens.sources
        is_parameter = not lens.makes_buffers and (any(isinstance(t, nn.Parameter) for t in sources.values()) or not lens.sources)
        with torch.no_grad():
            made = lens.forward({name: t.detach() for name, t in sources.items()})
        made = {name: made[name] for name in lens.targets}
        for name in lens.sources:
            _remove(host, name)
        del sources
        for name, tensor in made.items():
            _put(host, name, nn.Parameter(tensor, requires_grad=trained) if is_parameter else tensor)
        host.forget()


def lend_lenses(region: nn.Module, lenses: Sequence[Lens]) -> None:
    """`apply_lenses` for a region that is only tried: what the lenses make has memory during a call alone, and is computed for each."""
    given: dict[str, torch.Tensor] = {}
    made: set[str] = set()
    lenses = [lens.at(region.ftc_name) for lens in lenses]
    for lens in lenses:
        given |= {name: region.fetch(name).detach() for name in (*lens.sources, *lens.reads) if name not in made}
        made |= set(lens.targets)
    apply_lenses(region, lenses)
    kept = {tensor.untyped_storage().data_ptr() for tensor in given.values()}
    lent = {name: t.detach() for name, t in region.named_attributes() if name in made and t.untyped_storage().data_ptr() not in kept}
    sizes = {name: tensor.untyped_storage().nbytes() for name, tensor in lent.items()}

    def take_back() -> None:
        for tensor in lent.values():
            tensor.untyped_storage().resize_(0)

    def around(run, args, kwargs):
        values = dict(given)
        for lens in lenses:
            values = lens.forward(values)
        for name, tensor in lent.items():
            tensor.untyped_storage().resize_(sizes[name])
            tensor.copy_(values.pop(name))
        del values
        try:
            return run(*args, **kwargs)
        finally:
            take_back()

    take_back()
    region.around = around


def check_unshared(program: nn.Module, host: nn.Module, lenses: Sequence[Lens], pass_name: str) -> None:
    """FtcError when a parameter that a lens consumes also stands elsewhere in the program (a tied weight)."""
    owners: dict[int, list[str]] = {}
    for name, parameter in program.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    prefix = f"{host.ftc_name}." if host is not program else ""
    divided = {prefix + lens.source: (lens.dim, lens.blocks) for lens in lenses if isinstance(lens, Shard)}
    made: set[str] = set()
    for lens in lenses:
        for name in lens.sources:
            shared = owners.get(id(host.fetch(name)), ()) if name not in made else ()
            if isinstance(lens, Shard) and len({divided.get(other) for other in shared}) <= 1:
                continue  # divided alike under every name
            if len(shared) > 1:
                raise FtcError(f"pass {pass_name} would untie {' and '.join(shared)}, which are one weight; untie them first, or leave this pass out")
        made |= set(lens.targets)


def original_state_dict(program) -> dict[str, torch.Tensor]:
    """The program's state_dict in the original model's names and shapes, through the inverse lenses.

    Tensors that no lens touched are the program's own; others are new. FtcError when a lens has no inverse. A collective while the program is
    bound to ranks.
    """
    from ftc.parallel.weights import whole_state_dict

    tensors = whole_state_dict(program) if program.bound else program.state_dict()
    hosts = [(r.ftc_name + ".", r.code) for r in program.regions] + [("", program.code)]
    with torch.no_grad():
        for prefix, code in hosts:
            for lens in reversed(code.lenses):
                if not lens.has_inverse:
                    raise FtcError(f"the weights of {prefix or 'the model'} went through a {lens.kind} lens, which has no inverse")
                tensors = lens.with_prefix(prefix).backward(tensors)
    added = tuple(f"{name}." for name in program._added)
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(added)} if added else tensors


def renew_keys(program) -> None:
    """Bring the keys of variants up to date with the parameters that lenses made since: keys list a dtype per parameter."""
    for code in program.codes:
        host = next((r for r in program.regions if r.code is code), program)
        current = host.dtype_key()
        added = set().union(*(lens.own_dtypes() for lens in code.lenses))
        for key in list(code.variants):
            before, now = set(key[4]) | added, set(current) | added
            # Where weights became buffers, none may be left in the dtype that they had.
            if len(key[4]) != len(current) and (before == now or (now < before and any(lens.makes_buffers and lens.sources for lens in code.lenses))):
                stale = code.variants.pop(key)
                key = (*key[:4], current, *key[5:])
                for variant in stale:
                    variant.key = key
                # One captured since the rewrite went through the same passes, so it may stand for the stale one.
                code.variants.setdefault(key, stale)
        code.shortcuts.clear()


def _remove(host: nn.Module, name: str) -> None:
    owner_name, _, leaf = name.rpartition(".")
    owner = host.get_submodule(owner_name)
    if leaf in owner._parameters:
        del owner._parameters[leaf]
    elif leaf in owner._buffers:
        del owner._buffers[leaf]
    else:
        raise FtcFailure(f"{name} is neither a parameter nor a buffer of {host}")
    while owner_name and not (owner._parameters or owner._buffers or owner._modules):
        parent_name, _, child = owner_name.rpartition(".")
        owner = host.get_submodule(parent_name)
        del owner._modules[child]
        owner_name = parent_name


def _put(host: nn.Module, name: str, tensor: torch.Tensor) -> None:
    *path, leaf = name.split(".")
    owner = host
    for part in path:
        if part not in owner._modules:
            child = Container("Container")
            child.training = owner.training
            owner._modules[part] = child
        owner = owner._modules[part]
    if isinstance(tensor, nn.Parameter):
        owner.register_parameter(leaf, tensor)
    else:
        owner.register_buffer(leaf, tensor)
