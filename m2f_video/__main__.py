"""Start of the `m2f-video` command: light, so that an interrupt while PyTorch loads ends cleanly too."""

import os
import signal
import sys
from types import FrameType


def main() -> int:
    """Run the command line and give its exit code; SIGTERM and SIGHUP end it as Ctrl-C does."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed by who started the process: no other file must get its number
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115
    try:
        for name in ("SIGTERM", "SIGHUP"):
            kind = getattr(signal, name, None)  # Windows has no SIGHUP
            if kind is not None and signal.getsignal(kind) is signal.SIG_DFL:  # nohup has it ignored, and so it stays
                signal.signal(kind, _interrupt)
        from m2f_video.cli import main as cli

        return cli.main()
    except KeyboardInterrupt:
        print("m2f-video: interrupted", file=sys.stderr)
        return 130


def _interrupt(number: int, frame: FrameType | None) -> None:
    signal.signal(number, signal.SIG_IGN)  # a second one must not break off the cleaning up after the first
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
