"""What a result depends on, as short texts: the image, and the model in memory."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary, ref

import torch
from PIL import Image

from carve_kernels.hf import foreign, names
from carve_kernels.hf.model import input_device, unwrap
from carve_kernels.hf.tensors import Unidentified, plain

SAMPLES = 4096
"""Elements of each tensor that the identity of a model reads one by one; of a smaller tensor it reads all."""

_SUMMED = 64
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.int64}
_GOLDEN = 0.6180339887498949

_LOCK = threading.Lock()
_MODELS: WeakKeyDictionary[Any, _Known] = WeakKeyDictionary()
_TOKENIZERS: WeakKeyDictionary[Any, tuple[int, str]] = WeakKeyDictionary()


def key_of(**facts: Any) -> str:
    """Facts that JSON can hold, as 64 hexadecimal digits; a list and a tuple of the same things are the same fact."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


def same_pixels(first: Image.Image, second: Image.Image) -> bool:
    """Whether two pictures are one."""
    return first.size == second.size and first.mode == second.mode and first.tobytes() == second.tobytes()


def digest(image: Image.Image) -> str:
    """The pixels of a picture, wherever it came from."""
    return hashlib.sha256(f"{image.mode} {image.size} ".encode() + image.tobytes()).hexdigest()


# Another number where maps of the same model are found in another way: a memory from before holds none of these.
_RULES = 2


def fingerprint(model: Any, processor: Any) -> str:
    """All that maps of this model depend on but the picture and the prompt.

    That is: the classes, configurations and attention implementations, where and in which dtype the model runs, under
    autocast or not, the generation config (it decides how long an answer gets), adapters, their scales and whether they
    are on, the processor with its tokenizer, and the weights and buffers: name, shape and dtype of each tensor, a
    checksum over all of it, and up to SAMPLES of its elements. The path is no part of it: a checkpoint that was moved
    stays the same one.

    The weights are read again when one is another tensor, or has another address or version counter. What cannot be
    seen: a change through `tensor.data`, which no counter counts, and numbers that modules hold outside their weights.

    Raises Unidentified for a model with hooks or forwards of somebody's own, and where weights cannot be read: parked
    elsewhere, in other processes, or of a kind that gives no numbers.
    """
    model = unwrap(model)
    code = foreign.code_on(model)
    if code is not None:
        raise Unidentified(code)
    device = input_device(model).type
    return key_of(
        rules=_RULES,
        model=type(model).__qualname__,
        config=_plain(model.config),
        generation=_plain(model.generation_config),
        attention=names.implementations(model.config),
        modules=[
            f"{name} {type(module).__module__}.{type(module).__qualname__}" for name, module in model.named_modules()
        ],
        device=device,
        autocast=_autocast(device),
        training=model.training,
        weights=_weights(model),
        processor=processor.to_dict(),
        tokenizer=_tokenizer(processor.tokenizer),
    )


def _plain(config: Any) -> dict[str, Any]:
    """A configuration without the names of the directory and of the library that it came from."""
    return _without(config.to_dict(), ("_name_or_path", "transformers_version"))


def _without(values: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {
        key: _without(value, names) if isinstance(value, Mapping) else value
        for key, value in values.items()
        if key not in names
    }


def _autocast(device: str) -> str | None:
    used = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return str(torch.get_autocast_dtype(device)) if used else None


def _weights(model: torch.nn.Module) -> str:
    # A rotation's frequencies are in no state_dict, and what quantised layers put there is made for it each time.
    weights = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
    tensors = _parts(weights.items())
    made = _parts((name, value) for name, value in model.state_dict(keep_vars=True).items() if name not in weights)
    adapters = names.adapter_states(model)
    versions = [
        (value.data_ptr(), 0 if value.is_inference() else value._version, value.dtype) for value in tensors.values()
    ]
    state = (versions, list(tensors), adapters, _read(made))
    with _LOCK:
        known = _MODELS.get(model)
    # A new tensor may have the address of one that is gone.
    if known is not None and known.state == state and known.are(tensors.values()):
        return known.found
    found = key_of(adapters=adapters, tensors=_read(tensors), made=state[-1])
    with _LOCK:
        _MODELS[model] = _Known(state, [ref(value) for value in tensors.values()], found)
    return found


def _parts(entries: Iterable[tuple[str, Any]]) -> dict[str, torch.Tensor]:
    return {part: tensor for name, value in entries for part, tensor in plain(name, value)}


class _Known(NamedTuple):
    """The weights of a model when they were read, and what was found."""

    state: Any
    tensors: list[ref[torch.Tensor]]
    found: str

    def are(self, tensors: Iterable[torch.Tensor]) -> bool:
        return all(known() is value for known, value in zip(self.tensors, tensors, strict=True))


@torch.no_grad()
def _read(tensors: Mapping[str, torch.Tensor]) -> str:
    found = hashlib.sha256()
    picked: dict[tuple[torch.device, torch.dtype], list[torch.Tensor]] = {}
    for name, value in tensors.items():
        found.update(f"{name} {list(value.shape)} {value.dtype} ".encode())
        try:
            flat = value.detach().as_subclass(torch.Tensor).reshape(-1).contiguous()
            # There are types without an index of their own.
            whole = flat.view(_INTEGERS[flat.element_size()])
        except (RuntimeError, TypeError, KeyError) as error:
            raise Unidentified(f"{name} is {value.dtype}, which cannot be read ({error})") from error
        picked.setdefault((value.device, whole.dtype), []).append(whole[_places(whole.numel()).to(value.device)])
        if whole.numel() > SAMPLES:
            picked.setdefault((value.device, torch.int64), []).append(_checksum(flat))
    for values in picked.values():
        # One transfer for each kind, not one for each tensor: on a GPU the waiting would be all of the time.
        found.update(torch.cat(values).cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def _checksum(flat: torch.Tensor) -> torch.Tensor:
    """One integer over all bytes, which changes with each of them and with their order from block to block: int64 [1].

    Sums of blocks, each times an odd number of its own; they wrap around.
    """
    size = flat.element_size()
    fits = all(count * size % 8 == 0 for count in (flat.numel(), flat.storage_offset()))
    integers = flat.view(torch.int64 if fits else _INTEGERS[size])
    whole = integers.numel() // _SUMMED * _SUMMED
    sums = integers[:whole].view(-1, _SUMMED).sum(1, dtype=torch.int64)
    odd = 2 * torch.arange(sums.numel(), device=flat.device) + 1
    return ((sums * odd).sum() + integers[whole:].sum(dtype=torch.int64)).reshape(1)


def _places(count: int) -> torch.Tensor:
    """Places spread over `count` elements; equal steps would read the same few columns of a matrix."""
    if count <= SAMPLES:
        return torch.arange(count)
    return (torch.arange(SAMPLES, dtype=torch.float64, device="cpu") * _GOLDEN % 1.0 * count).long()


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
