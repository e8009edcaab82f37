"""Planted attention: a query that attends to some keys, non-dense strides, garbage outside; and a textbook capture."""

from __future__ import annotations

from typing import Any

import torch

from carve_kernels.selfcheck.planted import Case as Case
from carve_kernels.selfcheck.planted import exact as exact
from carve_kernels.selfcheck.planted import planted as planted
from carve_kernels.selfcheck.planted import poisoned as poisoned
from carve_kernels.types import Capture


def textbook(arguments: tuple[torch.Tensor, torch.Tensor, torch.Tensor], options: dict[str, Any]) -> Capture:
    """Capture by the textbook formula, one row and head at a time, in float64."""
    query, key, tokens = (part.double() if part.is_floating_point() else part for part in arguments)
    batch, heads, rows, _ = query.shape
    group = heads // key.shape[1]
    maps = torch.zeros(batch, heads, rows, tokens.shape[1], dtype=torch.float64)
    for b, h, r in [(b, h, r) for b in range(batch) for h in range(heads) for r in range(rows)]:
        visible = list(range(key.shape[2]))
        if options.get("mask") is not None:
            mask = options["mask"][b, h if options["mask"].shape[1] > 1 else 0, r]
            visible = [column for column in visible if mask[column]]
        if options.get("positions") is not None:
            last = int(options["positions"][b, r])
            first = last - options["window"] + 1 if options.get("window") else 0
            visible = [column for column in visible if first <= column <= last]
        logits = [float(query[b, h, r] @ key[b, h // group, column]) * options["scale"] for column in visible]
        values = torch.tensor(logits, dtype=torch.float64)
        if options.get("softcap") is not None:
            values = options["softcap"] * torch.tanh(values / options["softcap"])
        if options.get("sink") is not None:
            values = torch.cat([values, options["sink"][h].double().view(1)])
        shares = dict(zip(visible, values.softmax(-1).tolist(), strict=False)) if len(values) else {}
        for index, token in enumerate(tokens[b].tolist()):
            maps[b, h, r, index] = shares.get(token, 0.0)
    mean = maps.mean(1)
    mass = mean.sum(-1)
    entropy = torch.zeros_like(mass)
    for b, r in [(b, r) for b in range(batch) for r in range(rows)]:
        used = mean[b, r][(tokens[b] >= 0) & (tokens[b] < key.shape[2])]
        if len(used) > 1 and mass[b, r] > 0:
            share = used[used > 0] / mass[b, r]
            entropy[b, r] = -(share * share.log()).sum() / torch.tensor(float(len(used))).double().log()
    return Capture(mean, mass, entropy)
