"""CARVE on a model: the engine, its two passes, its cache, and batches of questions."""

from carve_kernels.hf.engine.engine import CarveEngine

__all__ = ["CarveEngine"]
