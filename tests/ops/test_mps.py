"""The stages on tensors of a simulated MPS device: the CPU's numbers, and no float64."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import carve_kernels
from carve_kernels import selfcheck
from carve_kernels.backends import BACKENDS
from carve_kernels.selfcheck.trials import trials
from tests.support.mps import NO_FLOAT64, mps
from tests.support.tiny_models import make_image

VISIBILITY: dict[str, dict[str, Any]] = {
    "all": {},
    "positions": {"positions": torch.full((2, 3), 30), "window": 9},
    "mask": {"mask": torch.arange(40) % 3 > 0, "softcap": 3.0, "sink": torch.linspace(-1, 1, 4)},
}


@pytest.fixture
def device() -> Iterator[torch.device]:
    with mps() as found:
        yield found


def test_the_device_refuses_what_a_real_one_refuses(device: torch.device) -> None:
    for ask in (
        lambda: torch.ones(2, dtype=torch.float64, device=device),
        lambda: torch.ones(2, device=device).double(),
    ):
        with pytest.raises(TypeError, match=NO_FLOAT64):
            ask()
    with pytest.raises(RuntimeError, match="same device"):
        torch.ones(2, device=device) + torch.ones(2)
    with pytest.raises(NotImplementedError, match="not currently implemented for the MPS device"):
        torch.linalg.eig(torch.eye(2, device=device))
    assert (torch.arange(3, device=device) + 1).tolist() == [1, 2, 3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", VISIBILITY)
def test_capture(device: torch.device, kind: str, dtype: torch.dtype) -> None:
    query, key = torch.randn(2, 4, 3, 32).to(dtype), torch.randn(2, 2, 40, 32).to(dtype)
    tokens = torch.arange(12, dtype=torch.int32).repeat(2, 1)
    options = dict(VISIBILITY[kind])
    if "mask" in options:
        options["mask"] = options["mask"].expand(2, 1, 3, 40)
    expected = carve_kernels.capture(query, key, tokens, scale=0.2, backend="reference", **options)
    options = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in options.items()}
    there = [part.to(device) for part in (query, key, tokens)]
    found = carve_kernels.capture(*there, scale=0.2, **options)
    for part, right in zip(found, expected, strict=True):
        assert part.device == device and torch.equal(part.cpu(), right)


def test_a_log_sum_exp_is_checked_in_float64_elsewhere(device: torch.device) -> None:
    query, key = torch.randn(1, 2, 2, 32), torch.randn(1, 2, 20, 32)
    tokens, lse = torch.arange(6, dtype=torch.int32)[None], (0.2 * query @ key.mT).logsumexp(-1)
    there = [part.to(device) for part in (query, key, tokens)]
    carve_kernels.capture(*there, scale=0.2, lse=lse.to(device), check=True)
    with pytest.raises(ValueError, match=r"^lse: expected the natural log-sum-exp"):
        carve_kernels.capture(*there, scale=0.2, lse=2 * lse.to(device), check=True)


@pytest.mark.parametrize("normalize", ["none", "sum", "max", "minmax"])
def test_contrast(device: torch.device, normalize: str) -> None:
    task, general = torch.rand(3, 2, 12), torch.rand(3, 2, 12)
    options: dict[str, Any] = {"layer_weights": [1.0, 0.5, 2.0], "step_weights": torch.ones(2), "normalize": normalize}
    expected = carve_kernels.contrast(task, general, (3, 4), (61, 83), backend="reference", **options)
    for more in ({}, {"check": True}):
        found = carve_kernels.contrast(task.to(device), general.to(device), (3, 4), (61, 83), **options, **more)
        assert found.device == device and torch.equal(found.cpu(), expected)


@pytest.mark.parametrize("saliency", [torch.rand(20, 30), torch.zeros(20, 30)], ids=["noise", "flat"])
def test_regions_have_their_scores_where_there_is_float64(device: torch.device, saliency: torch.Tensor) -> None:
    expected = carve_kernels.regions(saliency, keep=0.4, top=2, backend="reference")
    found = carve_kernels.regions(saliency.to(device), keep=0.4, top=2, check=True)
    assert (found.mask.device, found.boxes.device, found.scores.device.type) == (device, torch.device("cpu"), "cpu")
    assert found.scores.dtype == torch.float64 and torch.equal(found.scores, expected.scores)
    assert torch.equal(found.mask.cpu(), expected.mask) and torch.equal(found.boxes.cpu(), expected.boxes)
    assert (found.box, found.reason) == (expected.box, expected.reason)


@pytest.mark.parametrize("scale", [1.0, 0.0])
def test_carve(device: torch.device, scale: float) -> None:
    image, task, general = make_image(80, 60), scale * torch.rand(2, 2, 12), torch.rand(2, 2, 12)
    expected = carve_kernels.carve(image, task, general, grid=(3, 4), backend="reference")
    found = carve_kernels.carve(image, task.to(device), general.to(device), grid=(3, 4))
    assert found.saliency.device == device and torch.equal(found.saliency.cpu(), expected.saliency)
    assert found.regions.box == expected.regions.box and found.reason == expected.reason
    assert torch.equal(found.regions.scores, expected.regions.scores)


def test_other_backends_say_that_they_are_elsewhere(device: torch.device) -> None:
    for backend in BACKENDS[1:]:
        with pytest.raises(carve_kernels.BackendUnavailable, match=backend):
            carve_kernels.regions(torch.rand(4, 4, device=device), keep=0.4, top=1, backend=backend)


def test_check_leaves_out_what_needs_float64() -> None:
    (trial_in_float64,) = (trial for build in trials(quick=True) if "float64" in (trial := build()).name)
    entry = selfcheck._check(trial_in_float64, "reference", torch.device("mps"))
    assert entry["right"] is None and entry["problem"] == "mps has no float64"
