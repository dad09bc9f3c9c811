"""Work for the ranks of test_environment.py: the checks on a mesh of four or two, whole or with one rank broken."""

import socket
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from ftc.errors import FtcError
from ftc.train import environment


class Axes:
    """What torchtitan's ParallelDims answers for FSDP over tensor parallelism."""

    def __init__(self):
        self.mesh = init_device_mesh("cpu", (dist.get_world_size() // 2, 2), mesh_dim_names=("fsdp", "tp"))

    def get_optional_mesh(self, name):
        found = name in self.mesh.mesh_dim_names and self.mesh[name].size() > 1
        return self.mesh[name] if found else None


def checked(folder, broken=None):
    """Warnings, or what the error said. The last rank is the broken one, on a machine of another name."""
    rank, last = dist.get_rank(), dist.get_rank() == dist.get_world_size() - 1
    folder, settings = Path(folder), {"training": {"steps": 10}, "job": {"dump_folder": f"/mnt{rank}"}}
    breaks = []
    if broken and last:
        breaks.append(mock.patch.object(socket, "gethostname", lambda: "other"))
        if broken == "settings":
            settings["training"]["steps"] = 11
        if broken == "folder":
            folder = folder / "elsewhere"
        if broken == "all_reduce":
            original = dist.all_reduce
            breaks.append(mock.patch.object(dist, "all_reduce", lambda t, group: (original(t, group=group), t.mul_(2))))
    for each in breaks:
        each.start()
    try:
        with mock.patch.dict("os.environ", {"RANK": str(rank)}):
            return environment.check_environment(folder, settings, Axes(), torch.device("cpu"))
    except FtcError as error:
        return str(error)
    finally:
        for each in breaks:
            each.stop()
