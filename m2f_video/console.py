"""What the commands show: tables, and progress bars where there is a terminal."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.table import Table
from tqdm import tqdm

PLAIN_WIDTH = 140  # columns of a table where there is no terminal to fit


@contextmanager
def progress_bars(unit: str = "it") -> Iterator[Callable[[str, int, int | None], None]]:
    """One bar per stage, on a terminal only.

    Yields:
        A function to call with a stage, how much of it is done, and of how much (None: not known).
    """
    bars: dict[str, tqdm] = {}

    def update(stage: str, done: int, total: int | None) -> None:
        if stage not in bars:
            bars[stage] = tqdm(desc=stage, total=total, unit=unit, disable=None)
        bars[stage].update(done - bars[stage].n)

    try:
        yield update
    finally:
        for bar in bars.values():
            bar.close()


def print_table(table: Table) -> None:
    """Print a table, at its full width where there is no terminal to fit."""
    console = Console()
    Console(width=None if console.is_terminal else PLAIN_WIDTH).print(table)
