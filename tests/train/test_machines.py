"""Runs over several machines: where they meet, that all have the same run, and two launchers that train together."""

import os
import socket
import stat
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import tiny_runs
from tiny_runs import losses

from ftc.errors import FtcError, FtcFailure
from ftc.train.config import dump_toml
from ftc.train.launch import train
from ftc.train.machines import Machines, wait_for_the_first
from ftc.train.processes import rank_command
from ftc.train.slurm import slurm_script


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ((0,), "0 machines cannot train"),
        ((2, 2, "a:29500"), "machine 2 is not one of 2; they count from 0 to 1"),
        ((2, 0, ""), "need a place to meet, host:port of the first one, such as node0:29500; got nothing"),
        ((2, 0, "node0"), "got 'node0'"),
        ((2, 0, "node0:0"), "got 'node0:0'"),
        ((2, 0, "node0:70000"), "got 'node0:70000'"),
        ((1, 0, "node0:29500"), "there is 1; say how many: --nnodes"),
        ((2, 0, "node0:29500", 0), "0 s is no time to wait"),
    ],
)
def test_machines_that_cannot_be(fields, said):
    with pytest.raises(FtcError) as raised:
        Machines(*fields)
    assert said in str(raised.value)


def test_a_port_in_use_is_said_before_anything_starts(tmp_path):
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]
        machines = Machines(2, 0, f"localhost:{port}")
        with pytest.raises(FtcError, match=rf"port {port} is in use on this machine.* such as localhost:\d+"):
            train({"model": {"flavor": "tiny"}, "ftc": {"data": __file__}}, tmp_path / "a", quiet=True, machines=machines)
    assert not list(tmp_path.iterdir())


def test_an_unknown_host_is_said_before_anything_starts():
    with pytest.raises(FtcError, match="'no-such-host.invalid' is not known here"):
        Machines(2, 1, "no-such-host.invalid:29500").check_endpoint()


def test_the_command_is_torchruns():
    command = rank_command("ftc.train", ["--x"], 4, 3, Machines(2, 1, "node0:29500", 60))
    assert command[1:3] == ["-m", "torch.distributed.run"] and command[-3:] == ["-m", "ftc.train", "--x"]
    assert {"--nnodes=2", "--nproc_per_node=4", "--rdzv_backend=c10d", "--rdzv_endpoint=node0:29500"} <= set(command)
    assert "--rdzv_conf=is_host=0,join_timeout=60,timeout=60" in command


def test_another_machine_waits_for_the_same_run(tmp_path):
    folder, text = tmp_path / "run", dump_toml({"job": {"dump_folder": "/b/run"}, "training": {"steps": 10}})
    machines = Machines(2, 1, "localhost:29500", 1)
    with pytest.raises(FtcFailure, match="waited 1 s for the first machine to begin in .* not a folder that the machines share"):
        wait_for_the_first(folder, folder / "run.toml", text, machines)

    def begin(steps):
        folder.mkdir(exist_ok=True)
        (folder / "ftc.json").write_text('{"kind": "train"}')
        (folder / "run.toml").write_text(dump_toml({"job": {"dump_folder": "/a/run"}, "training": {"steps": steps}}))

    begin(20)
    with pytest.raises(FtcError, match=r"another training.steps \(20, now 10\) than the first machine's run"):
        wait_for_the_first(folder, folder / "run.toml", text, machines)
    threading.Timer(0.3, begin, (10,)).start()
    wait_for_the_first(folder, folder / "run.toml", text, machines)


def run_file(data, **changes):
    """Of four steps of one window on each rank, with the flight recorder on."""
    ours = {"ftc__optimizer": "torchtitan", "ftc__validate": False, "training__steps": 4, "training__local_batch_size": 1}
    return tiny_runs.run_file(data, **ours | {"comm__trace_buf_size": 20000} | changes)


@pytest.mark.slow
def test_two_machines_train_what_one_does(data, tmp_path):
    pytest.importorskip("torchtitan")
    alone = train(run_file(data, training__local_batch_size=2), tmp_path / "alone", quiet=True)
    endpoint, folder = f"localhost:{free_port()}", tmp_path / "run"
    with ThreadPoolExecutor() as both:
        starts = [both.submit(train, run_file(data), folder, quiet=True, machines=Machines(2, index, endpoint, 60)) for index in (1, 0)]
        second, first = (start.result() for start in starts)
    assert first.steps == 4 and first.tokens == alone.tokens
    assert second is None or second == first
    assert losses(folder) == pytest.approx(losses(tmp_path / "alone"), rel=1e-5)
    assert (folder / "train-1.log").read_text() and (folder / "environment.json").is_file() and not (folder / "hang").exists()


@pytest.mark.slow
def test_the_slurm_script_runs_the_machines(data, tmp_path):
    """With stand-ins for SLURM's two commands: srun starts what it is given once for each machine."""
    pytest.importorskip("torchtitan")
    config, out = tmp_path / "it's a run.toml", tmp_path / "slurm run"
    config.write_text(dump_toml(run_file(data)))
    script = slurm_script(str(config), out, ["training.steps=2"], 1, 2, 0)
    assert "#SBATCH --nodes=2" in script and "#SBATCH --requeue" in script
    tools = {
        "scontrol": 'test "$*" = "show hostnames $SLURM_JOB_NODELIST" && echo localhost && echo other',
        "srun": 'shift; SLURM_NODEID=1 "$@" & SLURM_NODEID=0 "$@" && wait $!',
    }
    for name, body in tools.items():
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/usr/bin/env bash\n{body}\n")
        path.chmod(path.stat().st_mode | stat.S_IEXEC)
    environment = os.environ | {
        "PATH": f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}", "SLURM_JOB_NODELIST": "n[0-1]",
        "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_ID": str(free_port() - 20000 if free_port() > 20000 else 7),
    }  # fmt: skip
    done = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert sorted(losses(out)) == [1, 2]


def test_the_script_is_printed_and_its_run_file_checked(data, tmp_path):
    config = tmp_path / "run.toml"
    config.write_text(dump_toml(run_file(data)))
    command = [sys.executable, "-m", "ftc", "train", str(config), "--out", str(tmp_path / "run"), "--nproc", "8", "--nnodes", "4", "--slurm"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert subprocess.run(["bash", "-n"], input=printed, text=True, check=False).returncode == 0
    assert "#SBATCH --nodes=4" in printed and "--gpus-per-node=8" in printed
    wrong = subprocess.run([*command, "--set", "training.step=1"], capture_output=True, text=True, check=False)
    assert wrong.returncode == 2 and "did you mean 'steps'" in wrong.stderr and not (tmp_path / "run").exists()
