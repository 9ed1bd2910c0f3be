"""Progress of the work before training: reading, encoding, checking."""

import contextlib
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import Progress


@contextlib.contextmanager
def progress(title: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
    """Gives a function that takes the amount done since its last call; no total is no bound.

    A bar appears on stderr for work that lasts over a second.
    """
    bar = Progress(console=Console(stderr=True))
    task = bar.add_task(title, total=total)
    begun = time.monotonic()

    def advance(amount: int) -> None:
        bar.advance(task, amount)
        if time.monotonic() - begun > 1:
            bar.start()

    try:
        yield advance
    finally:
        if bar.live.is_started:
            bar.stop()
