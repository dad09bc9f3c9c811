"""A script for SLURM's sbatch that runs `ftc train` on several machines."""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from ftc.errors import FtcError
from ftc.train.shipped import run_file

_SCRIPT = """\
#!/usr/bin/env bash
#SBATCH --job-name={name}
#SBATCH --nodes={nodes}
#SBATCH --ntasks-per-node=1          # one launcher a machine; it starts the {processes} processes itself
#SBATCH --gpus-per-node={processes}            # remove this line where there are no GPUs
#SBATCH --cpus-per-task={cpus}
#SBATCH --exclusive
#SBATCH --time=24:00:00              # a job that is cut off goes on from its newest checkpoint
#SBATCH --output={out}.%j.log
#SBATCH --requeue
#SBATCH --open-mode=append

set -euo pipefail

# Machines meet on the first of the job's; the port follows from the job, so two jobs on one machine do not collide.
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
port=$((20000 + SLURM_JOB_ID % 20000))
export head port

# What a network of several cards usually needs; see docs/several_machines.md.
# export NCCL_SOCKET_IFNAME=eth0 NCCL_IB_HCA=mlx5

# --kill-on-bad-exit: when one machine fails for good, the others do not wait for it.
srun --kill-on-bad-exit=1 bash -c '
    exec {command} \\
        --nnodes "$SLURM_JOB_NUM_NODES" --node-rank "$SLURM_NODEID" --rdzv-endpoint "$head:$port"
'
"""


def slurm_script(
    config: str, out: str | Path, changes: Sequence[str], num_processes: int, num_machines: int, max_restarts: int
) -> str:
    """The script's text. changes: those of --set. `out` must be a folder that all machines share, and the interpreter there for all."""
    if num_processes < 1 or num_machines < 1:
        raise FtcError(f"{num_machines} machines with {num_processes} processes each cannot train; use 1 or more")
    named = str(config) if not Path(config).is_file() else str(run_file(config).resolve())
    folder = Path(out).absolute()
    command = [sys.executable, "-m", "ftc", "train", named, "--out", str(folder), "--nproc", str(num_processes), "--max-restarts", str(max_restarts)]
    command += [part for change in changes for part in ("--set", change)]
    quoted = shlex.join(command).replace("'", "'\\''")  # it stands within single quotes
    return _SCRIPT.format(
        name=Path(out).name, nodes=num_machines, processes=num_processes, cpus=max(8 * num_processes, 1), out=folder, command=quoted
    )
