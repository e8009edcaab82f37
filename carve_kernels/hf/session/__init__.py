"""Sessions: forwards and `generate` of a model that also give back the attention of chosen rows."""

from carve_kernels.hf.session.session import CaptureSession, capture_attention

__all__ = ["CaptureSession", "capture_attention"]
