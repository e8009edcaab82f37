"""`python -m carve_kernels` is `carve-kernels`."""

from carve_kernels.cli import app

app(prog_name="carve-kernels")
