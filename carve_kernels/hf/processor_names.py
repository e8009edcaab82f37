"""Every name of transformers' processors that is a convention or private: their classes, and their parts."""

from __future__ import annotations

from typing import Any

from transformers import ProcessorMixin

from carve_kernels.hf import names


def processor_class(family: str) -> str:
    """The name of the processor class of a model type. Known in: 5.12 to 5.24."""
    try:
        from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

        found: str = PROCESSOR_MAPPING_NAMES[family]
    except (ImportError, KeyError) as error:
        raise names.changed(f"it names no class of processors for {family} ({error})") from error
    return found


def video_parts(processor_class: Any) -> list[str]:
    """The arguments of a class of processors that stand for its part for videos. Known in: 5.12 to 5.24."""
    try:
        return [name for name in processor_class.get_attributes() if "video" in name]
    except AttributeError as error:
        raise names.changed(f"its processors do not name their parts ({error})") from error


class ImagesAlone(ProcessorMixin):
    """Stands between a class of processors and its base, which learns of no part for videos. Known in: 5.12 to 5.24."""

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
