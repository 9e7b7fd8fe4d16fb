"""Start of the `m2f-video` command: light, so that an interrupt while PyTorch loads ends cleanly too."""

import sys


def main() -> int:
    """Run the command line and give its exit code."""
    try:
        from m2f_video import cli

        return cli.main()
    except KeyboardInterrupt:
        print("m2f-video: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
