"""What the commands show: tables, and progress bars where there is a terminal."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.table import Table
from tqdm import tqdm

PLAIN_WIDTH = 140  # columns of a table where there is no terminal to fit
LONGEST_LINE = 300  # characters of a message


def one_line(text: object) -> str:
    """A text as one line of at most `LONGEST_LINE` characters, with what is not printable escaped.

    What is too long loses its middle: messages begin with the thing they are about, and end with the remedy.
    """
    line = " ".join(str(text).split())
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)
    if len(line) <= LONGEST_LINE:
        return line
    kept = LONGEST_LINE - len(" ... ")
    return f"{line[: kept // 2]} ... {line[-(kept - kept // 2) :]}"


@contextmanager
def progress_bars(unit: str = "it") -> Iterator[Callable[[str, int, int | None], None]]:
    """One bar per stage, on a terminal only; a stage that is less far than before begins anew.

    Yields:
        A function to call with a stage, how much of it is done, and of how much (None: not known).
    """
    bars: dict[str, tqdm] = {}

    def update(stage: str, done: int, total: int | None) -> None:
        if stage not in bars:
            bars[stage] = tqdm(desc=stage, total=total, unit=unit, disable=None)
        if done < bars[stage].n:
            bars[stage].reset()
        bars[stage].total = total
        bars[stage].update(done - bars[stage].n)

    try:
        yield update
    finally:
        for bar in bars.values():
            bar.close()


def print_line(text: object) -> None:
    """Print a message as one line, above the progress bars where there are any."""
    tqdm.write(one_line(text))


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Leave it to who reads nothing else either: rich would end the process with another exit code."""
        raise BrokenPipeError


def print_table(table: Table) -> None:
    """Print a table, at its full width where there is no terminal to fit."""
    width = None if Console().is_terminal else PLAIN_WIDTH
    _Console(width=width, markup=False, emoji=False, highlight=False).print(table)  # names of classes are just texts
