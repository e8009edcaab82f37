"""The schemas of the compiled operators, with their fakes. C++ registers implementations only.

Every operator writes into `out` and returns nothing: one that returned its mutated argument would fail `opcheck`.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

NAMESPACE = "carve_kernels"

# One or several layers of one shape. With a step the outputs have [steps, layers] in front. `span` holds the lowest and
# the highest token that is a key. Kernels pass results through `scratch`, which may hold anything, and count in
# `tickets`, which are 0 before and after every call; a CPU uses neither.
_CAPTURE = (
    "Tensor[] query, Tensor[] key, Tensor tokens, Tensor? span, Tensor? mask, Tensor? positions, Tensor[] sink, "
    "Tensor? lse, float scale, float softcap, int window, bool each, Tensor? step, int first, Tensor(a!) scratch, "
    "Tensor(b!) tickets, Tensor(c!) maps, Tensor(d!) mass, Tensor(e!) entropy"
)

# One layer's attention, into `output`, and the capture of its row.
_ATTEND = (
    "Tensor query, Tensor key, Tensor value, Tensor tokens, Tensor? span, Tensor? mask, Tensor? positions, "
    "Tensor? sink, float scale, float softcap, int window, bool each, Tensor? step, int first, Tensor(a!) scratch, "
    "Tensor(b!) tickets, Tensor(c!) output, Tensor(d!) maps, Tensor(e!) mass, Tensor(f!) entropy"
)

# A capture into one step of maps for one row of queries, their contrast with general maps and, unless top and floor are
# 0, the regions of the saliency, which is then [H, W]. All stages share the scratch.
_SALIENCY = (
    f"{_CAPTURE}, Tensor general, Tensor layer_weights, Tensor step_weights, int[] shapes, float lam, "
    "bool lam_is_mean, int normalize, float keep, int top, int floor, int connectivity, int score, int min_size, "
    "int most_blocks, Tensor(f!) saliency, Tensor(g!) selected, Tensor(h!) boxes, Tensor(i!) scores, Tensor(j!) outcome"
)

SCHEMAS: dict[str, str] = {
    "contrast_cpu": "(Tensor task, Tensor general, Tensor layer_weights, Tensor step_weights, int[] shapes, float lam, "
    "bool lam_is_mean, int normalize, Tensor(a!) out) -> ()",
    # Task and general have stride 1 along the tokens; the weights are float64, on their device. The scratch takes
    # `contrast_scratch` bytes (backends/cuda/plan.py).
    "contrast_cuda": "(Tensor task, Tensor general, Tensor layer_weights, Tensor step_weights, int[] shapes, "
    "float lam, bool lam_is_mean, int normalize, Tensor(a!) scratch, Tensor(b!) out) -> ()",
    "regions_cpu": "(Tensor saliency, float keep, int top, int floor, int connectivity, int score, int min_size, "
    "Tensor(a!) mask, Tensor(b!) boxes, Tensor(c!) scores, Tensor(d!) outcome) -> ()",
    "regions_cuda": "(Tensor saliency, float keep, int top, int floor, int connectivity, int score, int min_size, "
    "int most_blocks, Tensor(a!) scratch, Tensor(b!) mask, Tensor(c!) boxes, Tensor(d!) scores, Tensor(e!) outcome) "
    "-> ()",
    "capture_layers": f"({_CAPTURE}) -> ()",
    # The attention that each key gets from all rows, float32 [B, A, S].
    "column_sums_cpu": "(Tensor query, Tensor key, Tensor? mask, Tensor? positions, Tensor? sink, Tensor? lse, "
    "float scale, float softcap, int window, Tensor(a!) out) -> ()",
    "attend_layer": f"({_ATTEND}) -> ()",
    # From the gradients of a loss with respect to the parts of one layer's capture, dense float32 where there are any:
    # those with respect to the query, the key and the sink, written in dense float32.
    "capture_backward": "(Tensor query, Tensor key, Tensor tokens, Tensor? mask, Tensor? positions, Tensor? sink, "
    "Tensor? lse, float scale, float softcap, int window, bool each, Tensor? maps, Tensor? mass, Tensor? entropy, "
    "Tensor(a!) to_query, Tensor(b!)? to_key, Tensor(c!)? to_sink) -> ()",
    # By the named backend or "auto", on every device.
    "capture_layers_in": f"({_CAPTURE}, str backend) -> ()",
    "attend_layer_in": f"({_ATTEND}, str backend) -> ()",
    "saliency": f"({_SALIENCY}) -> ()",
    # By the named backend or "auto", on every device.
    "saliency_in": f"({_SALIENCY}, str backend) -> ()",
    # Writes how a call of capture_layers on a GPU is divided into launches: bytes of scratch, number of tickets; 0 or
    # 1: whether tensor cores are not used, whether keys are read again; layers and rows at a time, blocks of the
    # queries of a key head, keys of a split, splits, groups of 128 tokens of a block, blocks of tokens. The sizes are
    # layers, batch, heads, key heads, rows, keys, head size, tokens, bytes of an element; then 0 or 1: whether the
    # log-sum-exp is given, whether keys are aligned to 16 bytes.
    "capture_plan_cuda": "(int[] sizes, Tensor(a!) out) -> ()",
    # The same for attend_layer: bytes of scratch, number of tickets, keys of a split, splits, groups of 128 tokens of a
    # block, blocks of tokens. The sizes are batch, heads, key heads, keys, head size, elements of a value, tokens.
    "attention_plan_cuda": "(int[] sizes, Tensor(a!) out) -> ()",
    # Writes the instructions in use and the best of this machine; wanted sets them first (-2: no change, -1: default).
    "isa_cpu": "(int wanted, Tensor(a!) out) -> ()",
    # Writes the architectures that the compiled kernels are for, such as 90 for sm_90a; 0 in the slots that are left.
    "cuda_build": "(Tensor(a!) out) -> ()",
    # Writes the version of the compiled CUDA runtime and the newest that the driver serves, such as 13000; 0 without.
    "cuda_versions": "(Tensor(a!) out) -> ()",
}


def define(namespace: str, names: Iterable[str]) -> None:
    """Define operators by name, each with a fake that does nothing: the outputs exist already."""
    for name in names:
        operator = f"{namespace}::{name}"
        torch.library.define(operator, SCHEMAS[name], tags=torch.Tag.pt2_compliant_tag)
        torch.library.register_fake(operator, lambda *_arguments, **_keywords: None)


define(NAMESPACE, SCHEMAS)
