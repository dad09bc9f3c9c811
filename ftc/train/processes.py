"""How the processes of a run are started on this machine: their command and their environment."""

import atexit
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from ftc.train.machines import ONE, Machines

_TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def rank_command(
    module: str, arguments: Sequence[str], num_processes: int, max_restarts: int = 0, machines: Machines = ONE
) -> list[str]:
    """The command that runs `module` as one process, or under torchrun's elastic launch of several, `num_processes` a machine."""
    launch = [sys.executable, "-m"]
    if num_processes * machines.count > 1:
        launch += ["torch.distributed.run", *machines.torchrun_arguments(), f"--nproc_per_node={num_processes}"]
        launch += [f"--max_restarts={max_restarts}", "-m"]
    return [*launch, module, *arguments]


def rank_environment(num_processes: int) -> dict[str, str]:
    """This process's environment for such a command: nothing of a launch it stands in itself, and a share of the cores."""
    environment = {name: value for name, value in os.environ.items() if name not in _TORCHRUN}
    # Waiting threads sleep rather than spin: on a busy machine spinning ones make a step several times slower.
    environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # The agent's own store outlives a restart: ranks that start again would read where the dead ones listened, and wait for them.
    environment.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    if num_processes > 1:
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // num_processes)))
    return environment


def end_process(code: int) -> NoReturn:
    """End this process with `code`, after what is registered to run at exit, but without Python's own clearing up.

    While that goes on, a thread of gloo that wants the interpreter is ended inside C++ code, and takes the process with it (SIGABRT): a
    rank that did all its work would count as dead.
    """
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)
