"""Checks of the machines before the first step: one code and configuration everywhere, a shared folder, clocks, collectives, disk.

    environment.json    in the run's folder: what was found, by machine and by axis of the mesh
"""

import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ftc.errors import FtcError
from ftc.files import atomic_write
from ftc.train.ranks import is_first_rank

ENVIRONMENT_FILE = "environment.json"
_PACKAGES = ("torch", "torchtitan", "torchao", "transformers", "triton")
_SAME_VARIABLES = ("NCCL_", "GLOO_", "TORCH_NCCL_", "TORCH_FR_", "UCX_", "FI_")
_OWN_VARIABLES = ("TORCH_FR_DUMP_TEMP_FILE", "NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME")  # interfaces may be named differently
CLOCK_SECONDS = 2.0
_PROBE_BYTES = {"cpu": 1 << 20, "cuda": 1 << 26}
_AXES = ("dp_replicate", "fsdp", "cp", "tp", "pp")  # of torchtitan's mesh; fsdp: shards, over the context-parallel ranks too


def check_environment(folder: Path, settings: Mapping[str, Any], parallel_dims: Any, device: torch.device) -> list[str]:
    """Compare all ranks, try the collectives of each axis, and write environment.json; returns warnings. All ranks must call it.

    settings: the resolved configuration. Raises FtcError, on every rank, for what would end or spoil the run.
    """
    if dist.get_world_size() == 1:
        return []
    token = _token(folder)
    own = facts(folder, settings, token)
    found: list[dict[str, Any]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(found, own)
    if is_first_rank():
        (folder / token).unlink(missing_ok=True)
    errors, warnings = compare(found)
    if errors:
        raise FtcError("; ".join(errors))
    meshes = {axis: parallel_dims.get_optional_mesh(axis) for axis in _AXES}
    axes = {axis: try_axis(mesh, found, device) for axis, mesh in meshes.items() if mesh is not None}
    failed = [f"the ranks of axis {axis} (such as {values['ranks']}) do not sum right" for axis, values in axes.items() if not values["right"]]
    if failed:
        raise FtcError("all-reduce gives wrong values: " + "; ".join(failed) + "; check the network and the versions of NCCL or gloo")
    warnings += crossing(axes)
    if is_first_rank():
        machines = list({each["host"]: {k: v for k, v in each.items() if k != "settings"} for each in reversed(found)}.values())[::-1]
        atomic_write(folder / ENVIRONMENT_FILE, json.dumps({"machines": machines, "axes": axes, "warnings": warnings}, indent=1) + "\n")
    return warnings


def facts(folder: Path, settings: Mapping[str, Any], token: str) -> dict[str, Any]:
    """What this rank knows of its machine. All ranks must call it: their clocks are read right after a barrier."""
    dist.barrier()
    clock = time.time()
    versions = {"python": platform.python_version(), "ftc source": source_digest()}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    device = "cpu"
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
        versions |= {"CUDA": torch.version.cuda or "none", "NCCL": ".".join(map(str, torch.cuda.nccl.version()))}
    variables = {k: v for k, v in os.environ.items() if k.startswith(_SAME_VARIABLES) and k not in _OWN_VARIABLES}
    return {
        "host": socket.gethostname(), "clock": clock, "versions": versions, "device": device,
        "variables": variables, "sees_folder": (folder / token).is_file(), "folder": str(folder),
        "free_bytes": shutil.disk_usage(_existing(folder)).free, "settings": _flat(settings),
        "shared_memory_bytes": shutil.disk_usage("/dev/shm").free if Path("/dev/shm").is_dir() else None,
    }  # fmt: skip


def compare(found: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[str]]:
    """(errors, warnings) of what ranks, given in order, know of their machines (`facts`)."""
    errors, warnings = [], []
    for name in sorted({name for each in found for name in each["versions"]}):
        if said := _differing(found, lambda each, name=name: each["versions"].get(name, "none")):
            what = "ftc's own source files (by digest)" if name == "ftc source" else name
            errors.append(f"the machines have different versions of {what}: {said}; install the same on all")
    for key in sorted({key for each in found for key in each["settings"]}):
        if said := _differing(found, lambda each, key=key: each["settings"].get(key)):
            errors.append(f"the ranks were given different values of {key}: {said}")
    blind = sorted({each["host"] for each in found if not each["sees_folder"]})
    if blind:
        errors.append(f"{', '.join(blind)} cannot see what the first rank writes to {found[0]['folder']}; the run's folder must be shared by all machines")
    if said := _differing(found, lambda each: each["device"]):
        warnings.append(f"the ranks run on different devices, and wait for the slowest: {said}")
    for name in sorted({name for each in found for name in each["variables"]}):
        if said := _differing(found, lambda each, name=name: each["variables"].get(name, "unset")):
            warnings.append(f"{name} differs: {said}")
    offsets = {each["host"]: each["clock"] - found[0]["clock"] for each in found}
    for host, offset in offsets.items():
        if abs(offset) > CLOCK_SECONDS:
            warnings.append(f"the clock of {host} is {offset:+.1f} s from that of {found[0]['host']}; logs and file times will not agree: start NTP")
    return errors, warnings


def try_axis(mesh: Any, found: Sequence[Mapping[str, Any]], device: torch.device) -> dict[str, Any]:
    """An all-reduce over the ranks of an axis, checked and timed: {"degree", "ranks", "hosts", "right", "bytes_per_second"}.

    bytes_per_second is NCCL's "bus bandwidth" of the slowest group: 2 (n - 1) / n times the bytes over the time.
    """
    group, ranks = mesh.get_group(), dist.get_process_group_ranks(mesh.get_group())
    numel = _PROBE_BYTES.get(device.type, _PROBE_BYTES["cpu"]) // 4
    expected, fastest, right = sum(rank + 1 for rank in ranks), float("inf"), True
    for _ in range(4):  # the first sets up the connections
        probe = torch.full((numel,), float(dist.get_rank() + 1), device=device)
        _synchronize(device)
        started = time.perf_counter()
        dist.all_reduce(probe, group=group)
        _synchronize(device)
        fastest = min(fastest, time.perf_counter() - started)
        right = right and bool((probe == expected).all())
    own = {"ranks": ranks, "right": right, "bytes_per_second": 2 * (len(ranks) - 1) / len(ranks) * numel * 4 / fastest}
    everyone: list[dict[str, Any]] = [{} for _ in found]
    dist.all_gather_object(everyone, own)
    slowest = min(everyone, key=lambda each: (each["right"], each["bytes_per_second"]))
    crosses = max(len({found[rank]["host"] for rank in each["ranks"]}) for each in everyone)
    return slowest | {"degree": len(ranks), "hosts": crosses}


def crossing(axes: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Warnings for axes that exchange activations within each layer and lie across machines."""
    said = []
    for axis, option in (("tp", "tensor_parallel_degree"), ("cp", "context_parallel_degree")):
        values = axes.get(axis)
        if values and values["hosts"] > 1:
            rate = f"{values['bytes_per_second'] / 1e9:.2f} GB/s"
            said.append(f"axis {axis} lies across {values['hosts']} machines ({rate}) and waits for the network in every layer; choose a parallelism.{option} that divides the ranks of one machine")
    return said


def checkpoint_bytes(trainer: Any) -> int:
    """Size of a whole checkpoint with optimizer state: two moments beside each trained weight, before there are any."""
    parameters = [p for part in trainer.model_parts for p in part.parameters()]
    own = sum(p.numel() * p.element_size() * (3 if p.requires_grad else 1) for p in parameters)
    if trainer.pipeline is None:
        return own
    return sum(trainer.pipeline.told(own))  # what several stages hold counts for each


def check_disk(folder: Path, needed: int, kept: int, free: int | None = None) -> str | None:
    """A warning where the kept checkpoints will not all fit beside each other; FtcError where not even a first one does."""
    free = shutil.disk_usage(_existing(folder)).free if free is None else free
    gigabytes = f"a checkpoint takes about {needed / 2**30:.2f} GiB, and {free / 2**30:.2f} GiB are free for {folder}"
    if folder.is_dir() and any(folder.iterdir()):  # of the old ones some will go
        return f"{gigabytes}; saving will fail unless old checkpoints make room" if free < needed else None
    if free < needed:
        raise FtcError(f"{gigabytes}: not one would fit; free space, name another folder, or set checkpoint.enable = false")
    copies = max(kept, 1) + 1  # a new one is written before the oldest goes
    return f"{gigabytes}; {copies} beside each other will not fit" if free < copies * needed else None


def source_digest() -> str:
    """Of ftc's own Python files, so that two machines with different checkouts are told apart."""
    import ftc
    import ftc.models
    import ftc.passes

    digest = hashlib.sha256()
    for package in (ftc, ftc.models, ftc.passes):
        root = Path(package.__path__[0])
        for path in sorted(root.rglob("*.py")):
            digest.update(str(path.relative_to(root)).encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def _token(folder: Path) -> str:
    """A file of the first rank that all should see; its name, on every rank."""
    name: list[Any] = [f".seen-{os.getpid()}-{time.time_ns()}"]
    dist.broadcast_object_list(name, src=0)
    if is_first_rank():
        atomic_write(folder / name[0], "")
    dist.barrier()
    return name[0]


def _differing(found: Sequence[Mapping[str, Any]], value_of: Any) -> str:
    """"A on host1; B on host2" where values differ, else ""."""
    hosts: dict[str, list[str]] = {}
    for each in found:
        names = hosts.setdefault(str(value_of(each)), [])
        if each["host"] not in names:
            names.append(each["host"])
    if len(hosts) < 2:
        return ""
    return "; ".join(f"{value} on {', '.join(names[:4])}" + (f" and {len(names) - 4} more" if len(names) > 4 else "") for value, names in hosts.items())


def _flat(settings: Mapping[str, Any]) -> dict[str, str]:
    """{"section.key": value} as text, without what may differ between machines: where the folder is."""
    flat = {f"{section}.{key}": repr(value) for section, table in settings.items() for key, value in table.items()}
    return {key: value for key, value in flat.items() if key not in ("job.dump_folder", "job.config_file")}


def _existing(folder: Path) -> Path:
    return next(path for path in (folder, *folder.absolute().parents) if path.exists())


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
