"""Profiles: which layers and rows of a model react to the question."""

from carve_kernels.hf.profile.profile import BadProbes, Probe, Profile, is_saved, profile

__all__ = ["BadProbes", "Probe", "Profile", "is_saved", "profile"]
