"""How ranks start again, and how they end."""

import subprocess
import sys

from ftc.train.processes import rank_command, rank_environment

# Ranks that meet in a store, of which one dies at the first attempt; each says what the second attempt knows of the first.
MEETING = """
import os, pathlib, time
import torch.distributed as dist

attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
store, rank, num_ranks = next(dist.rendezvous("env://"))
met = [f"attempt {attempt}, rank {each}" for each in range(num_ranks)]
store.set(met[rank], "here")
store.wait(met)
if attempt == 0:
    os._exit(1) if rank == 1 else time.sleep(60)
pathlib.Path(f"rank{rank}").write_text(f"{attempt} {store.check(['attempt 0, rank 1'])}")
store.set(f"done {rank}", "")
store.wait([f"done {each}" for each in range(num_ranks)])
"""


def test_ranks_that_start_again_find_nothing_of_the_dead(tmp_path):
    (tmp_path / "meeting.py").write_text(MEETING)
    environment = rank_environment(2) | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        rank_command("meeting", [], 2, max_restarts=1), cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=180
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert [(tmp_path / f"rank{rank}").read_text() for rank in range(2)] == ["1 False"] * 2


def test_a_process_ends_with_its_code_whatever_goes_wrong_in_the_interpreters_end():
    code = (
        "import atexit, os, sys\n"
        "from ftc.train.processes import end_process\n"
        "class Aborts:\n"
        "    def __init__(self): self.abort = os.abort\n"
        "    def __del__(self): self.abort()\n"
        "sys.kept = Aborts()\n"
        "atexit.register(lambda: print('closed'))\n"
        "print('worked')\n"
    )
    plain = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert plain.returncode < 0, "it has to go wrong without"
    ended = subprocess.run([sys.executable, "-c", code + "end_process(3)"], capture_output=True, text=True)
    assert (ended.returncode, ended.stdout.split()) == (3, ["worked", "closed"])
