"""Fixtures of the tests of hf."""

from __future__ import annotations

from typing import Any

import pytest


@pytest.fixture
def using() -> Any:
    """Set the text attention of a shared model; sdpa is restored."""
    models = []

    def use(model: Any, implementation: str) -> None:
        models.append(model)
        model.set_attn_implementation({"text_config": implementation})

    yield use
    for model in models:
        model.set_attn_implementation({"text_config": "sdpa"})
