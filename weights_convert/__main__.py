"""The command ``python -m weights_convert``."""

from weights_convert.cli import main

raise SystemExit(main())
