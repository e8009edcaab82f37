"""How `generate` would choose the next token: its config, logits processors, stopping criteria and positions."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from transformers import StoppingCriteriaList, StopStringCriteria

from carve_kernels.hf import names
from carve_kernels.hf.model import text_backbone, unwrap
from carve_kernels.hf.query_rows import tokenizer_of

_SAMPLING_OPTIONS = ("temperature", "top_p", "top_k", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")
SAME_OUTPUT_OPTIONS = ("prompt_lookup_num_tokens", "assistant_early_exit", "prefill_chunk_size")
"""Options of `generate` that change speed, not greedy output; ignored."""

# Options that change the output; refused.
_UNSUPPORTED_OPTIONS = ("guidance_scale", "penalty_alpha", "dola_layers", "constraints", "force_words_ids")


class Generation(NamedTuple):
    """What `generate` prepared for one prompt: `positions` int64 [C, 1, S], logits processors, stopping criteria.

    `processors(ids, scores)` returns scores [1, V]; `criteria(ids, None)` says whether ids [1, S] are complete.
    """

    positions: torch.Tensor
    processors: Any
    criteria: Any

    def next(self, ids: torch.Tensor, logits: torch.Tensor) -> tuple[torch.Tensor, bool]:
        """The ids [1, S + 1] with the next token, from logits [V], and whether it is the last one."""
        scores = self.processors(ids, logits[None].to(dtype=torch.float32, copy=True))
        ids = torch.cat([ids, scores.argmax(-1, keepdim=True)], 1)
        return ids, bool(self.criteria(ids, None).all())


def greedy_config(model: Any, max_new_tokens: int) -> Any:
    """The generation config of a model, made greedy, with the given `max_new_tokens`.

    Raises ValueError for options under which the output is not greedy: guidance, contrastive search, constraints.
    """
    config = copy.deepcopy(unwrap(model).generation_config)
    for name in _UNSUPPORTED_OPTIONS:
        value = getattr(config, name, None)
        neutral = value == 1 if name == "guidance_scale" else not value
        if value is not None and not neutral:
            raise ValueError(
                f"model: its generation config has {name}={value!r}, expected None: answers are greedy here, and maps "
                "are those of the prompt that leads to them"
            )
    config.update(do_sample=False, num_beams=1, num_return_sequences=1, max_new_tokens=max_new_tokens, max_length=None)
    config.update(**dict.fromkeys((*_SAMPLING_OPTIONS, *SAME_OUTPUT_OPTIONS)))
    return config


def prepare_generation(model: Any, processor: Any, inputs: Mapping[str, Any], max_new_tokens: int) -> Generation:
    """Let `generate` prepare one prompt, given without its pixels; no forward runs."""
    config = greedy_config(model, max_new_tokens)
    # Tree decoding has its own cache.
    config.update(cache_implementation=None, return_dict_in_generate=False)
    criteria = StoppingCriteriaList()
    if config.stop_strings:
        # generate does not pass its tokenizer on to a custom decoding function, so the criterion is built here.
        criteria.append(StopStringCriteria(tokenizer_of(processor), config.stop_strings))
        config.update(stop_strings=None)
    # generate takes unset fields from the model's own config, so it gets a shallow copy of the model with this config.
    twin = copy.copy(model)
    twin.generation_config = config
    prepared = names.prepared_by_generate(twin, inputs, criteria)
    positions = prepared.positions
    if (positions is None or positions.ndim == 2) and names.position_modules(model):
        # The Omni models of transformers 5.12 drop those of `generate` and number the tokens in their forward.
        positions = _of_decoder(model, inputs).get("position_ids", positions)
    if positions is None:
        positions = torch.arange(inputs["input_ids"].shape[1], device=inputs["input_ids"].device)[None]
    if positions.ndim == 2:
        positions = positions[None]
    return Generation(positions, prepared.processors, prepared.criteria)


class _Reached(Exception):
    """Ends a forward at its text decoder, with the arguments that this was given."""


def masks_by_generate(model: Any, inputs: Mapping[str, Any]) -> Any:
    """The mask argument with which `generate` would call the text decoder for a prompt; no layer runs."""
    return _of_decoder(model, inputs).get("attention_mask")


def _of_decoder(model: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments with which `generate` would call the text decoder for a prompt; no layer runs."""

    def end(_decoder: Any, _args: Any, given: dict[str, Any]) -> None:
        raise _Reached(given)

    twin = copy.copy(model)
    twin.generation_config = greedy_config(model, 1)
    twin.generation_config.update(cache_implementation=None, stop_strings=None)
    hook = text_backbone(model).register_forward_pre_hook(end, with_kwargs=True)
    try:
        with preserved_positions(model):
            twin.generate(**inputs)
    except _Reached as reached:
        given: dict[str, Any] = reached.args[0]
        return given
    finally:
        hook.remove()
    raise ValueError("its text decoder was not called")


@contextmanager
def preserved_positions(model: Any) -> Iterator[None]:
    """Restores the position offsets that some models (Qwen-VL) store of their last prompt: a caller may use them."""
    saved = names.position_modules(model)
    try:
        yield
    finally:
        names.restore_positions(saved)
