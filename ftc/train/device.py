"""Make torchtitan 0.2.2 run on a machine without an accelerator: the one place that touches torch and torchtitan for it.

torchtitan asks torch for an accelerator's module and calls functions on it that `torch.cpu` lacks. `install()` must run
before torchtitan is imported. On a machine with an accelerator it does nothing.
"""

from types import SimpleNamespace
from typing import Any

import torch


def install() -> str:
    """Add what torch.cpu lacks, once, and return the device type that training will use ("cpu", "cuda", ...).

    Adds to `torch.cpu`: get_device_name, get_device_properties, memory_stats, reset_peak_memory_stats, empty_cache; the
    memory figures are the process's own. Makes `torch._utils._get_available_device_type` answer "cpu", and replaces
    torchtitan's `set_pg_timeouts`, which gloo does not support, by nothing.
    """
    device_type = torch._utils._get_available_device_type()
    if device_type not in (None, "cpu"):
        return device_type
    torch._utils._get_available_device_type = lambda: "cpu"
    for name, function in _CPU_FUNCTIONS.items():
        if not hasattr(torch.cpu, name):
            setattr(torch.cpu, name, function)
    from torchtitan.distributed import utils as distributed_utils

    distributed_utils.set_pg_timeouts = _keep_pg_timeouts
    return "cpu"


def _keep_pg_timeouts(timeout: Any, parallel_dims: Any) -> None:
    """gloo process groups keep the timeout they were made with."""


def _memory_stats(device: Any = None) -> dict[str, int]:
    import psutil

    resident_bytes = psutil.Process().memory_info().rss
    return {"active_bytes.all.peak": resident_bytes, "reserved_bytes.all.peak": resident_bytes}


def _device_properties(device: Any = None) -> SimpleNamespace:
    import psutil

    return SimpleNamespace(total_memory=psutil.virtual_memory().total)


_CPU_FUNCTIONS = {
    "get_device_name": lambda device=None: "cpu",
    "get_device_properties": _device_properties,
    "memory_stats": _memory_stats,
    "reset_peak_memory_stats": lambda device=None: None,
    "empty_cache": lambda: None,
}
