"""Checkpoints that a full disk cannot end a run with."""

import errno
import time
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.api import CheckpointException
from torchtitan.tools.logging import logger

from ftc.train.checkpoint_files import remove_half_checkpoints
from ftc.train.ranks import is_first_rank


class TolerantCheckpoints:
    """torchtitan's checkpoint manager, except that a checkpoint for which there is no room is given up, not the run.

    What was written of it is removed, the older ones stay, and the next is tried when it is due. The last one of a run
    is not given up: it raises, as training would be lost with it.
    """

    def __init__(self, manager: Any, folder: Path):
        self._manager, self._folder = manager, folder
        self.seconds = 0.0  # that training waited in `save`; the last step's save is not training's

    def __getattr__(self, name: str) -> Any:
        return getattr(self._manager, name)

    def save(self, step: int, last_step: bool = False) -> None:
        """torchtitan's `save`, on every rank."""
        started = time.perf_counter()
        try:
            self._manager.save(step, last_step=last_step)
        except (OSError, CheckpointException) as error:
            if last_step or not _is_full(error):
                raise
            if is_first_rank():
                remove_half_checkpoints(self._folder)
            logger.warning(f"there is no room for the checkpoint of step {step}; training goes on without it")
        finally:
            if not last_step:
                self.seconds += time.perf_counter() - started


def _is_full(error: BaseException) -> bool:
    """Whether an error, or one of those that ranks reported inside it, says that the disk is full."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    if isinstance(error, CheckpointException):
        return any(_is_full(inner[0]) or "No space left" in str(inner[0]) for inner in error.failures.values())
    return "No space left" in str(error)
