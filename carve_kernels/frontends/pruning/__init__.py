"""Methods that drop visual tokens or keys by their attention; docs/frontends.md lists what is equal and refused."""

from carve_kernels.frontends.pruning.fastv import FastV

__all__ = ["FastV"]
