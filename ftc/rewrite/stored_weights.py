"""The tensors of a program in safetensors files: each stored once, written and read one at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from ftc.errors import FtcError

MAX_SHARD_BYTES = 5_000_000_000
_AGAIN = "save the program again, or copy the folder again"
_REAL = {torch.complex64: torch.float32, torch.complex128: torch.float64}


def tensor_table(program: nn.Module, regions: list[str]) -> tuple[dict, list[dict], dict[str, str]]:
    """The module tree, a row for every tensor (`tensor` holds it), and which names share one tensor with an earlier name."""
    seen_modules: dict[int, str] = {}
    names: dict[int, str] = {}
    tree: dict[str, dict] = {}
    rows: list[dict] = []
    aliases: dict[str, str] = {}

    def named(tensor: torch.Tensor | None, name: str) -> str | None:
        if tensor is None:
            return None
        if id(tensor) in names:
            aliases[name] = names[id(tensor)]
            return names[id(tensor)]
        names[id(tensor)] = name
        rows.append(_row(tensor, name))
        return name

    def visit(module: nn.Module, path: str) -> None:
        if id(module) in seen_modules:
            tree[path] = {"same": seen_modules[id(module)]}
            return
        seen_modules[id(module)] = path
        dot = f"{path}." if path else ""
        container = (
            "list" if isinstance(module, nn.ModuleList) else "dict" if isinstance(module, nn.ModuleDict) else "module"
        )
        tree[path] = {
            "kind": module._get_name(),
            "container": container,
            "training": module.training,
            "parameters": {leaf: named(t, dot + leaf) for leaf, t in module._parameters.items()},
            "buffers": {
                leaf: [named(t, dot + leaf), leaf not in module._non_persistent_buffers_set]
                for leaf, t in module._buffers.items()
            },
        }
        for leaf, child in module._modules.items():
            if child is not None:
                visit(child, dot + leaf)

    visit(program, "")
    return tree, rows, aliases


def _row(tensor: torch.Tensor, name: str) -> dict:
    if tensor.device.type == "meta":
        raise FtcError(f"{name} is on the meta device and has no values to save; load the weights first")
    if tensor.layout is not torch.strided:
        raise FtcError(f"{name} has layout {tensor.layout}; only plain tensors can be saved")
    row = {
        "name": name,
        "tensor": tensor,
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "shape": list(tensor.shape),
        "device": str(tensor.device),
        "parameter": isinstance(tensor, nn.Parameter),
        "requires_grad": tensor.requires_grad,
    }
    if not tensor.is_contiguous() and torch._debug_has_internal_overlap(tensor) == 0 and _is_dense(tensor):
        row["strides"] = list(tensor.stride())
    return row


def _is_dense(tensor: torch.Tensor) -> bool:
    expected = 1
    for size, stride in sorted(zip(tensor.shape, tensor.stride(), strict=True), key=lambda pair: pair[1]):
        if size > 1 and stride != expected:
            return False
        expected *= size
    return True


def write_tensors(folder: Path, rows: list[dict]) -> Iterator[tuple[dict, str]]:
    """Write the rows' tensors; yields each row with the name of its file."""
    from ftc.models.checkpoints.safetensors_io import write_file

    shards: list[list[dict]] = [[]]
    size = 0
    for row in rows:
        num_bytes = row["tensor"].numel() * row["tensor"].element_size()
        if shards[-1] and size + num_bytes > MAX_SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(row)
        size += num_bytes
    for number, shard in enumerate(shards, 1):
        name = "weights.safetensors" if len(shards) == 1 else f"weights-{number:05d}-of-{len(shards):05d}.safetensors"
        by_name = {row["name"]: row["tensor"] for row in shard}
        listed = [(n, _REAL.get(t.dtype, t.dtype), _stored_shape(t)) for n, t in by_name.items()]
        write_file(folder / name, listed, lambda n, tensors=by_name: _stored(tensors[n]))
        yield from ((row, name) for row in shard)


def _stored(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.detach()
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def _stored_shape(tensor: torch.Tensor) -> tuple[int, ...]:
    return (*tensor.shape, 2) if tensor.is_complex() else tuple(tensor.shape)


def load_tensors(folder: Path, about: dict) -> dict[str, torch.Tensor]:
    """Every tensor of `about` by name, parameters as parameters; checks each file's sha256 while it is read.

    Raises FtcError when a file is corrupt or changed, or tensors are missing, extra or of another shape.
    """
    from ftc.models.checkpoints.safetensors_io import read_index

    tensors: dict[str, torch.Tensor] = {}
    for file in dict.fromkeys(row["file"] for row in about["tensors"].values()):
        path = folder / file
        if Path(file).name != file:
            raise FtcError(f"{file!r} is not the name of a file beside ftc.json; {_AGAIN}")
        expected = {name: row for name, row in about["tensors"].items() if row["file"] == file}
        index = read_index(path)
        problems = [f"it lacks {n!r}" for n in expected.keys() - index.keys()] + [
            f"it has {n!r} besides" for n in index.keys() - expected.keys()
        ]
        if problems:
            raise FtcError(
                f"{path} does not hold the tensors that ftc.json names: {'; '.join(sorted(problems)[:3])}; {_AGAIN}"
            )
        sha = hashlib.sha256()
        ordered = sorted(index.items(), key=lambda item: item[1].start)
        with open(path, "rb") as opened:
            sha.update(opened.read(ordered[0][1].start if ordered else -1))
        for name, stored in ordered:
            value = stored.read()
            if value.numel():
                sha.update(memoryview(value.reshape(-1).view(torch.uint8).numpy()))
            tensors[name] = _restored(name, value, expected[name], path)
        if sha.hexdigest() != about["files"].get(file):
            raise FtcError(f"{path} was changed since it was saved (its sha256 differs); {_AGAIN}")
    return tensors


def _restored(name: str, value: torch.Tensor, row: dict, path: Path) -> torch.Tensor:
    if row["dtype"].startswith("complex"):
        value = torch.view_as_complex(value)
    if list(value.shape) != row["shape"] or str(value.dtype) != f"torch.{row['dtype']}":
        raise FtcError(
            f"{path}: {name!r} is {value.dtype} {list(value.shape)}, ftc.json says {row['dtype']} {row['shape']}; {_AGAIN}"
        )
    device = torch.device(row["device"])
    if device.type == "cuda" and not torch.cuda.is_available():
        raise FtcError(
            f"the program in {path.parent} was saved on {device}, which this machine lacks; save it after program.to('cpu')"
        )
    if "strides" in row:
        value = torch.empty_strided(row["shape"], row["strides"], dtype=value.dtype).copy_(value)
    value = value.to(device)
    if row["parameter"]:
        return nn.Parameter(value, requires_grad=bool(row["requires_grad"]))
    return value
