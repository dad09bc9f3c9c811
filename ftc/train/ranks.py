"""The processes of a run: who is first, and how all learn what one of them found."""

import os
from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

from ftc.errors import FtcError, FtcFailure

T = TypeVar("T")


def is_first_rank() -> bool:
    """Whether this process is the one that writes files and prints."""
    return int(os.environ.get("RANK", 0)) == 0


def first_rank_first(action: Callable[[], T]) -> T:
    """Run `action` on the first rank, then on the others, which find done what it did. Its errors are raised on all ranks."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return action()
    result, said = None, [None]
    if dist.get_rank() == 0:
        try:
            result = action()
        except (FtcError, FtcFailure) as error:
            said = [error]
        except Exception as error:
            said = [FtcFailure(f"{type(error).__name__}: {error}")]
    dist.broadcast_object_list(said, src=0)
    if said[0] is not None:
        raise said[0]
    return result if dist.get_rank() == 0 else action()


def on_first_rank(action: Callable[[], T]) -> T | None:
    """Run `action` on the first rank alone, None on the others, which wait for it. Its errors are raised on all ranks."""
    return first_rank_first(lambda: action() if is_first_rank() else None)


def first_rank_finds(action: Callable[[], T]) -> T:
    """What `action` gives on the first rank, on all ranks. Its errors are raised on all ranks."""
    found = [on_first_rank(action)]
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        dist.broadcast_object_list(found, src=0)
    return found[0]
