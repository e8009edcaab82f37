"""The processor of a checkpoint, loaded without its video part if only that part is unavailable.

transformers' names of processors that are private or conventions are spelled here.
"""

from __future__ import annotations

import inspect
import json
import logging
import sys
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoProcessor, ProcessorMixin

from carve_kernels.checks import describe
from carve_kernels.hf import names

TOKEN_TYPES = "mm_token_type_ids"
"""The entry that says which tokens are of text (0), images (1) and videos (2)."""
RETURN_TOKEN_TYPES = {f"return_{TOKEN_TYPES}": True}
"""The argument that asks a processor for the token types."""

# What has a column for each token.
_TEXT = ("input_ids", "attention_mask", "token_type_ids", TOKEN_TYPES, "cross_attention_mask",
         "image_patches_indices", "moe_mm_token_type_ids")  # fmt: skip
# What only the vision tower reads: the prefix of most names, and the names of Fuyu and DeepSeek-VL's hybrid.
_PIXELS = ("pixel", "image_patches", "high_res_pixel")
# Processors that put an image where their token of its beginning is; in 5.12 their `image_token` is the model's.
_AT_BEGINNING = ("Gemma3Processor",)
# Processors that write all that is around an image in a prompt without a chat template.
_WITHOUT_TEMPLATE = ("PaliGemmaProcessor",)
_LOG = logging.getLogger("carve_kernels")
# In the order in which AutoProcessor looks for the class.
_FILES = tuple(f"{part}_config.json" for part in ("processor", "preprocessor", "video_preprocessor", "tokenizer"))


def processor_of(folder: Path, family: str) -> Any:
    """The processor in a checkpoint's folder. Raises ImportError if it needs a missing library beyond videos."""
    try:
        return AutoProcessor.from_pretrained(str(folder), local_files_only=True)
    except ImportError as error:
        complete = getattr(transformers, _class_name(folder, family))
        if not video_parts(complete):
            raise
        processor = without_videos(complete).from_pretrained(str(folder), local_files_only=True)
        _LOG.info("the processor of %s takes images only, its video part needs more: %s", folder, error)
        return processor


def check(processor: Any) -> None:
    """Raise TypeError for what is no processor of texts and of images or videos, such as a tokenizer alone."""
    parts = hasattr(processor, "image_processor") or hasattr(processor, "video_processor")
    if isinstance(processor, type) or not callable(processor) or not parts or not hasattr(processor, "tokenizer"):
        raise TypeError(
            "processor: expected the processor of the model, which has a tokenizer and an image processor, got "
            f"{describe(processor)}"
        )


def adds_image_token(processor: Any) -> bool:
    """Whether a processor puts the token of its one image before the text by itself, as Fuyu's does."""
    return _is_one_of(processor, ("FuyuProcessor",))


def processor_class(family: str) -> str:
    """The name of a model type's processor class."""
    try:
        from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

        name: str = PROCESSOR_MAPPING_NAMES[family]
    except (ImportError, KeyError) as error:
        raise names.changed(f"it has no processor class for {family} ({error})") from error
    return name


def image_token(processor: Any) -> str:
    """What stands for an image in a prompt, before the processor puts the tokens of the image there.

    It may be another one than the model's, as in Gemma 3, or than the processor's own, as in Qianfan-OCR.
    """
    owners = (processor, getattr(processor, "tokenizer", None))
    attributes = ("boi_token",) if _is_one_of(processor, _AT_BEGINNING) else ("image_placeholder_token", "image_token")
    listed = (getattr(owner, name, None) for name in attributes for owner in owners)
    token = next((found for found in listed if found is not None), None)
    if token is None:
        raise ValueError(
            f"processor: expected one with an image_token, which stands for an image in a prompt, got "
            f"{type(processor).__name__}, which has none"
        )
    return str(token)


def _is_one_of(processor: Any, classes: tuple[str, ...]) -> bool:
    """Whether a processor is of a class with one of these names, or of one that extends it."""
    return any(kind.__name__ in classes for kind in type(processor).__mro__)


def takes_settings(processor: Any) -> bool:
    """Whether a call takes settings of the parts of a processor; that of Video-LLaVA's takes none in 5.12."""
    return any(each.kind is each.VAR_KEYWORD for each in inspect.signature(processor.__call__).parameters.values())


def writes_prompts(processor: Any) -> bool:
    """Whether a processor without a chat template writes what separates the images of a prompt from its text."""
    return type(processor).__name__ in _WITHOUT_TEMPLATE


def counts_of_pixels(image_processor: Any) -> int:
    """How often the bounds of an image processor count a pixel: GLM's count it in each frame that an image becomes."""
    # Also the class of one that is wrapped.
    kind = type(image_processor.preprocess.__self__)
    resize = getattr(sys.modules[kind.__module__], "smart_resize", None)
    counts = resize is not None and "num_frames" in inspect.signature(resize).parameters
    return int(image_processor.temporal_patch_size) if counts else 1


def is_text(name: str) -> bool:
    """Whether an entry of a processor's output belongs to the text: it has a column for each token."""
    return name in _TEXT


def is_pixels(name: str) -> bool:
    """Whether only the vision tower reads an entry of a processor's output."""
    return name.startswith(_PIXELS) and not is_text(name)


def lacks_token_types(processor: Any, model: Any) -> bool:
    """Whether a model takes mm_token_type_ids, which its processor returns only if asked to, as Cosmos3 Edge's."""
    is_taken = TOKEN_TYPES in names.signature_of(model).parameters
    return is_taken and all(getattr(processor, name, None) is False for name in RETURN_TOKEN_TYPES)


def routes_by_type(model: Any) -> bool:
    """Whether a model's experts depend on which tokens are of images, as those of Ernie 4.5."""
    return "moe_mm_token_type_ids" in names.signature_of(model).parameters


def is_for_training(name: str) -> bool:
    """Whether an entry of a processor's output is for training alone: the labels of PaliGemma's."""
    return name == "labels"


def is_image_text(model_type: str) -> bool:
    """Whether transformers loads a model type as one that takes images and text."""
    try:
        from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

        return model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    except ImportError as error:
        raise names.changed(f"it does not list its image-text models ({error})") from error


def video_parts(processor_class: Any) -> list[str]:
    """The arguments of a processor class that are its video parts."""
    try:
        return [name for name in processor_class.get_attributes() if "video" in name]
    except AttributeError as error:
        raise names.changed(f"its processors do not list their parts ({error})") from error


def lacks_num2words(processor_class: Any) -> bool:
    """Whether a processor class needs num2words, which is missing, as SmolVLM's does for images and videos."""
    # transformers' stand-in for a class that cannot be imported has no module.
    return getattr(sys.modules.get(processor_class.__module__), "num2words", "") is None


def is_without_videos(processor: Any) -> bool:
    """Whether a processor's class has a video part and this one was loaded without it, for lack of torchvision."""
    if getattr(processor, "video_processor", None) is not None:
        return False
    return isinstance(processor, _ImagesOnly) or bool(video_parts(type(processor)))


def without_videos(complete: Any) -> Any:
    """A processor class without its video part, which refuses videos by name."""

    class WithoutVideos(complete, _ImagesOnly):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            given = inspect.signature(super().__call__).bind_partial(*args, **kwargs).arguments
            if given.get("videos") is not None:
                raise ValueError(
                    "videos: expected None, since this processor was loaded without its video part, which needs "
                    "torchvision; pip install torchvision, and load it again"
                )
            return super().__call__(*args, **kwargs)

    # Saved files contain the name of the class.
    WithoutVideos.__name__, WithoutVideos.__qualname__ = complete.__name__, complete.__qualname__
    return WithoutVideos


class _ImagesOnly(ProcessorMixin):
    """Sits between a processor class and its base and hides the video part."""

    @classmethod
    def get_attributes(cls) -> list[str]:
        return [name for name in super().get_attributes() if "video" not in name]

    @classmethod
    def from_args_and_dict(cls, args: Any, processor_dict: dict[str, Any], **kwargs: Any) -> Any:
        # The class itself takes its parts by position.
        parts = dict(zip(cls.get_attributes(), args, strict=True))
        every = [parts.get(name) for name in super().get_attributes()]
        return super().from_args_and_dict(every, processor_dict, **kwargs)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        given = {**dict(zip(super().get_attributes(), args, strict=False)), **kwargs}
        super().__init__(**{name: value for name, value in given.items() if "video" not in name})


def _class_name(folder: Path, family: str) -> str:
    for file in _FILES:
        path = folder / file
        name = json.loads(path.read_text(encoding="utf-8")).get("processor_class") if path.is_file() else None
        if name is not None:
            return str(name)
    return processor_class(family)
