"""What `ftc plan` shows while it works: what is measured, then how far the search is and what it has found."""

import contextlib
from collections.abc import Callable, Iterator

from ftc.commands.output import console
from ftc.plan.picture import bytes_text, seconds_text
from ftc.plan.plans import Progress


@contextlib.contextmanager
def searching(shown: bool, seconds: float) -> Iterator[tuple[Callable[[str], None], Callable[[Progress], None]]]:
    """(tell, follow): one says what is being done, the other takes the search's progress. Silent where nobody looks on, and with `shown` false."""
    from ftc.evaluate import progress_bar

    with progress_bar(shown and console(stderr=True).is_terminal, "s") as bar:
        task = bar.add_task("reading the run", total=None)

        def tell(said: str) -> None:
            bar.update(task, description=said)

        def follow(progress: Progress) -> None:
            best = f"{progress.tried} tried, best {seconds_text(progress.step_seconds)}, {bytes_text(progress.peak_bytes)}, {progress.gap:.1%} above the bound"
            bar.update(task, total=round(seconds), completed=min(progress.elapsed_seconds, seconds), description=best)

        yield tell, follow
