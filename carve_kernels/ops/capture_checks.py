"""The arguments that `capture` and `capture_layers` refuse, before any work is done."""

from __future__ import annotations

import math

import torch

from carve_kernels import checks
from carve_kernels.backends import resolve
from carve_kernels.backends.reference.capture import visible_keys
from carve_kernels.numerics import float64_device
from carve_kernels.types import Capture, CaptureOptions

_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_INTEGERS = (torch.int32, torch.int64)


def check_arguments(query: torch.Tensor, key: torch.Tensor, tokens: torch.Tensor, options: CaptureOptions) -> None:
    if not _agree(query, key, tokens):
        _name_what_disagrees(query, key, tokens)
    if options.mask is not None and options.positions is not None:
        raise ValueError("positions: expected None beside a mask, got both")
    check_options(query, key, options)


def check_options(query: torch.Tensor, key: torch.Tensor, options: CaptureOptions) -> None:
    """Check the options against a query and a key that agree."""
    _, mask, positions, softcap, window, sink, lse, _ = options
    batch, query_heads, rows, _ = query.shape
    keys = key.shape[2]
    if mask is not None:
        checks.tensor("mask", mask, shape=(batch, "1 or A", rows, keys), dtypes=(torch.bool,))
        if mask.shape[1] not in (1, query_heads):
            raise ValueError(f"mask: expected 1 or {query_heads} heads, got {checks.describe(mask)}")
        checks.device("mask", mask, query)
    if positions is not None:
        checks.tensor("positions", positions, shape=(batch, rows), dtypes=_INTEGERS)
        checks.device("positions", positions, query)
    if softcap is not None and checks.number("softcap", softcap) <= 0:
        raise ValueError(f"softcap: expected a positive number, got {checks.describe(softcap)}")
    if window is not None:
        checks.integer("window", window, low=1)
        if positions is None:
            raise ValueError("window: expected positions beside a window, got none")
    if sink is not None:
        checks.tensor("sink", sink, shape=(query_heads,), dtypes=_FLOATS)
        checks.device("sink", sink, query)
    if lse is not None:
        checks.tensor("lse", lse, shape=(batch, query_heads, rows), dtypes=(torch.float32, torch.float64))
        checks.device("lse", lse, query)


def _agree(query: torch.Tensor, key: torch.Tensor, tokens: torch.Tensor) -> bool:
    """Whether `_name_what_disagrees` would raise nothing, in a third of its time: every call pays for it."""
    try:
        batch, heads, _, size = query.shape
        key_batch, key_heads, _, key_size = key.shape
        token_batch, _ = tokens.shape
        return (
            batch == key_batch == token_batch
            and size == key_size
            and key_heads > 0
            and heads % key_heads == 0
            and query.dtype in _FLOATS
            and key.dtype == query.dtype
            and tokens.dtype in _INTEGERS
            and query.device == key.device == tokens.device
        )
    except (AttributeError, TypeError, ValueError):
        return False


def _name_what_disagrees(query: torch.Tensor, key: torch.Tensor, tokens: torch.Tensor) -> None:
    check_query_and_key(query, key)
    checks.tensor("tokens", tokens, shape=(query.shape[0], "N"), dtypes=_INTEGERS)
    checks.device("tokens", tokens, query)


def check_query_and_key(query: torch.Tensor, key: torch.Tensor) -> None:
    checks.tensor("query", query, shape=("B", "A", "R", "D"), dtypes=_FLOATS)
    batch, query_heads, _, size = query.shape
    checks.tensor("key", key, shape=(batch, "KV", "S", size), dtypes=(query.dtype,))
    key_heads = key.shape[1]
    if not key_heads or query_heads % key_heads:
        raise ValueError(f"key: expected a number of heads that divides the query's {query_heads}, got {key_heads}")
    checks.device("key", key, query)


def check_out(query: torch.Tensor, tokens: torch.Tensor, heads: str, out: Capture, *, in_steps: bool = False) -> None:
    """Check the outputs of one capture or, `in_steps`, buffers of the steps and layers of many."""
    if not isinstance(out, Capture):
        raise TypeError(f"out: expected a Capture, got {checks.describe(out)}")
    batch, query_heads, rows, _ = query.shape
    middle = (query_heads,) if heads == "each" else ()
    lead: tuple[int | str, ...] = ("T", "M") if in_steps else ()
    dtypes = (torch.float32,) if in_steps else (torch.float32, torch.float64)
    checks.tensor("out.maps", out.maps, shape=(*lead, batch, *middle, rows, tokens.shape[1]), dtypes=dtypes)
    lead = tuple(out.maps.shape[: len(lead)])
    for name, part in (("out.mass", out.mass), ("out.entropy", out.entropy)):
        checks.tensor(name, part, shape=(*lead, batch, rows), dtypes=dtypes)
    for name, part in zip(out._fields, out, strict=True):
        checks.device(f"out.{name}", part, query)


def check_values(query: torch.Tensor, key: torch.Tensor, tokens: torch.Tensor, options: CaptureOptions) -> None:
    """Refuse NaN in the query, tokens outside the keys, and an lse that does not normalise the first row."""
    _, mask, positions, _, _, sink, lse, _ = options
    if tokens.numel() and key.shape[2]:
        lowest, highest = (int(end) for end in tokens.aminmax())
        if lowest < -1 or highest >= key.shape[2]:
            raise ValueError(
                f"tokens: expected columns from 0 to {key.shape[2] - 1}, and -1 for padding, got some from {lowest} to "
                f"{highest}"
            )
    # A sum is one operator and `isfinite` four; only a sum that overflows needs them.
    if not math.isfinite(torch.sum(query).item()) and not bool(torch.isfinite(query).all()):
        raise ValueError("query: expected finite values, got NaN or inf among them")
    if lse is None or not query.shape[0] or not query.shape[2]:
        return
    device = float64_device(query.device)
    given = lse[:1, :, :1].to(device, torch.float64)
    every_key = torch.arange(key.shape[2], device=device)[None]
    first_row = options._replace(
        mask=None if mask is None else mask[:1, :, :1].to(device),
        positions=None if positions is None else positions[:1, :1].to(device),
        sink=None,
        lse=given,
        heads="each",
    )
    call = (query[:1, :, :1].to(device, torch.float64), key[:1].to(device, torch.float64), every_key, first_row)
    total = resolve("capture", "reference", device, *call).forward(*call).maps.sum(-1)
    if sink is not None:
        total = total + torch.exp(sink.to(device, torch.float64).view(1, -1, 1) - given)
    # The logits of half precision are off by up to 2 %; an lse in base 2 is off by far more.
    tolerance = 0.1 if query.dtype in (torch.float16, torch.bfloat16) else 1e-2
    visible = visible_keys(first_row, key.shape[2])
    sees = torch.full((), key.shape[2] > 0, device=device) if visible is None else visible.any(-1)
    wrong = ((total - 1).abs() > tolerance) & (sees | (total != 0))
    if bool(wrong.any()):
        raise ValueError(
            "lse: expected the natural log-sum-exp of the scaled logits, under which the probabilities of a row sum to "
            f"1, got one under which the first row's sum to {total[wrong][0].item():.4g}"
        )
