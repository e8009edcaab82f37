"""What a result depends on, as short texts: the picture, the model as it stands in memory, a checkpoint on disk."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from PIL import Image

from carve_kernels.hf.backbone import unwrap

SAMPLES = 4096
"""Elements of each tensor that the identity of a model reads; of a smaller tensor it reads all."""

_BLOCK = 4096
_TEXTS = (".json", ".jinja", ".txt", ".model")
_WEIGHTS = (".safetensors", ".bin")
_GOLDEN = 0.6180339887498949

_LOCK = threading.Lock()
_MODELS: WeakKeyDictionary[Any, tuple[Any, str]] = WeakKeyDictionary()
_TOKENIZERS: WeakKeyDictionary[Any, tuple[int, str]] = WeakKeyDictionary()


def key_of(**facts: Any) -> str:
    """Facts that JSON can hold, as 64 hexadecimal digits; a list and a tuple of the same things are the same fact."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


def digest(image: Image.Image) -> str:
    """The pixels of a picture, wherever it came from."""
    return hashlib.sha256(f"{image.mode} {image.size} ".encode() + image.tobytes()).hexdigest()


def fingerprint(model: Any, processor: Any) -> str:
    """All that maps of this model depend on but the picture and the prompt.

    That is: the classes, configurations and attention implementations, where and in which dtype the model runs, the
    generation config (it decides how long an answer gets), adapters and whether they are on, the processor with its
    tokenizer, and the weights: name, shape, dtype and up to SAMPLES elements of each tensor, spread evenly. The path
    is no part of it: a checkpoint that was moved stays the same one.

    The weights are read again when a version counter or an address of theirs has changed. What cannot be seen: a
    change through `tensor.data`, or of elements that are not among the sampled ones, and code put on the model by hand.
    """
    model = unwrap(model)
    return key_of(
        model=type(model).__qualname__,
        config=_plain(model.config),
        generation=_plain(model.generation_config),
        attention=[str(getattr(module, "_attn_implementation", None)) for module in _configs(model.config)],
        device=model.device.type,
        training=model.training,
        weights=_weights(model),
        processor=processor.to_dict(),
        tokenizer=_tokenizer(processor.tokenizer),
    )


def fingerprint_of_directory(folder: str | os.PathLike[str]) -> str:
    """A checkpoint directory without loading it: its text files whole, its weights by size and evenly spread blocks.

    The directory's own carve.json is no part of it, since a caller may use another profile.
    """
    facts = {}
    for path in sorted(Path(folder).iterdir()):
        if path.suffix in _TEXTS and path.name != "carve.json" and path.is_file():
            facts[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
        elif path.suffix in _WEIGHTS:
            facts[path.name] = _blocks(path)
    return key_of(files=facts)


def _blocks(path: Path) -> str:
    """The size of a file, its first block, which names the tensors, and 255 blocks over all of it."""
    size = path.stat().st_size
    found = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        for index in range(256):
            file.seek(index * size // 256)
            found.update(file.read(_BLOCK))
    return found.hexdigest()


def _plain(config: Any) -> dict[str, Any]:
    """A configuration without the names of the directory and of the library that it came from."""
    return _without(config.to_dict(), ("_name_or_path", "transformers_version"))


def _without(values: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {
        key: _without(value, names) if isinstance(value, Mapping) else value
        for key, value in values.items()
        if key not in names
    }


def _configs(config: Any) -> list[Any]:
    inner = [getattr(config, name, None) for name in getattr(config, "sub_configs", {})]
    return [config, *(each for each in inner if each is not None)]


def _weights(model: torch.nn.Module) -> str:
    tensors = {
        name: value for name, value in model.state_dict(keep_vars=True).items() if isinstance(value, torch.Tensor)
    }
    adapters = [
        (name, str(module.__dict__.get("_active_adapter")), bool(module.__dict__.get("_disable_adapters")))
        for name, module in model.named_modules()
        if "_active_adapter" in module.__dict__
    ]
    versions = [
        (value.data_ptr(), 0 if value.is_inference() else value._version, value.dtype) for value in tensors.values()
    ]
    state = (versions, list(tensors), adapters)
    with _LOCK:
        known = _MODELS.get(model)
        if known is not None and known[0] == state:
            return known[1]
    found = key_of(adapters=adapters, tensors=_sampled(tensors))
    with _LOCK:
        _MODELS[model] = (state, found)
    return found


@torch.no_grad()
def _sampled(tensors: Mapping[str, torch.Tensor]) -> str:
    found = hashlib.sha256()
    picked: dict[tuple[torch.device, torch.dtype], list[torch.Tensor]] = {}
    for name, value in tensors.items():
        found.update(f"{name} {list(value.shape)} {value.dtype} ".encode())
        # Weights that are offloaded have no elements here.
        if value.device.type != "meta":
            flat = value.detach().reshape(-1)
            picked.setdefault((value.device, value.dtype), []).append(flat[_places(flat.numel()).to(value.device)])
    for values in picked.values():
        # One transfer for each kind, not one for each tensor: on a GPU the waiting would be all of the time.
        found.update(torch.cat(values).cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def _places(count: int) -> torch.Tensor:
    """Places spread over `count` elements; equal steps would read the same few columns of a matrix."""
    if count <= SAMPLES:
        return torch.arange(count)
    return (torch.arange(SAMPLES, dtype=torch.float64) * _GOLDEN % 1.0 * count).long()


def _tokenizer(tokenizer: Any) -> str:
    length = len(tokenizer)
    with _LOCK:
        known = _TOKENIZERS.get(tokenizer)
        if known is not None and known[0] == length:
            return known[1]
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = json.dumps(tokenizer.get_vocab(), sort_keys=True) if backend is None else backend.to_str()
    found = hashlib.sha256(f"{type(tokenizer).__qualname__} {content}".encode()).hexdigest()
    with _LOCK:
        _TOKENIZERS[tokenizer] = (length, found)
    return found
