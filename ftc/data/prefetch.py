"""An iterator that runs ahead in a thread of its own, by a bounded number of items."""

import queue
import threading
from collections.abc import Iterator
from typing import Any


class Prefetch:
    """Gives the items of `iterator` in their order while at most `depth` further ones are made.

    What the iterator raises is raised here after the items before it. `close` ends the thread; so does losing the object.
    """

    def __init__(self, iterator: Iterator[Any], depth: int):
        self._items: queue.Queue = queue.Queue(maxsize=depth)
        self._stopped = threading.Event()
        arguments = (iterator, self._items, self._stopped)
        self._thread = threading.Thread(target=_run, args=arguments, name="ftc-data", daemon=True)
        self._thread.start()

    def __iter__(self) -> "Prefetch":
        return self

    def __next__(self) -> Any:
        item, error = self._items.get()
        if error is not None:
            self._items.put((None, error))  # for whoever asks again
            raise error
        return item

    def close(self) -> None:
        """End the thread and wait for it."""
        self._stopped.set()
        if self._thread is not threading.current_thread():
            self._thread.join()

    def __del__(self) -> None:
        self._stopped.set()


def _run(iterator: Iterator[Any], items: queue.Queue, stopped: threading.Event) -> None:
    """Fill `items` with (item, None), at the end with (None, error), until stopped."""

    def put(entry: tuple[Any, BaseException | None]) -> bool:
        while not stopped.is_set():
            try:
                items.put(entry, timeout=0.05)
                return True
            except queue.Full:
                continue
        return False

    try:
        for item in iterator:
            if not put((item, None)):
                return
        put((None, StopIteration()))
    except BaseException as error:
        put((None, error))
