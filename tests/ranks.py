"""A pool of processes that run functions as the ranks of a gloo group. Started once a session; each call gets a group of its own.

    results = ranks.run(function, *args, size=2)        # function(*args) on ranks 0 and 1; their results, in order

Functions are found by name, in modules that the processes import themselves; arguments and results may hold tensors. What costs seconds to import is
imported once, by the server that the processes are forked from.
"""

import importlib
import io
import multiprocessing
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta

import torch

PRELOAD = ["torch", "torch.distributed.tensor", "torch.distributed.fsdp", "torch.distributed.checkpoint", "ftc.parallel", "ftc.rewrite.pipeline", "transformers"]
SIZE = 4


class Pool:
    """`size` processes; `run` uses as many of them as it is asked to. A call that fails or hangs does not spoil the next one."""

    def __init__(self, size: int = SIZE):
        self.size = size
        self._folder = tempfile.TemporaryDirectory(prefix="ranks-")
        self._calls = 0
        self._workers: list[tuple] = []

    def run(self, function: Callable | str, *args, size: int | None = None, timeout: float = 240.0, **kwargs) -> list:
        """`function` (or "module:name") on ranks 0 .. size-1 of a fresh group; RuntimeError with the traceback of the first rank that failed."""
        if not self._workers:
            self._start()
        size = self.size if size is None else size
        name = function if isinstance(function, str) else f"{function.__module__}:{function.__qualname__}"
        self._calls += 1
        store = os.path.join(self._folder.name, f"store{self._calls}")
        call = _packed((store, size, name, args, kwargs, sys.path))
        for connection, _ in self._workers[:size]:
            connection.send_bytes(call)
        answers = []
        for rank, (connection, _) in enumerate(self._workers[:size]):
            if not connection.poll(timeout):
                self._stop()
                raise RuntimeError(f"rank {rank} of {name} gave no answer within {timeout:.0f} s")
            try:
                answers.append(_unpacked(connection.recv_bytes()))
            except EOFError:
                self._stop()
                raise RuntimeError(f"rank {rank} of {name} died") from None
        failed = [f"rank {rank}:\n{text}" for rank, (ok, text) in enumerate(answers) if not ok]
        if failed:
            raise RuntimeError(f"{name} failed on {len(failed)} of {size} ranks\n" + "\n".join(failed))
        return [value for _, value in answers]

    def _start(self) -> None:
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        for rank in range(self.size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, rank), daemon=True)
            process.start()
            theirs.close()
            self._workers.append((ours, process))

    def _stop(self) -> None:
        for connection, process in self._workers:
            process.kill()
            process.join()
            connection.close()
        self._workers = []

    def close(self) -> None:
        """End the processes."""
        self._stop()
        self._folder.cleanup()


def _packed(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _unpacked(data: bytes) -> object:
    return torch.load(io.BytesIO(data), weights_only=False)


def _serve(connection, rank: int) -> None:
    torch.set_num_threads(1)
    while True:
        try:
            call = _unpacked(connection.recv_bytes())
        except EOFError:
            return
        try:
            answer = (True, _answer(rank, *call))
        except BaseException:
            answer = (False, traceback.format_exc())
        connection.send_bytes(_packed(answer))


def _answer(rank: int, store: str, size: int, name: str, args: tuple, kwargs: dict, path: list[str]):
    import torch.distributed as dist

    from ftc.dialect.ranks import standing_at

    sys.path[:] = path
    module, _, attribute = name.partition(":")
    function = getattr(importlib.import_module(module), attribute)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=timedelta(seconds=120))
    try:
        with standing_at({}):
            value = function(*args, **kwargs)
            dist.barrier()
            return value
    finally:
        dist.destroy_process_group()
