"""The names of the code that CARVE's authors released, on this package: its program runs with its imports redirected.

`carve` becomes `carve_kernels.frontends.release`, with the same modules in it; docs/frontends.md lists what is equal
and the few cases in which this refuses or corrects what the release computes.
"""

from carve_kernels.frontends.release.attention import (
    DEFAULT_LAYERS,
    GENERAL_INSTRUCTION,
    dynamic_reshape_attention,
    fuse_contrastive_attention,
    generate_with_attention,
)
from carve_kernels.frontends.release.masking import (
    apply_mask_to_image,
    att_sum_crop_pipeline,
    create_attention_mask,
    get_crop_bbox_from_mask,
    resize_crop_to_match_original,
)
from carve_kernels.frontends.release.pipeline import VERSIONS, CarveOutput, carve, load_model
from carve_kernels.frontends.release.visualize import plot_layerwise, plot_pipeline

__all__ = [
    "DEFAULT_LAYERS",
    "GENERAL_INSTRUCTION",
    "VERSIONS",
    "CarveOutput",
    "apply_mask_to_image",
    "att_sum_crop_pipeline",
    "carve",
    "create_attention_mask",
    "dynamic_reshape_attention",
    "fuse_contrastive_attention",
    "generate_with_attention",
    "get_crop_bbox_from_mask",
    "load_model",
    "plot_layerwise",
    "plot_pipeline",
    "resize_crop_to_match_original",
]
