"""What a program says of its RoPE: its configuration, the frequencies in its buffers, and a configuration with another RoPE."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import torch

from ftc.errors import FtcError
from ftc.rewrite.rope_tables import Site, evaluate, find_sites, theta_of


def rope_of(config: object):
    """(RopeConfig or None, number of positions or None) of a configuration in any form: ours, Hugging Face's, or one saved as JSON."""
    from ftc.models.rope import RopeConfig

    if config is None:
        return None, None
    rope = getattr(config, "rope", None)
    positions = getattr(config, "max_position_embeddings", None)
    positions = positions if isinstance(positions, int) else None
    if isinstance(rope, RopeConfig):
        return rope, positions
    try:
        if isinstance(rope, dict):
            return RopeConfig(**rope), positions
        entries = config.to_dict() if hasattr(config, "to_dict") else dict(vars(config))
        if not any(entries.get(name) for name in ("rope_parameters", "rope_scaling", "rope_theta")):
            return None, positions
        return RopeConfig.from_huggingface(entries), positions
    except (ValueError, TypeError):  # settings of its own: what the graphs say counts
        return None, positions


def longest_text(model: object) -> int | None:
    """How many tokens the model's configuration says its positions reach; None where it does not say."""
    rope, positions = rope_of(getattr(model, "config", None))
    if rope is not None and rope.rope_type == "dynamic" and positions is not None:
        return round(positions * rope.factor)  # its configuration keeps the trained length
    return positions


def rescaled(config: object, rope, positions: int) -> object:
    """`config` with another RoPE and number of positions (0: as it was); a plain namespace is changed in place."""
    positions = positions or getattr(config, "max_position_embeddings", 0)
    if dataclasses.is_dataclass(config) and hasattr(config, "rope"):
        return dataclasses.replace(config, rope=rope, max_position_embeddings=positions)
    if isinstance(getattr(config, "rope", None), dict):
        config.rope = dataclasses.asdict(rope)
    elif isinstance(config, SimpleNamespace) or hasattr(config, "rope_parameters") or hasattr(config, "rope_scaling"):
        _set_huggingface(config, rope)
    if hasattr(config, "max_position_embeddings"):
        config.max_position_embeddings = positions
    return config


def _set_huggingface(config: object, rope) -> None:
    """Write `rope` into a configuration of Hugging Face's form, in place: where it differs between kinds of layers, for those of its theta."""
    given = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    if any(isinstance(part, dict) for part in given.values()):
        for kind, part in given.items():
            if isinstance(part, dict) and part.get("rope_theta") and _near(part["rope_theta"], rope.rope_theta):
                given[kind] = part | rope.as_huggingface()
        return
    if isinstance(config, SimpleNamespace):  # one that was saved, perhaps in the older spelling
        for name in ("rope_scaling", "rope_theta"):
            vars(config).pop(name, None)
    kept = {name: given[name] for name in ("partial_rotary_factor",) if name in given}
    config.rope_parameters = kept | rope.as_huggingface()
    if getattr(config, "original_max_position_embeddings", None) is not None and rope.original_max_position_embeddings:
        config.original_max_position_embeddings = rope.original_max_position_embeddings  # where there is one, it wins


def filled_in(pass_, program):
    """A `rope-scale` with theta, the trained length and the buffers filled in from the program.

    FtcError where the model is scaled already, keeps its tables in a buffer, or leaves open what to scale.
    """
    rope, trained = rope_of(getattr(program, "config", None))
    scaled = rope is not None and rope.rope_type != "default"
    if scaled and rope.rope_type != pass_.type:
        raise FtcError(
            f"pass rope-scale: the model's RoPE is scaled already (type {rope.rope_type}, factor {rope.factor}); start from the model as it was before"
        )
    found = _frequencies(program)
    if not found:
        _check_stored_tables(program)
        return pass_
    theta, buffers = _chosen(pass_, found, rope)
    if scaled:
        trained = rope.original_max_position_embeddings or trained
    length = pass_.original_max_position_embeddings or trained
    if length is None and pass_.type != "default":
        raise FtcError("pass rope-scale: the model has no configuration that says how long its texts were; give original_max_position_embeddings")
    return dataclasses.replace(pass_, rope_theta=theta, original_max_position_embeddings=length, buffers=buffers)


def _frequencies(program) -> list[tuple[Site, float | None]]:
    """Every site with the theta of its frequencies; None where they are computed from the text or a constant of a pass."""
    from ftc.rewrite.pipeline import _hosts

    found = []
    for code in program.codes:
        for variant in code.all_variants():
            graph = variant.captured.graph
            for site in find_sites(graph)[0]:
                thetas = set()
                for host in _hosts(program, code):
                    named = {name: host.fetch(name).detach() for name in site.buffers()}
                    if not site.fixed or any(t.device.type == "meta" for t in named.values()):
                        thetas.add(None)
                        continue
                    (values,) = evaluate(graph, [site.frequencies], {}, named)
                    thetas.add(theta_of(values.cpu()))
                    if named and theta_of(values.cpu()) is None and len(values) > 1:
                        raise FtcError(
                            f"pass rope-scale: the frequencies in {', '.join(named)} of {host.ftc_name} ({_some(values)}) are no powers "
                            "theta^(-2i/R): they are scaled already; start from the model as it was before"
                        )
                if len(thetas) > 1:
                    raise FtcError(f"pass rope-scale: blocks that share {code.name}'s graph have frequencies of different theta, {sorted(thetas)}")
                found.append((site, thetas.pop()))
    return found


def _chosen(pass_, found: list[tuple[Site, float | None]], rope) -> tuple[float | None, tuple[str, ...] | None]:
    """The theta to scale, and the buffers that hold its frequencies where others hold other ones."""
    known = sorted({theta for _, theta in found if theta is not None})
    wanted = pass_.rope_theta
    if wanted is None and rope is not None and (not known or any(_near(rope.rope_theta, theta) for theta in known)) and len(known) < 2:
        wanted = rope.rope_theta
    if wanted is None and len(known) == 1:
        wanted = known[0]
    if wanted is None:
        says = f"several, {', '.join(f'{theta:g}' for theta in known)}" if known else "none that can be read off it"
        raise FtcError(f"pass rope-scale: which theta is to be scaled? The model has {says}; give rope_theta")
    if known and not any(_near(wanted, theta) for theta in known):
        raise FtcError(f"pass rope-scale: rope_theta is {wanted:g}; the model's frequencies are of {', '.join(f'{theta:g}' for theta in known)}")
    if len(known) < 2:
        return wanted, pass_.buffers
    names = {name for site, theta in found if theta is not None and _near(wanted, theta) for name in site.buffers()}
    return wanted, tuple(sorted(names))


def _near(one: float, other: float) -> bool:
    return abs(one / other - 1) < 1e-4


def _some(values: torch.Tensor) -> str:
    return ", ".join(f"{value:.4g}" for value in values[:3].tolist()) + (", ..." if len(values) > 3 else "")


def _check_stored_tables(program) -> None:
    """FtcError where a buffer holds cosines by position: a table ends where it was made to end."""
    for host in [program, *program.regions]:
        for name, tensor in host.named_attributes():
            if isinstance(tensor, torch.nn.Parameter) or tensor.dim() < 2 or tensor.shape[-1] < 2 or tensor.device.type == "meta":
                continue
            rows = tensor.detach().squeeze()
            if rows.dim() >= 2 and rows.is_complex():
                rows = rows.real
            if rows.dim() != 2 or not rows.is_floating_point() or len(rows) < 3:
                continue
            if bool((rows[0] == 1).all()) and bool((rows.abs() <= 1).all()) and bool((rows[1] < 1).any()):  # cos 0, then below
                raise FtcError(
                    f"pass rope-scale: {name} holds cosines of {len(rows)} positions, stored when the model was made; "
                    "rope-scale needs a model that computes them from frequencies"
                )
