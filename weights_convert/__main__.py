"""The command ``python -m weights_convert``; signals that ask a process to end do so as Ctrl-C does."""

import signal

from weights_convert.cli import main

for name in ("SIGTERM", "SIGHUP"):
    number = getattr(signal, name, None)  # Windows has no SIGHUP
    if number is not None and signal.getsignal(number) == signal.SIG_DFL:  # nohup has it ignored, and so it stays
        signal.signal(number, signal.default_int_handler)
raise SystemExit(main())
