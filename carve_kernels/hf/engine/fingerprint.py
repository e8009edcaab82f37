"""What a result depends on, as hashes: the image, and the model in memory."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary, ref

import torch
from PIL import Image

from carve_kernels.hf import names
from carve_kernels.hf.model import foreign_code, input_device, is_sharded, unwrap

SAMPLES = 4096
"""Elements of each tensor that the fingerprint of a model reads one by one; of a smaller tensor it reads all."""

_SUMMED = 64
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.int64}
_GOLDEN = 0.6180339887498949

_LOCK = threading.Lock()
_MODELS: WeakKeyDictionary[Any, _Known] = WeakKeyDictionary()
_TOKENIZERS: WeakKeyDictionary[Any, tuple[int, str]] = WeakKeyDictionary()


_FACTS = (str, int, float, bool, bytes, type(None), torch.dtype, torch.device, torch.Size, torch.layout)
_SCALES = {
    torch.per_tensor_affine: ("q_scale", "q_zero_point"),
    torch.per_channel_affine: ("q_per_channel_scales", "q_per_channel_zero_points", "q_per_channel_axis"),
    torch.per_channel_affine_float_qparams: ("q_per_channel_scales", "q_per_channel_zero_points", "q_per_channel_axis"),
}


class Unidentified(Exception):
    """A model without a fingerprint: weights that cannot be read, or foreign code; the reason."""


def key_of(**facts: Any) -> str:
    """SHA-256 of facts that JSON can hold, as 64 hexadecimal digits; lists and tuples are alike."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


def same_pixels(first: Image.Image, second: Image.Image) -> bool:
    """Whether two images are equal."""
    return first.size == second.size and first.mode == second.mode and first.tobytes() == second.tobytes()


def digest(image: Image.Image) -> str:
    """SHA-256 of the pixels of an image."""
    return hashlib.sha256(f"{image.mode} {image.size} ".encode() + image.tobytes()).hexdigest()


# Increase this when capture rules change, so that maps cached under the old rules are not used.
_CAPTURE_VERSION = 3


def fingerprint(model: Any, processor: Any) -> str:
    """Everything that maps of this model depend on, the image and the prompt aside.

    That is: the classes, configurations and attention implementations, where and in which dtype the model runs, under
    autocast or not, the generation config (it decides the length of an answer), adapters, their scales and whether they
    are on, the processor with its tokenizer, and the weights and buffers: name, shape and dtype of each tensor, a
    checksum over all of it, and up to SAMPLES of its elements. The path is not part of it: a checkpoint may be moved.

    The weights are read again if one is another tensor, or has another address or version. Not noticed: a change
    through `tensor.data`, which no counter counts, and numbers that modules hold outside their weights.

    Raises Unidentified for a model with foreign hooks or forwards, and if weights cannot be read: offloaded, in other
    processes, or of a type without readable numbers.
    """
    model = unwrap(model)
    code = foreign_code(model)
    if code is not None:
        raise Unidentified(code)
    device = input_device(model).type
    return key_of(
        rules=_CAPTURE_VERSION,
        model=type(model).__qualname__,
        config=_portable(model.config),
        generation=_portable(model.generation_config),
        attention=names.implementations(model.config),
        modules=[
            f"{name} {type(module).__module__}.{type(module).__qualname__}" for name, module in model.named_modules()
        ],
        device=device,
        autocast=_autocast(device),
        training=model.training,
        weights=_weights(model),
        processor=_description(processor),
        tokenizer=_tokenizer(processor.tokenizer),
    )


def _description(processor: Any) -> dict[str, Any]:
    try:
        description: dict[str, Any] = processor.to_dict()
    except (ValueError, OSError) as error:
        # Ernie's looks for the file of a font.
        raise Unidentified(f"its processor cannot be described ({error})") from error
    return description


def _portable(config: Any) -> dict[str, Any]:
    """A configuration without the directory and the library version that it came from."""
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
    # Rotary frequencies are not in the state_dict, and quantised layers create their entries of it at each call.
    weights = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
    tensors = _dense_parts(weights.items())
    created = _dense_parts(
        (name, value) for name, value in model.state_dict(keep_vars=True).items() if name not in weights
    )
    adapters = names.adapter_states(model)
    versions = [
        (value.data_ptr(), 0 if value.is_inference() else value._version, value.dtype) for value in tensors.values()
    ]
    state = (versions, list(tensors), adapters, _read(created))
    with _LOCK:
        known = _MODELS.get(model)
    # A new tensor may have the address of a deleted one.
    if known is not None and known.state == state and known.matches(tensors.values()):
        return known.fingerprint
    digest = key_of(adapters=adapters, tensors=_read(tensors), made=state[-1])
    with _LOCK:
        _MODELS[model] = _Known(state, [ref(value) for value in tensors.values()], digest)
    return digest


def _dense_parts(entries: Iterable[tuple[str, Any]]) -> dict[str, torch.Tensor]:
    return {part: tensor for name, value in entries for part, tensor in dense_tensors(name, value)}


class _Known(NamedTuple):
    """The weights of a model when they were read, and their fingerprint."""

    state: Any
    tensors: list[ref[torch.Tensor]]
    fingerprint: str

    def matches(self, tensors: Iterable[torch.Tensor]) -> bool:
        return all(known() is value for known, value in zip(self.tensors, tensors, strict=True))


@torch.no_grad()
def _read(tensors: Mapping[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    picked: dict[tuple[torch.device, torch.dtype], list[torch.Tensor]] = {}
    for name, value in tensors.items():
        digest.update(f"{name} {list(value.shape)} {value.dtype} ".encode())
        try:
            flat = value.detach().as_subclass(torch.Tensor).reshape(-1).contiguous()
            # Some dtypes cannot be indexed.
            whole = flat.view(_INTEGERS[flat.element_size()])
        except (RuntimeError, TypeError, KeyError) as error:
            raise Unidentified(f"{name} is {value.dtype}, which cannot be read ({error})") from error
        picked.setdefault((value.device, whole.dtype), []).append(
            whole[_sample_indices(whole.numel()).to(value.device)]
        )
        if whole.numel() > SAMPLES:
            picked.setdefault((value.device, torch.int64), []).append(_checksum(flat))
    for values in picked.values():
        # One transfer for each dtype, not one for each tensor: a GPU would spend all of the time waiting.
        digest.update(torch.cat(values).cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _checksum(flat: torch.Tensor) -> torch.Tensor:
    """One integer over all bytes, int64 [1]: it changes with each of them and with the order of blocks.

    Sums of blocks, each multiplied by another odd number, with wrap-around.
    """
    size = flat.element_size()
    fits = all(count * size % 8 == 0 for count in (flat.numel(), flat.storage_offset()))
    integers = flat.view(torch.int64 if fits else _INTEGERS[size])
    whole = integers.numel() // _SUMMED * _SUMMED
    sums = integers[:whole].view(-1, _SUMMED).sum(1, dtype=torch.int64)
    odd = 2 * torch.arange(sums.numel(), device=flat.device) + 1
    return ((sums * odd).sum() + integers[whole:].sum(dtype=torch.int64)).reshape(1)


def _sample_indices(count: int) -> torch.Tensor:
    """Indices spread over `count` elements; equal steps would read the same few columns of a matrix."""
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


def dense_tensors(name: str, value: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """The dense tensors of a value of a model's state, each under a name that encodes the rest of its state.

    A value is a tensor of any kind, or a list, tuple or mapping of tensors, numbers and texts. Raises Unidentified for
    other values, and for a tensor whose numbers are not in this process.
    """
    try:
        yield from _dense(name, value)
    except (torch.OutOfMemoryError, torch.AcceleratorError):
        raise
    except (RuntimeError, TypeError, AttributeError) as error:
        # Tensor subclasses fail in many ways.
        raise Unidentified(f"{name} is {type(value).__name__}, which cannot be read ({error})") from error


def _dense(name: str, value: Any) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(value, torch.Tensor):
        yield from _dense_of_tensor(name, value)
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from dense_tensors(f"{name}[{key!r}]", item)
    elif isinstance(value, (list, tuple)) and not isinstance(value, torch.Size):
        for index, item in enumerate(value):
            yield from dense_tensors(f"{name}[{index}]", item)
    elif isinstance(value, _FACTS):
        yield f"{name}={value!r}", torch.empty(0)
    else:
        raise Unidentified(f"{name} is {type(value).__name__}, which cannot be read")


def _dense_of_tensor(name: str, value: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    if value.device.type == "meta":
        raise Unidentified(f"{name} is offloaded")
    if is_sharded(value):
        raise Unidentified(f"parts of {name} are in other processes")
    if hasattr(value, "__tensor_flatten__"):
        attributes, context = value.__tensor_flatten__()
        kind = f"{name}:{type(value).__module__}.{type(value).__qualname__}{list(value.shape)}{value.dtype}"
        # A repr with an address makes fingerprints differ between processes; it never makes two models equal.
        for attribute in attributes:
            yield from dense_tensors(f"{kind}({context!r}).{attribute}", getattr(value, attribute))
    elif value.is_quantized:
        for fact in _SCALES[value.qscheme()]:
            yield from dense_tensors(f"{name}.{fact}", getattr(value, fact)())
        yield f"{name}:{value.dtype}", value.int_repr()
    elif value.layout != torch.strided:
        yield f"{name}:{value.layout}", value.detach().to_dense()
    elif value.numel() and not value.untyped_storage().nbytes():
        raise Unidentified(f"{name} is offloaded")
    else:
        yield name, value
