"""What a user should know of a result that is no error: what the model did not read, or did not say."""

from __future__ import annotations

from typing import Any

from carve_kernels.hf.engine.result import CarveResult
from carve_kernels.models import small


def notes_of(result: CarveResult, model: Any, processor: Any) -> list[str]:
    """A sentence for each, without a full stop."""
    found = []
    tokens = processor.tokenizer.tokenize(result.question)
    unknown = tokens.count(processor.tokenizer.unk_token) if tokens else 0
    if not tokens:
        found.append("the model's tokenizer reads nothing in the question")
    elif unknown:
        found.append(f"the model's tokenizer does not know {unknown} of the {len(tokens)} tokens of the question")
    silent = [which for which, answer in _answers(result).items() if not answer.strip()]
    if silent:
        found.append(f"the model gave no words in its {' and its '.join(silent)} answer")
    if (not tokens or unknown or silent) and model.name_or_path == str(small()):
        found.append("the embedded model, small, knows questions such as 'what digit is red' alone")
    return found


def percent(share: float) -> str:
    """A share that is more than nothing and less than everything never reads as either."""
    if 0 < share < 0.005:
        return "less than 1%"
    return f"{min(share, 0.99) if share < 1 else share:.0%}"


def _answers(result: CarveResult) -> dict[str, str]:
    return {"plain": result.answer, "refined": result.refined_answer}
