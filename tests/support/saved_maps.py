"""What the memory's tests share: maps to keep, and whether what comes back is the same."""

from __future__ import annotations

import torch

from carve_kernels import AttentionMaps, View, VisualLayout

KEY = ("model", "image", None, "Write.", (1, 2), "last", 3)


def maps(seed: int = 0, tokens: int = 12) -> AttentionMaps:
    """Maps whose tensors are slices of larger ones, as a session's buffers are."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(1, 2, 8, 1, tokens, generator=generator)[:, :, :3]
    columns = torch.arange(4, 4 + tokens, dtype=torch.int32)
    layout = VisualLayout(((View(columns, (2, tokens // 2), (0.0, 0.0, 9.0, 6.0)),),), (((6, 9),),))
    return AttentionMaps(
        values=values,
        mass=values.sum(-1),
        entropy=values.mean(-1),
        valid=torch.ones(1, 2, 3, 1, dtype=torch.bool),
        layers=(1, 2),
        steps=(0, 1, 2),
        tokens=columns[None],
        dtype="float32",
        layout=layout,
    )


def same(one: AttentionMaps | None, other: AttentionMaps) -> bool:
    return (
        one is not None
        and all(torch.equal(getattr(one, name), getattr(other, name)) for name in ("values", "mass", "valid", "tokens"))
        and torch.equal(one.entropy, other.entropy)
        and (one.layers, one.steps, one.dtype) == (other.layers, other.steps, other.dtype)
        and torch.equal(one.view(), other.view())
    )
