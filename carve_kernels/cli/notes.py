"""Notes on a result that is not an error: what the model could not read, or did not answer."""

from __future__ import annotations

from typing import Any

from carve_kernels.hf.engine.result import CarveResult
from carve_kernels.models import small


def notes_of(result: CarveResult, model: Any, processor: Any) -> list[str]:
    """A sentence for each note, without a full stop."""
    notes = []
    tokens = processor.tokenizer.tokenize(result.question)
    unknown = tokens.count(processor.tokenizer.unk_token) if tokens else 0
    if not tokens:
        notes.append("the model's tokenizer finds no tokens in the question")
    elif unknown:
        notes.append(f"the model's tokenizer does not know {unknown} of the {len(tokens)} tokens of the question")
    silent = [which for which, answer in _answers(result).items() if not answer.strip()]
    if silent:
        notes.append(f"the model returned no text in its {' and its '.join(silent)} answer")
    if (not tokens or unknown or silent) and model.name_or_path == str(small()):
        notes.append("the embedded model, small, only knows questions such as 'what digit is red'")
    return notes


def percent(share: float) -> str:
    """A share as text; one that is more than 0 and less than 1 is never rounded to either."""
    if 0 < share < 0.005:
        return "less than 1%"
    return f"{min(share, 0.99) if share < 1 else share:.0%}"


def _answers(result: CarveResult) -> dict[str, str]:
    return {"plain": result.answer, "refined": result.refined_answer}
