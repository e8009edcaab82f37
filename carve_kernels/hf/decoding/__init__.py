"""One door to greedy decoding with captured attention: tree decoding where the model allows it, else sequential.

    decoder = Decoder(model, processor, layers, backend)
    decoder.decode(groups)  # -> list[Decoded]

prompt_groups.py has what is decoded and what comes out; support.py says when tree decoding is possible; tree_decoder.py
does it with tree_attention.py, token_tree.py, tree_capture.py and prefix_cache.py; sequential.py is the fallback;
generation.py has the rules of `generate` by which both choose tokens. Answers and maps are the same either way.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch

from carve_kernels.hf.decoding.generation import preserved_positions
from carve_kernels.hf.decoding.prefix_cache import PrefixCache
from carve_kernels.hf.decoding.prompt_groups import Branch, Decoded, PromptGroup
from carve_kernels.hf.decoding.sequential import decode_prompt
from carve_kernels.hf.decoding.support import sequential_reason
from carve_kernels.hf.decoding.tree_attention import TreeUnsupported
from carve_kernels.hf.decoding.tree_decoder import TreeDecoder
from carve_kernels.hf.model import unwrap

__all__ = [
    "Branch",
    "Decoded",
    "Decoder",
    "PrefixCache",
    "PromptGroup",
    "exclusive",
    "sequential_reason",
]

_LOG = logging.getLogger("carve_kernels")
_LOCK = threading.Lock()
_MODEL_LOCKS: WeakKeyDictionary[Any, threading.RLock] = WeakKeyDictionary()


class Decoder:
    """Decodes groups of prompts on one model; `layers` are captured by the backend `backend`."""

    def __init__(self, model: Any, processor: Any, layers: tuple[int, ...], backend: str) -> None:
        self._model, self._processor, self._layers, self._backend = model, processor, layers, backend
        self._set_reason(sequential_reason(model))

    def decode(self, groups: Sequence[PromptGroup]) -> list[Decoded]:
        """The greedy answers and the maps of all prompts, in order; each branch gets its own as `decoded`."""
        if self.sequential_reason is None:
            # Not in inference mode: cached keys are written to by later calls, which may be outside of it.
            with (
                exclusive(self._model),
                torch.inference_mode(False),
                torch.no_grad(),
                preserved_positions(unwrap(self._model)),
            ):
                try:
                    tree = TreeDecoder(unwrap(self._model), self._processor, self._layers, self._backend)
                    return _assign(groups, tree.decode(groups))
                except TreeUnsupported as error:
                    self._set_reason(str(error))
                    for group in groups:
                        # It may be half read.
                        group.prefix = None
        return _assign(
            groups,
            [
                decode_prompt(self._model, self._processor, group, branch, self._layers, self._backend)
                for group in groups
                for branch in group.branches
            ],
        )

    def _set_reason(self, reason: str | None) -> None:
        self.sequential_reason = reason
        if reason is not None:
            _LOG.info("prompts are decoded one by one, since %s", reason)


@contextmanager
def exclusive(model: Any) -> Iterator[None]:
    """Other threads that decode on this model wait until the block is left."""
    with _LOCK:
        lock = _MODEL_LOCKS.setdefault(unwrap(model), threading.RLock())
    with lock:
        yield


def _assign(groups: Sequence[PromptGroup], decoded: list[Decoded]) -> list[Decoded]:
    branches = [branch for group in groups for branch in group.branches]
    for branch, result in zip(branches, decoded, strict=True):
        branch.decoded = result
    return decoded
