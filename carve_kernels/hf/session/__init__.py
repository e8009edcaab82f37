"""Sessions: forwards and `generate` of a model that also capture the attention of selected rows."""

from carve_kernels.hf.session.session import CaptureSession, capture_attention

__all__ = ["CaptureSession", "capture_attention"]
