"""The command `carve-kernels`, which is `python -m carve_kernels` too."""

import sys

from carve_kernels.extras import needed_by


def main() -> None:
    """Run the command line, or say what it needs to run."""
    try:
        with needed_by("carve-kernels"):
            from carve_kernels.cli import app
    except ImportError as error:
        sys.exit(f"error: {error}")
    app(prog_name="carve-kernels")


if __name__ == "__main__":
    main()
