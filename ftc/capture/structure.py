"""Finding the repeated blocks of a model (its regions), without knowing any model."""

from collections import defaultdict

from torch import nn


def find_regions(model: nn.Module) -> list[str]:
    """Dotted names of the outermost repeated blocks of `model`, in module order; empty when nothing repeats.

    Candidates are the members of a container (`nn.ModuleList`, `nn.Sequential`) and siblings of one class under one
    parent, each with parameters and with submodules of its own. Groups nested in a chosen group are dropped; of the
    groups that remain, those that hold at least a tenth of the parameters of the largest are kept, so that a pair of
    small heads beside the blocks is not taken for them.
    """
    groups = []
    for parent_name, parent in model.named_modules():
        families = defaultdict(list)
        for child_name, child in parent.named_children():
            family = type(parent) if isinstance(parent, (nn.ModuleList, nn.Sequential)) else type(child)
            families[family].append((f"{parent_name}.{child_name}" if parent_name else child_name, child))
        for members in families.values():
            listed = isinstance(parent, (nn.ModuleList, nn.Sequential))
            blocks = [(name, child) for name, child in members if _is_block(child)]
            if len(blocks) == len(members) and (len(blocks) > 1 or (listed and blocks)):
                groups.append(blocks)
    chosen: list[list[tuple[str, nn.Module]]] = []
    for blocks in groups:  # named_modules goes outside in, so an outer group comes before what it contains
        inside = any(name.startswith(outer + ".") for name, _ in blocks for kept in chosen for outer, _ in kept)
        if not inside:
            chosen.append(blocks)
    if not chosen:
        return []
    weights = [sum(p.numel() for _, block in blocks for p in block.parameters()) for blocks in chosen]
    largest = max(weights)
    return [name for blocks, weight in zip(chosen, weights, strict=True) if weight * 10 >= largest for name, _ in blocks]


def _is_block(module: nn.Module) -> bool:
    has_submodules = any(True for _ in module.children())
    return has_submodules and any(True for _ in module.parameters())


def structure_keys(blocks: dict[str, nn.Module]) -> dict[str, tuple]:
    """A hashable summary of each block: classes, parameter and buffer shapes, plain attributes, module by module.

    An attribute that equals the block's own index in every block (a layer index), or differs in it alone (a name such as
    "layers.3.moe"), is left out. Whether it matters is settled by comparing the operations that the blocks run (see `fingerprint`), not by this key.
    """
    positions = {name: int(tail) if (tail := name.rpartition(".")[2]).isdigit() else i for i, name in enumerate(blocks)}
    plain = {name: _plain_attributes(block) for name, block in blocks.items()}
    paths = set().union(*plain.values()) if plain else set()
    indices = {p for p in paths if _tells_position_alone([(plain[n].get(p), positions[n]) for n in blocks])}
    keys = {}
    for name, block in blocks.items():
        attributes = tuple((p, v) for p, v in sorted(plain[name].items()) if p not in indices)
        keys[name] = (tuple(_tensors(block)), attributes)
    return keys


def _tells_position_alone(values: list[tuple[object, int]]) -> bool:
    """Whether an attribute's (value, position) in every block are an index, or a dotted name that holds it and is otherwise the same."""
    if all(type(value) is int for value, _ in values):
        return all(value == position for value, position in values)
    if not all(type(value) is str for value, _ in values):
        return False
    names = {tuple(None if part == str(position) else part for part in value.split(".")) for value, position in values}
    return len(names) == 1 and None in next(iter(names))


def _plain_attributes(block: nn.Module) -> dict[str, object]:
    return {
        f"{path}:{key}": value
        for path, module in block.named_modules()
        for key, value in vars(module).items()
        if isinstance(value, (bool, int, float, str, type(None))) and key != "training"
    }


def _tensors(block: nn.Module):
    for path, module in block.named_modules():
        held = [
            (key, tuple(t.shape), t.dtype, t.requires_grad)
            for store in (module._parameters, module._buffers)
            for key, t in store.items()
            if t is not None
        ]
        yield path, type(module), tuple(held)
