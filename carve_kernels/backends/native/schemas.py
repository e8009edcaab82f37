"""The schemas of the compiled operators, with their fakes. C++ registers implementations only.

Every operator writes into `out` and returns nothing: one that returned its mutated argument would fail `opcheck`.
"""

from __future__ import annotations

import torch


def _define(name: str, schema: str) -> None:
    operator = f"carve_kernels::{name}"
    torch.library.define(operator, schema, tags=torch.Tag.pt2_compliant_tag)
    torch.library.register_fake(operator, lambda *_arguments: None)


_define(
    "contrast_cpu",
    "(Tensor task, Tensor general, Tensor layer_weights, Tensor step_weights, int[] shapes, float lam, "
    "bool lam_is_mean, int normalize, Tensor(a!) out) -> ()",
)
_define(
    "regions_cpu",
    "(Tensor saliency, float keep, int top, int floor, int connectivity, int score, Tensor(a!) mask, Tensor(b!) boxes, "
    "Tensor(c!) scores, Tensor(d!) outcome) -> ()",
)
_define(
    "regions_cuda",
    "(Tensor saliency, float keep, int top, int floor, int connectivity, int score, int most_blocks, int stream, "
    "Tensor(a!) scratch, Tensor(b!) mask, Tensor(c!) boxes, Tensor(d!) scores, Tensor(e!) outcome) -> ()",
)
_define(
    "capture_layers",
    "(Tensor[] query, Tensor[] key, Tensor tokens, Tensor? mask, Tensor? positions, Tensor[] sink, float scale, "
    "float softcap, int window, Tensor step, int first, str backend, Tensor(a!) maps, Tensor(b!) mass, "
    "Tensor(c!) entropy) -> ()",
)
# One or several layers of one shape. With a step the outputs have [steps, layers] in front, as those of capture_layers.
_define(
    "capture_cpu",
    "(Tensor[] query, Tensor[] key, Tensor tokens, Tensor? mask, Tensor? positions, Tensor[] sink, Tensor? lse, "
    "float scale, float softcap, int window, bool each, Tensor? step, int first, Tensor(a!) maps, Tensor(b!) mass, "
    "Tensor(c!) entropy) -> ()",
)
# As capture_cpu, with scratch that the kernels pass results through, and the stream as CUDA's own handle.
_define(
    "capture_cuda",
    "(Tensor[] query, Tensor[] key, Tensor tokens, Tensor? mask, Tensor? positions, Tensor[] sink, Tensor? lse, "
    "float scale, float softcap, int window, bool each, Tensor? step, int first, int stream, Tensor(a!) scratch, "
    "Tensor(b!) maps, Tensor(c!) mass, Tensor(d!) entropy) -> ()",
)
# Writes the instructions in use and the best of this machine; wanted sets them first (-2: no change, -1: the default).
_define("isa_cpu", "(int wanted, Tensor(a!) out) -> ()")
# Writes the architectures that the compiled kernels are for, such as 90 for sm_90a; 0 in the slots that are left.
_define("cuda_build", "(Tensor(a!) out) -> ()")
# Writes the version of the compiled CUDA runtime and the newest that the driver serves, such as 13000; 0 without.
_define("cuda_versions", "(Tensor(a!) out) -> ()")
