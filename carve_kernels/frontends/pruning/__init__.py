"""Methods that drop visual tokens by their attention; docs/frontends.md lists what is equal and what is refused."""

from carve_kernels.frontends.pruning.fastv import FastV

__all__ = ["FastV"]
