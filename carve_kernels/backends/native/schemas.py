"""The schemas of the compiled operators, with their fakes. C++ registers implementations only.

Every operator writes into `out` and returns nothing: one that returned its mutated argument would fail `opcheck`.
"""

from __future__ import annotations

import torch

torch.library.define(
    "carve_kernels::contrast_cpu",
    "(Tensor task, Tensor general, Tensor layer_weights, Tensor step_weights, int[] shapes, float lam, "
    "bool lam_is_mean, int normalize, Tensor(a!) out) -> ()",
    tags=torch.Tag.pt2_compliant_tag,
)


@torch.library.register_fake("carve_kernels::contrast_cpu")
def _contrast_cpu(
    task: torch.Tensor,
    general: torch.Tensor,
    layer_weights: torch.Tensor,
    step_weights: torch.Tensor,
    shapes: list[int],
    lam: float,
    lam_is_mean: bool,
    normalize: int,
    out: torch.Tensor,
) -> None:
    return None


torch.library.define(
    "carve_kernels::regions_cpu",
    "(Tensor saliency, float keep, int top, int floor, int connectivity, int score, Tensor(a!) mask, Tensor(b!) boxes, "
    "Tensor(c!) scores, Tensor(d!) outcome) -> ()",
    tags=torch.Tag.pt2_compliant_tag,
)


@torch.library.register_fake("carve_kernels::regions_cpu")
def _regions_cpu(*_arguments: object) -> None:
    return None


torch.library.define(
    "carve_kernels::regions_cuda",
    "(Tensor saliency, float keep, int top, int floor, int connectivity, int score, int most_blocks, int stream, "
    "Tensor(a!) scratch, Tensor(b!) mask, Tensor(c!) boxes, Tensor(d!) scores, Tensor(e!) outcome) -> ()",
    tags=torch.Tag.pt2_compliant_tag,
)


@torch.library.register_fake("carve_kernels::regions_cuda")
def _regions_cuda(*_arguments: object) -> None:
    return None


torch.library.define(
    "carve_kernels::capture_layers",
    "(Tensor[] query, Tensor[] key, Tensor tokens, Tensor? mask, Tensor? positions, Tensor[] sink, float scale, "
    "float softcap, int window, Tensor step, int first, str backend, Tensor(a!) maps, Tensor(b!) mass, "
    "Tensor(c!) entropy) -> ()",
    tags=torch.Tag.pt2_compliant_tag,
)


@torch.library.register_fake("carve_kernels::capture_layers")
def _capture_layers(*_arguments: object) -> None:
    return None


# One or several layers of one shape. With a step the outputs have [steps, layers] in front, as those of capture_layers.
torch.library.define(
    "carve_kernels::capture_cpu",
    "(Tensor[] query, Tensor[] key, Tensor tokens, Tensor? mask, Tensor? positions, Tensor[] sink, Tensor? lse, "
    "float scale, float softcap, int window, bool each, Tensor? step, int first, Tensor(a!) maps, Tensor(b!) mass, "
    "Tensor(c!) entropy) -> ()",
    tags=torch.Tag.pt2_compliant_tag,
)


@torch.library.register_fake("carve_kernels::capture_cpu")
def _capture_cpu(*_arguments: object) -> None:
    return None


# Writes the instructions in use and the best there are; changes them first unless wanted is -2 (-1: as at the start).
torch.library.define("carve_kernels::isa_cpu", "(int wanted, Tensor(a!) out) -> ()", tags=torch.Tag.pt2_compliant_tag)


@torch.library.register_fake("carve_kernels::isa_cpu")
def _isa_cpu(wanted: int, out: torch.Tensor) -> None:
    return None


# As capture_cpu, with room for what the kernels hand over to each other and the stream as CUDA's own handle.
torch.library.define(
    "carve_kernels::capture_cuda",
    "(Tensor[] query, Tensor[] key, Tensor tokens, Tensor? mask, Tensor? positions, Tensor[] sink, Tensor? lse, "
    "float scale, float softcap, int window, bool each, Tensor? step, int first, int stream, Tensor(a!) scratch, "
    "Tensor(b!) maps, Tensor(c!) mass, Tensor(d!) entropy) -> ()",
    tags=torch.Tag.pt2_compliant_tag,
)


@torch.library.register_fake("carve_kernels::capture_cuda")
def _capture_cuda(*_arguments: object) -> None:
    return None


# Writes the architectures that the kernels inside are compiled for, such as 90 for sm_90a; 0 where there are fewer.
torch.library.define("carve_kernels::cuda_build", "(Tensor(a!) out) -> ()", tags=torch.Tag.pt2_compliant_tag)


@torch.library.register_fake("carve_kernels::cuda_build")
def _cuda_build(*_arguments: object) -> None:
    return None


# Writes the version of CUDA's runtime inside and the newest one that the driver serves, such as 13000; 0 without.
torch.library.define("carve_kernels::cuda_versions", "(Tensor(a!) out) -> ()", tags=torch.Tag.pt2_compliant_tag)


@torch.library.register_fake("carve_kernels::cuda_versions")
def _cuda_versions(*_arguments: object) -> None:
    return None
