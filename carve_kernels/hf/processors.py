"""A checkpoint's processor, without its part for videos where only that part cannot be had."""

from __future__ import annotations

import inspect
import json
import logging
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoProcessor

from carve_kernels.hf import processor_names

_LOG = logging.getLogger("carve_kernels")
# In the order in which AutoProcessor asks them for a class.
_FILES = tuple(f"{part}_config.json" for part in ("processor", "preprocessor", "video_preprocessor", "tokenizer"))


def processor_of(folder: Path, family: str) -> Any:
    """The processor in a checkpoint's folder.

    Raises ImportError if it needs a library that is missing for more than videos.
    """
    try:
        return AutoProcessor.from_pretrained(str(folder), local_files_only=True)
    except ImportError as error:
        complete = getattr(transformers, _class_name(folder, family))
        if not processor_names.video_parts(complete):
            raise
        processor = without_videos(complete).from_pretrained(str(folder), local_files_only=True)
        _LOG.info("the processor of %s serves images alone, its part for videos needs more: %s", folder, error)
        return processor


def without_videos(complete: Any) -> Any:
    """The same class of processors without its part for videos, which refuses a video by name."""

    class WithoutVideos(complete, processor_names.ImagesAlone):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            given = inspect.signature(super().__call__).bind_partial(*args, **kwargs).arguments
            if given.get("videos") is not None:
                raise ValueError(
                    "videos: expected none, since this processor was loaded without its part for videos, which needs "
                    "torchvision; pip install torchvision, and load it again"
                )
            return super().__call__(*args, **kwargs)

    # What is saved names the class.
    WithoutVideos.__name__, WithoutVideos.__qualname__ = complete.__name__, complete.__qualname__
    return WithoutVideos


def _class_name(folder: Path, family: str) -> str:
    for file in _FILES:
        path = folder / file
        named = json.loads(path.read_text(encoding="utf-8")).get("processor_class") if path.is_file() else None
        if named is not None:
            return str(named)
    return processor_names.processor_class(family)
