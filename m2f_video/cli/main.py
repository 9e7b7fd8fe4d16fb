"""The `m2f-video` command: it parses, calls the library and prints.

Exit codes: 0 done; 1 a check failed; 2 bad input, with one line that says what is wrong; 130 interrupted; 141 nobody
reads the output any more.
"""

import io
import os
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Union

import tyro
from tyro.conf import subcommand

from m2f_video.acceleration.cpu_kernels import KernelError
from m2f_video.cli.benchmark import benchmark
from m2f_video.cli.console import one_line
from m2f_video.cli.convert_results import convert_results
from m2f_video.cli.data import DATA_COMMANDS
from m2f_video.cli.demo import demo
from m2f_video.cli.evaluate import eval_results
from m2f_video.cli.export import export
from m2f_video.cli.info import info
from m2f_video.cli.inspect import inspect
from m2f_video.cli.parity import parity
from m2f_video.cli.report import report
from m2f_video.cli.segment import segment
from m2f_video.cli.train import train_command
from m2f_video.files import naming
from m2f_video.inference.on_video import OutOfMemoryError, is_out_of_memory

if TYPE_CHECKING:
    pass

COMMANDS: dict[str, Callable[..., int]] = {
    "segment": segment,
    "demo": demo,
    "parity": parity,
    "benchmark": benchmark,
    "eval": eval_results,
    "report": report,
    "inspect": inspect,
    "convert-results": convert_results,
    "export": export,
    "info": info,
}


def _one_of(commands: Mapping[str, Callable[..., int]]) -> Any:
    """The type by which the parser chooses a command and runs it."""
    choices = (Annotated[Any, subcommand(name=name, constructor=command)] for name, command in commands.items())
    return Union[tuple(choices)]  # noqa: UP007  # made at run time


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and give its exit code."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files need not be text
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("default", UserWarning)
            warnings.showwarning = _show_warning
            data = subcommand(
                name="data", constructor=_one_of(DATA_COMMANDS), description="Make, check and split datasets."
            )
            commands = COMMANDS | {"train": train_command(sys.argv[1:] if argv is None else argv)}
            command: Any = Union[_one_of(commands), Annotated[Any, data]]  # noqa: UP007
            code: int = tyro.cli(
                command,
                prog="m2f-video",
                description="Video Mask2Former: published weights in, segmented and tracked video out.",
                args=argv,
            )
            with naming("standard output"):
                sys.stdout.flush()
            return code
    except KeyboardInterrupt as interrupt:
        print(one_line(f"m2f-video: interrupted{_notes(interrupt)}"), file=sys.stderr)
        return 130
    except BrokenPipeError:  # whoever read the output, as `head` does, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is flushed at the end
        return 141
    except (ValueError, OSError, ImportError, KernelError) as error:
        message = f"{str(error).strip() or type(error).__name__}{_notes(error)}"
    except OutOfMemoryError as error:
        message = f"{error}{_notes(error)}"
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        message = "out of memory; choose fewer frames, smaller ones (--shortest-edge), a smaller batch, or bfloat16"
        message += _notes(error)
    print(one_line(f"m2f-video: error: {message}"), file=sys.stderr)
    return 2


def _notes(error: BaseException) -> str:
    """What was added to an error on its way, such as what it leaves."""
    return "".join(f"; {note}" for note in getattr(error, "__notes__", ()))


def _show_warning(message: Warning | str, category: type[Warning], *_: object, **__: object) -> None:
    print(one_line(f"m2f-video: warning: {message}"), file=sys.stderr)
