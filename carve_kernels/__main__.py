"""The command `carve-kernels`, also `python -m carve_kernels`."""

import sys

from carve_kernels.extras import needed_by


def main() -> None:
    """Run the command line, or say which package it lacks."""
    try:
        with needed_by("carve-kernels"):
            from carve_kernels.cli import app
    except KeyboardInterrupt:
        print("error: interrupted; nothing was written", file=sys.stderr)
        sys.exit(130)
    except ImportError as error:
        sys.exit(f"error: {error}")
    app(prog_name="carve-kernels")


if __name__ == "__main__":
    main()
