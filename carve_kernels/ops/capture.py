"""Capture: the attention of chosen rows to the visual tokens, beside any fast attention."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch

from carve_kernels import checks, schemas  # noqa: F401  (the schemas must stand before the implementations)
from carve_kernels.backends import resolve
from carve_kernels.backends.reference import capture as reference
from carve_kernels.types import Capture

_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_INTEGERS = (torch.int32, torch.int64)


def capture(
    query: torch.Tensor,
    key: torch.Tensor,
    tokens: torch.Tensor,
    *,
    scale: float,
    mask: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
    softcap: float | None = None,
    window: int | None = None,
    sink: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
    heads: Literal["mean", "each"] = "mean",
    out: Capture | None = None,
    backend: str = "auto",
    check: bool | None = None,
) -> Capture:
    """Attention probabilities of R rows, taken over all keys that each row may see, at the N visual tokens.

    Equals, for one batch row without mask::

        probabilities = (scale * query @ key.repeat_interleave(A // KV, 0).mT).softmax(-1)  # [A, R, S]
        maps = probabilities[..., tokens].mean(0)                                           # [R, N]

    ===========  ================  ==================  =============================================================
    name         dtype             shape               meaning
    ===========  ================  ==================  =============================================================
    query        float             [B, A, R, D]        the captured rows, any strides
    key          as query          [B, KV, S, D]       all keys, any strides; A is a multiple of KV
    tokens       int32, int64      [B, N]              columns of the visual tokens; -1 and other strays are padding
    scale        float                                 factor of the logits, usually D ** -0.5
    mask         bool              [B, 1 or A, R, S]   True where a row sees a key
    positions    int32, int64      [B, R]              last key that a row sees, instead of a mask
    softcap      float                                 logits become softcap * tanh(logits / softcap)
    window       int                                   with positions: a row sees its last `window` keys only
    sink         float             [A]                 one more logit for each head, without a key
    lse          float             [B, A, R]           natural log-sum-exp of the logits, where it is known already
    heads        str                                   "mean" over the heads, or "each" head by itself
    out          Capture                               tensors to write into, of the shapes below
    check        bool                                  look for NaN and a wrong lse; the default does so on a CPU only
    ===========  ================  ==================  =============================================================

    Returns Capture(maps [B, R, N] or [B, A, R, N], mass [B, R], entropy [B, R]) in float32 (float64 for float64
    input). `mass` is the sum of the head mean over the tokens; `entropy` is H / ln N of the head mean renormalised over
    the tokens, 0 where fewer than two tokens are used or the mass is 0. A row that sees no key gives zeros.

    Raises TypeError or ValueError for arguments that do not fit, BackendUnavailable for a room that cannot serve.
    Source: A[l, t] of CARVE, arXiv 2509.06461, section 3.
    """
    _check_capture(query, key, tokens, mask, positions, softcap, window, sink, lse)
    checks.number("scale", scale)
    checks.choice("heads", heads, ("mean", "each"))
    if out is not None:
        _check_out(query, tokens, heads, out)
    room = resolve(
        "capture", backend, query.device, query, key, tokens,
        scale=scale, mask=mask, positions=positions, softcap=softcap, window=window, sink=sink, lse=lse, heads=heads,
        out=out,
    )  # fmt: skip
    if check or (check is None and query.device.type == "cpu"):
        _check_values(query, key, scale, mask, positions, softcap, window, sink, lse)
    result: Capture = room.forward(
        query, key, tokens,
        scale=scale, mask=mask, positions=positions, softcap=softcap, window=window, sink=sink, lse=lse, heads=heads,
        out=out,
    )  # fmt: skip
    return result


def capture_layers(
    query: Sequence[torch.Tensor],
    key: Sequence[torch.Tensor],
    tokens: torch.Tensor,
    *,
    scale: float,
    step: torch.Tensor,
    out: Capture,
    first: int = 0,
    mask: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
    softcap: float | None = None,
    window: int | None = None,
    sink: Sequence[torch.Tensor] = (),
    backend: str = "auto",
) -> None:
    """Capture several layers of one forward into one step of preallocated buffers; one operator of torch.library.

    Equals::

        for l in range(len(query)):
            part = capture(query[l], key[l], tokens, scale=scale, ...)
            out.maps[step, first + l], out.mass[step, first + l], out.entropy[step, first + l] = part

    ===========  ================  ==================  =====================================================
    name         dtype             shape               meaning
    ===========  ================  ==================  =====================================================
    query        float             L x [B, A, R, D]    the captured rows of each layer
    key          as query          L x [B, KV, S, D]   the keys of each layer
    tokens       int32, int64      [B, N]              columns of the visual tokens, -1 is padding
    step         int64             []                  step to write, on the device: no recompilation by step
    out.maps     float32           [T, M, B, R, N]     M layers of buffers, first + L <= M
    out.mass     float32           [T, M, B, R]
    out.entropy  float32           [T, M, B, R]
    sink         float             L x [A], or none    sinks of each layer
    ===========  ================  ==================  =====================================================

    The other arguments are those of `capture` and serve all the layers. A step outside [0, T) is an error on a CPU and
    undefined elsewhere. Raises TypeError or ValueError for arguments that do not fit, BackendUnavailable for a room
    that cannot serve. Source: A[l, t] of CARVE, arXiv 2509.06461, section 3.
    """
    if not len(query) or len(query) != len(key) or len(sink) not in (0, len(query)):
        raise ValueError(
            f"query, key, sink: expected one entry a layer, got {len(query)}, {len(key)} and {len(sink)} of them"
        )
    for layer in range(len(query)):
        one = sink[layer] if sink else None
        _check_capture(query[layer], key[layer], tokens, mask, positions, softcap, window, one)
    checks.number("scale", scale)
    checks.integer("first", first, low=0)
    checks.tensor("step", step, shape=(), dtypes=(torch.int64,))
    batch, _, rows, _ = query[0].shape
    room = checks.tensor("out.maps", out.maps, shape=("T", "M", batch, rows, tokens.shape[1]), dtypes=(torch.float32,))
    steps, layers = room.shape[:2]
    for name, part in (("out.mass", out.mass), ("out.entropy", out.entropy)):
        checks.tensor(name, part, shape=(steps, layers, batch, rows), dtypes=(torch.float32,))
    if first + len(query) > layers:
        raise ValueError(f"first: expected first + {len(query)} layers to fit in {layers}, got {first}")
    torch.ops.carve_kernels.capture_layers(
        list(query), list(key), tokens, mask, positions, list(sink), float(scale), float(softcap or 0.0),
        int(window or 0), step, first, backend, *out,
    )  # fmt: skip


def _capture_layers(
    query: list[torch.Tensor],
    key: list[torch.Tensor],
    tokens: torch.Tensor,
    mask: torch.Tensor | None,
    positions: torch.Tensor | None,
    sink: list[torch.Tensor],
    scale: float,
    softcap: float,
    window: int,
    step: torch.Tensor,
    first: int,
    backend: str,
    maps: torch.Tensor,
    mass: torch.Tensor,
    entropy: torch.Tensor,
) -> None:
    shared = {
        "scale": scale,
        "mask": mask,
        "positions": positions,
        "softcap": softcap or None,
        "window": window or None,
    }
    out = Capture(maps, mass, entropy)
    room = resolve("capture", backend, query[0].device, query[0], key[0], tokens, **shared)
    together = getattr(room, "forward_layers", None)
    if together is not None and together(query, key, tokens, sink=sink, step=step, first=first, out=out, **shared):
        return
    for layer in range(len(query)):
        arguments = {**shared, "sink": sink[layer] if sink else None}
        call = (query[layer], key[layer], tokens)
        room = resolve("capture", backend, query[layer].device, *call, **arguments)
        part: Capture = room.forward(*call, **arguments)
        for buffer, values in zip(out, part, strict=True):
            buffer[:, first + layer].index_copy_(0, step.view(1), values.to(buffer.dtype)[None])


for _device in ("CPU", "CUDA"):
    torch.library.impl("carve_kernels::capture_layers", _device.lower(), _capture_layers)


def _check_capture(
    query: torch.Tensor,
    key: torch.Tensor,
    tokens: torch.Tensor,
    mask: torch.Tensor | None,
    positions: torch.Tensor | None,
    softcap: float | None,
    window: int | None,
    sink: torch.Tensor | None,
    lse: torch.Tensor | None = None,
) -> None:
    if not _agree(query, key, tokens):
        _name_what_disagrees(query, key, tokens)
    batch, query_heads, rows, _ = query.shape
    keys = key.shape[2]
    if mask is not None:
        if positions is not None:
            raise ValueError("positions: expected None beside a mask, got both")
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
    """What `_name_what_disagrees` looks for, in a third of its time; it stands before every call."""
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
    checks.tensor("query", query, shape=("B", "A", "R", "D"), dtypes=_FLOATS)
    batch, query_heads, _, size = query.shape
    checks.tensor("key", key, shape=(batch, "KV", "S", size), dtypes=(query.dtype,))
    key_heads = key.shape[1]
    if not key_heads or query_heads % key_heads:
        raise ValueError(f"key: expected a number of heads that divides the query's {query_heads}, got {key_heads}")
    checks.device("key", key, query)
    checks.tensor("tokens", tokens, shape=(batch, "N"), dtypes=_INTEGERS)
    checks.device("tokens", tokens, query)


def _check_out(query: torch.Tensor, tokens: torch.Tensor, heads: str, out: Capture) -> None:
    batch, query_heads, rows, _ = query.shape
    dtypes = (torch.float32, torch.float64)
    middle = (query_heads,) if heads == "each" else ()
    checks.tensor("out.maps", out.maps, shape=(batch, *middle, rows, tokens.shape[1]), dtypes=dtypes)
    checks.tensor("out.mass", out.mass, shape=(batch, rows), dtypes=dtypes)
    checks.tensor("out.entropy", out.entropy, shape=(batch, rows), dtypes=dtypes)


def _check_values(
    query: torch.Tensor,
    key: torch.Tensor,
    scale: float,
    mask: torch.Tensor | None,
    positions: torch.Tensor | None,
    softcap: float | None,
    window: int | None,
    sink: torch.Tensor | None,
    lse: torch.Tensor | None,
) -> None:
    """NaN in the query, and an lse under which the first row's probabilities do not sum to 1."""
    # A sum is one operator where `isfinite` is four; only one that overflows needs the second look.
    if not math.isfinite(torch.sum(query).item()) and not bool(torch.isfinite(query).all()):
        raise ValueError("query: expected finite values, got NaN or inf among them")
    if lse is None or not query.shape[0] or not query.shape[2]:
        return
    given = lse[:1, :, :1]
    row = reference.forward(
        query[:1, :, :1].double(), key[:1].double(), torch.arange(key.shape[2])[None],
        scale=scale, mask=None if mask is None else mask[:1, :, :1],
        positions=None if positions is None else positions[:1, :1],
        softcap=softcap, window=window, lse=given, heads="each",
    )  # fmt: skip
    total = row.maps.sum(-1)
    if sink is not None:
        total = total + torch.exp(sink.double().view(1, -1, 1) - given.double())
    # The logits of half precision are off by up to 2 %; an lse in base 2 is off by far more.
    tolerance = 0.1 if query.dtype in (torch.float16, torch.bfloat16) else 1e-2
    wrong = (total - 1).abs() > tolerance
    if bool((wrong & (total != 0)).any()):
        raise ValueError(
            "lse: expected the natural log-sum-exp of the scaled logits, under which the probabilities of a row sum to "
            f"1, got one under which the first row's sum to {total[wrong][0].item():.4g}"
        )
