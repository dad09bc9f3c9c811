"""Safetensors files read and written one tensor at a time, with plain reads rather than a memory map.

A mapped file counts towards the process's memory for as long as any tensor from it lives, also after the others were
replaced: 720 MB of parameters, mapped and then replaced one by one, peaked at 2.0 times their size, and at 1.005 times
read this way (torch 2.13, 2-core x86-64). The format: 8 bytes with the header's length (little
endian), a JSON header {name: {dtype, shape, data_offsets}}, then the tensors' bytes without gaps.
"""

import json
import os
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from ftc.errors import FtcError
from ftc.files import could_not_write

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_MAX_HEADER_BYTES = 100_000_000  # the limit of the reference implementation
_AGAIN = "download or copy the file again"


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor lies: `num_bytes` bytes from `start` (counted from the start of the file)."""

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    num_bytes: int

    def read(self) -> torch.Tensor:
        """The tensor, in fresh memory. Raises FtcError when the file ends too early."""
        data = torch.empty(self.num_bytes, dtype=torch.uint8)
        with open(self.path, "rb", buffering=0) as file:
            file.seek(self.start)
            view, done = memoryview(data.numpy()), 0
            while done < self.num_bytes:  # one read gives at most 2 GiB on Linux
                count = file.readinto(view[done:])
                if not count:
                    raise FtcError(f"{self.path} ends too early; {_AGAIN}")
                done += count
        return data.view(self.dtype).reshape(self.shape)


def read_index(path: str | Path) -> dict[str, StoredTensor]:
    """All tensors of a file by name, in file order. Reads the header only.

    Raises FtcError when the file is missing, corrupt, truncated, longer than its header says, or uses a dtype that
    PyTorch lacks.
    """
    path = Path(path)
    if not path.is_file():
        raise FtcError(f"{path} does not exist; {_AGAIN}")
    file_bytes = path.stat().st_size
    with open(path, "rb") as file:
        prefix = file.read(8)
        if prefix == b"version ":
            raise FtcError(f"{path} is a Git LFS pointer, not the weights themselves; run git lfs pull in its folder")
        header_bytes = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 2 <= header_bytes <= min(file_bytes - 8, _MAX_HEADER_BYTES):
            raise FtcError(f"{path} is not a complete safetensors file ({file_bytes} bytes, no valid header); {_AGAIN}")
        header = file.read(header_bytes)
    try:
        entries = json.loads(header)
        entries.pop("__metadata__", None)
        index = {name: _stored(path, name, entry, 8 + header_bytes) for name, entry in entries.items()}
    except FtcError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FtcError(f"{path} has a corrupt safetensors header ({error}); {_AGAIN}") from error
    end = 8 + header_bytes
    for name, stored in sorted(index.items(), key=lambda item: item[1].start):
        if stored.start != end:
            raise FtcError(f"{path} is corrupt: tensor {name!r} starts at byte {stored.start}, not {end}; {_AGAIN}")
        end += stored.num_bytes
    if file_bytes != end:
        what = "truncated" if file_bytes < end else "longer than its header says"
        raise FtcError(f"{path} is {what}: {file_bytes} bytes instead of {end}; {_AGAIN}")
    return index


def _stored(path: Path, name: str, entry: dict, data_start: int) -> StoredTensor:
    if entry["dtype"] not in DTYPES:
        raise FtcError(f"tensor {name!r} in {path} has dtype {entry['dtype']!r}; readable: {', '.join(DTYPES)}")
    dtype, shape = DTYPES[entry["dtype"]], tuple(entry["shape"])
    begin, end = entry["data_offsets"]
    if any(not isinstance(size, int) or size < 0 for size in shape):
        raise ValueError(f"shape {list(shape)} of {name!r}")
    if end - begin != torch.Size(shape).numel() * dtype.itemsize:
        raise ValueError(f"{name!r} of shape {list(shape)} has {end - begin} bytes")
    return StoredTensor(path, dtype, shape, data_start + begin, end - begin)


def write_file(path: str | Path, tensors: Iterable[tuple[str, torch.dtype, tuple[int, ...]]], get) -> None:
    """Write a safetensors file whose tensors are fetched by `get(name)` one after the other, so none waits in memory.

    `tensors` lists (name, dtype, shape). Writes straight to `path`: call it inside `ftc.files.atomic_folder`.
    Raises FtcFailure when the disk is full.
    """
    # Wider elements first, as the reference writer does, so that every tensor is aligned.
    tensors = sorted(tensors, key=lambda tensor: (-tensor[1].itemsize, tensor[0]))
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, dtype, shape in tensors:
        if dtype not in _NAMES:
            raise FtcError(f"tensor {name!r} has dtype {dtype}; writable: {', '.join(map(str, _NAMES))}")
        begin, end = end, end + torch.Size(shape).numel() * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    try:
        with open(path, "wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            for name, dtype, shape in tensors:
                tensor = get(name)
                assert (tensor.dtype, tuple(tensor.shape)) == (dtype, tuple(shape)), f"{name}: {tensor.shape}"
                file.write(memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise could_not_write(path, error) from error
