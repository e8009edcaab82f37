"""What the tests of sessions share as fixtures."""

from __future__ import annotations

from typing import Any

import pytest


@pytest.fixture
def using() -> Any:
    """Sets the text attention of a shared model, and puts sdpa back."""
    used = []

    def use(model: Any, implementation: str) -> None:
        used.append(model)
        model.set_attn_implementation({"text_config": implementation})

    yield use
    for model in used:
        model.set_attn_implementation({"text_config": "sdpa"})
