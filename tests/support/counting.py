"""What the tests of a batch share: an engine that answers at once, and questions for it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from carve_kernels.checks import BackendUnavailable

QUESTIONS = ["what digit is red", "where is the square", "hello", "what is at the left of the image"]


class Counting:
    """An engine that answers with what it was asked, and notes which questions it answered together."""

    def __init__(self, faults: dict[str, Exception] | None = None, tokens: int = 10) -> None:
        self.device = torch.device("cpu")
        self.bytes_per_token, self.bytes_per_prompt = 1000, 0
        self.groups: list[list[str]] = []
        self._faults, self._tokens = faults or {}, tokens

    def request(self, image: Any, question: str, prompt: str | None) -> Any:
        if question == "bad":
            raise ValueError("image: bad")
        if question == "broken":
            raise BackendUnavailable("no backend")
        return SimpleNamespace(image=image, question=question, prompt=prompt, tokens=self._tokens)

    def answer(self, requests: list[Any]) -> list[Any]:
        self.groups.append([request.question for request in requests])
        for request in requests:
            if request.question in self._faults:
                raise self._faults[request.question]
        return [(request.image, request.question, request.prompt) for request in requests]
