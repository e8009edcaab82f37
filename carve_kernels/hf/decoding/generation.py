"""What `generate` would decide with: its settings, its processors of logits, its criteria of stopping, positions."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from transformers import StoppingCriteriaList, StopStringCriteria

from carve_kernels.hf import names
from carve_kernels.hf.model import unwrap
from carve_kernels.hf.query_rows import tokenizer_of

_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")
ROADS = ("prompt_lookup_num_tokens", "assistant_early_exit", "prefill_chunk_size")
"""Settings of `generate` that lead to the same greedy words."""

# To other words, which no one prompt's attention leads to.
_OTHER_WORDS = ("guidance_scale", "penalty_alpha", "dola_layers", "constraints", "force_words_ids")


class Decision(NamedTuple):
    """How the words behind one prompt are chosen: `positions` int64 [C, 1, S] of the prompt, and what `generate` made.

    `processors(ids, scores)` changes scores [1, V]; `criteria(ids, None)` says whether ids [1, S] are complete.
    """

    positions: torch.Tensor
    processors: Any
    criteria: Any

    def next(self, ids: torch.Tensor, logits: torch.Tensor) -> tuple[torch.Tensor, bool]:
        """The ids [1, S + 1] with the next token, from logits [V], and whether it is the last one."""
        scores = self.processors(ids, logits[None].to(dtype=torch.float32, copy=True))
        longer = torch.cat([ids, scores.argmax(-1, keepdim=True)], 1)
        return longer, bool(self.criteria(longer, None).all())


def greedy(model: Any, max_new_tokens: int) -> Any:
    """The model's generation config, without sampling and of so many new tokens.

    Raises ValueError if it asks for words that are not greedy ones in another way: guidance, contrast, constraints.
    """
    config = copy.deepcopy(unwrap(model).generation_config)
    for name in _OTHER_WORDS:
        value = getattr(config, name, None)
        neutral = value == 1 if name == "guidance_scale" else not value
        if value is not None and not neutral:
            raise ValueError(
                f"model: its generation config has {name}={value!r}, expected None: answers are greedy here, and maps "
                "are those of the prompt that leads to them"
            )
    config.update(do_sample=False, num_beams=1, num_return_sequences=1, max_new_tokens=max_new_tokens, max_length=None)
    config.update(**dict.fromkeys((*_SAMPLING, *ROADS)))
    return config


def decide(model: Any, processor: Any, inputs: Mapping[str, Any], max_new_tokens: int) -> Decision:
    """Ask `generate` what it would do with one prompt, given without its pixels; no forward runs."""
    config = greedy(model, max_new_tokens)
    # A cache is the one thing that it prepares and nobody here needs.
    config.update(cache_implementation=None, return_dict_in_generate=False)
    criteria = StoppingCriteriaList()
    if config.stop_strings:
        # It hands no tokenizer on to whoever decodes in its place, so the criterion is made here.
        criteria.append(StopStringCriteria(tokenizer_of(processor), config.stop_strings))
        config.update(stop_strings=None)
    # What a given config leaves out, `generate` takes from the model's own: ask a twin, which shares all but that.
    twin = copy.copy(model)
    twin.generation_config = config
    prepared = names.prepared_by_generate(twin, inputs, criteria)
    positions = prepared.positions
    if positions is None:
        positions = torch.arange(inputs["input_ids"].shape[1], device=inputs["input_ids"].device)[None]
    if positions.ndim == 2:
        positions = positions[None]
    return Decision(positions, prepared.processors, prepared.criteria)


def stop_texts(config: Any, processor: Any) -> dict[str, Any]:
    """What `generate` wants beside a config that ends answers at certain texts."""
    if not config.stop_strings or processor is None:
        return {}
    return {"tokenizer": tokenizer_of(processor)}


@contextmanager
def positions_kept(model: Any) -> Iterator[None]:
    """Puts back what some models (Qwen's) note of the last prompt's positions: a caller may be decoding on it."""
    notes = names.position_notes(model)
    try:
        yield
    finally:
        names.set_position_notes(notes)
