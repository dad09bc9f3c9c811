"""Where each rank stands when no step ends for too long: Python stacks, and the collectives of torch's flight recorder.

    hang/rank00000.json     of each rank: its stacks, and its last collectives by process group
    hang/report.txt         who waits for whom

The recorder counts the collectives of every process group, on gloo as on NCCL; it is on unless comm.trace_buf_size is 0.
"""

import contextlib
import json
import os
import shutil
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ftc.files import atomic_write

FOLDER, REPORT_FILE = "hang", "report.txt"
_KEPT = 8  # collectives of a group in a rank's account
GATHERING_SECONDS = 5.0  # ranks notice at slightly different times
THREAD = "hang-watch"


class Unwatched:
    """No watch: outside a run's loop, or switched off."""

    def beat(self, step: int, doing: str, step_ended: bool = False) -> None:
        pass


@contextlib.contextmanager
def watching(folder: Path, job_config: Any, say: Callable[[str], None]) -> Iterator[Any]:
    """A watch as the run file asks for it, ended at the end of the body."""
    asked, comm = job_config.ftc.hang_seconds, job_config.comm
    if asked < 0:
        yield Unwatched()
        return
    limits = (asked, asked) if asked else (comm.init_timeout_seconds / 2, comm.train_timeout_seconds / 2)
    rank, num_ranks = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))
    ceiling = float("inf") if asked or num_ranks == 1 else 0.9 * comm.train_timeout_seconds
    watch = HangWatch(folder, (rank, num_ranks), (*limits, ceiling), say)
    try:
        yield watch
    finally:
        watch.close()


class HangWatch:
    """A thread that writes this rank's account when nothing ended for too long; once for each silence.

    place: (rank, number of ranks). limits: seconds (until the first step has ended, afterwards, at most): afterwards it is also
    at least three times the longest step so far, but no more than the last, after which a collective fails. The lowest rank
    with an account puts the report together and gives it to `say`.
    """

    def __init__(self, folder: Path, place: tuple[int, int], limits: tuple[float, float, float], say: Callable[[str], None]):
        self.folder, self._say, (self._rank, self._num_ranks) = Path(folder) / FOLDER, say, place
        self._limit, *self._limits = limits
        self._state = (time.monotonic(), 0, "starting")  # replaced as a whole: two threads use it
        self._started, self._longest, self._told = time.monotonic(), None, None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name=THREAD, daemon=True)
        self._thread.start()

    def beat(self, step: int, doing: str, step_ended: bool = False) -> None:
        """Something ended, and `doing` begins; `step_ended`: the step with all that belongs to it."""
        now = time.monotonic()
        self._state = (now, step, doing)
        if step_ended:
            if self._longest is None:
                self._longest = 0.0  # the first step compiles
            else:
                self._longest = max(self._longest, now - self._started)
            self._limit = min(max(self._limits[0], 3 * self._longest), self._limits[1])
            self._started = now

    def close(self) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(min(1.0, self._limit / 4)):
            since, step, doing = self._state
            with contextlib.suppress(Exception):  # an account that cannot be written must not end a run
                if self._told is not None and self._told != since:
                    self._withdraw(step)
                elif self._told is None and time.monotonic() - since >= self._limit:
                    self._told = since
                    self._tell(step, doing, time.monotonic() - since)

    def _tell(self, step: int, doing: str, seconds: float) -> None:
        account = account_of(self._rank, step, doing, seconds)
        atomic_write(self._own_file(), json.dumps(account, indent=1) + "\n")
        self._ended.wait(GATHERING_SECONDS)
        accounts = read_accounts(self.folder)
        if accounts and accounts[0]["rank"] == account["rank"]:
            text = report(accounts, self._num_ranks)
            atomic_write(self.folder / REPORT_FILE, text)
            self._say(text)

    def _withdraw(self, step: int) -> None:
        """It went on after all."""
        self._told = None
        self._own_file().unlink(missing_ok=True)
        self._say(f"rank {self._rank} goes on, at step {step}")

    def _own_file(self) -> Path:
        return self.folder / f"rank{self._rank:05d}.json"


def account_of(rank: int, step: int, doing: str, seconds: float) -> dict[str, Any]:
    """What is known of this process: stacks of its threads (innermost call last) and collectives by group."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    stacks = {}
    for ident, frame in sys._current_frames().items():
        name = names.get(ident, str(ident))
        if name != THREAD:
            stacks[name] = [f"{f.filename}:{f.lineno} in {f.name}" for f in traceback.extract_stack(frame)]
    place = {"rank": rank, "host": socket.gethostname(), "step": step, "doing": doing, "seconds": round(seconds, 1)}
    return place | {"stacks": stacks, "groups": collectives()}


def collectives() -> dict[str, dict[str, Any]]:
    """{group: {"name", "ranks", "calls": [{"number", "op", "sizes", "dtypes", "done"}, ...]}} of this process, newest last."""
    from torch._C._distributed_c10d import _dump_fr_trace_json

    try:
        trace = json.loads(_dump_fr_trace_json())
    except (RuntimeError, ValueError):  # nothing was recorded
        return {}
    groups: dict[str, dict[str, Any]] = {}
    for entry in trace.get("entries", []):
        if entry["is_p2p"]:
            continue
        number, name = entry["process_group"]
        ranks = trace.get("pg_config", {}).get(number, {}).get("ranks") or "[]"
        group = groups.setdefault(number, {"name": name, "ranks": json.loads(ranks), "calls": []})
        group["calls"].append({
            "number": entry["collective_seq_id"], "op": entry["profiling_name"].rpartition(":")[2],
            "sizes": entry["input_sizes"], "dtypes": entry["input_dtypes"],
            "done": bool(entry["retired"]) or entry["state"] == "completed",
        })  # fmt: skip
    for group in groups.values():
        group["calls"] = group["calls"][-_KEPT:]
    return groups


def read_accounts(folder: Path) -> list[dict[str, Any]]:
    """The accounts in a folder, by rank."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob("rank*.json"))]


def remove_accounts(folder: Path) -> None:
    """Those of an earlier start."""
    shutil.rmtree(Path(folder) / FOLDER, ignore_errors=True)


def hang_summary(folder: Path) -> str:
    """What a report in a run's folder says of the cause, as the part of a sentence; "" where there is none."""
    try:
        _, *said = (Path(folder) / FOLDER / REPORT_FILE).read_text().partition("\n\n")[0].splitlines()
    except FileNotFoundError:
        return ""
    return f"before that the ranks hung ({' '.join(said)} All of it: {Path(folder) / FOLDER / REPORT_FILE}); "


def report(accounts: Sequence[Mapping[str, Any]], num_ranks: int) -> str:
    """Who waits for whom, and where each stands, as text; the likely cause first."""
    seconds, step = max(a["seconds"] for a in accounts), max(a["step"] for a in accounts)
    lines = [f"Nothing has ended for {seconds:.0f} s, at step {step}."]
    silent = sorted(set(range(num_ranks)) - {a["rank"] for a in accounts})
    if silent:
        lines.append(f"{_named(silent)} wrote nothing: the process is stopped or gone, its machine does not answer, or it has just gone on.")
    lines += causes(accounts)
    for account in accounts:
        lines += ["", f"rank {account['rank']} on {account['host']}, {account['doing']}, {_last_call(account)}; it stands at"]
        lines += [f"    {place}" for place in account["stacks"].get("MainThread", [])[-12:]]
    return "\n".join(lines) + "\n"


def causes(accounts: Sequence[Mapping[str, Any]]) -> list[str]:
    """A sentence for each process group in which ranks wait for others, or call different collectives."""
    said = []
    for number in sorted({n for a in accounts for n in a["groups"]}):
        states = {a["rank"]: a["groups"].get(number) for a in accounts}
        group = next(state for state in states.values() if state)
        members = list(group["ranks"] or states)
        last = {rank: (states.get(rank) or {"calls": []})["calls"][-1:] for rank in members}
        newest = max(call[0]["number"] for call in last.values() if call)
        there = {rank: call[0] for rank, call in last.items() if call and call[0]["number"] == newest}
        behind = [rank for rank in members if rank not in there]
        waiting = [rank for rank, call in there.items() if not call["done"]]
        name = f"group {group['name']}" if group["name"] else f"group {number}"
        if behind and waiting:
            call = there[waiting[0]]
            known = [rank for rank in behind if rank in states]
            told = [f"{_named(known)}, which did not call it"] if known else []
            told += [f"{_named(rest)}, of which nothing is known"] if (rest := sorted(set(behind) - set(known))) else []
            said.append(f"{_named(waiting)} wait{_s(waiting)} in {_called(call)} of {name} for {', and '.join(told)}.")
        elif waiting and len({_called(call) for call in there.values()}) > 1:
            calls = "; ".join(f"rank {rank}: {_called(call)}" for rank, call in there.items())
            said.append(f"The ranks of {name} call different collectives, which never end: {calls}.")
        elif waiting:
            said.append(f"All of {_named(waiting)} are in {_called(there[waiting[0]])} of {name}: the connection between them is stuck, or slow.")
    return said or ["No rank waits in a collective: the work itself takes this long, or comm.trace_buf_size is 0 and none was recorded."]


def _last_call(account: Mapping[str, Any]) -> str:
    open_calls = [(group["name"] or number, call) for number, group in account["groups"].items() for call in group["calls"] if not call["done"]]
    if not open_calls:
        return "in no collective"
    name, call = open_calls[0]
    return f"in {_called(call)} of {name}"


def _called(call: Mapping[str, Any]) -> str:
    shapes = ", ".join(f"{dtype.lower()} {size}" for dtype, size in zip(call["dtypes"], call["sizes"], strict=False))
    return f"{call['op']} {call['number']}" + (f" ({shapes})" if shapes else "")


def _named(ranks: Sequence[int]) -> str:
    shown = ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
    return f"rank {shown}" if len(ranks) == 1 else f"ranks {shown}"


def _s(ranks: Sequence[int]) -> str:
    return "s" if len(ranks) == 1 else ""
