"""The two stages of the recipe.

Stage 1 classifies the projected patches against the language model's own embeddings of digit and colour words; without
it question answering stays at chance. Stage 2 answers packed questions and lists the scene; stage
1's loss stays with a lower weight.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from batches import COLOUR_IDS, DIGIT_IDS, IGNORE, NOTHING, Batch, Sampler
from forward import GENERAL_WIDTH, SUFFIX, Runner, patch_logits
from model import ID
from torch import Tensor
from torch.nn import functional as F

BATCH = 32
PAIR_EVERY = 8
SAVE_SECONDS = 120
WARM_UP = 0.02


@dataclass
class State:
    """The progress in a checkpoint, besides weights and optimizer."""

    stage: int = 1
    seconds: float = 0.0
    step: int = 0


def patch_loss(runner: Runner, patches: Tensor, batch: Batch) -> tuple[Tensor, float]:
    """Digit, colour and background loss of the patches, and the share of digit patches whose digit is right."""
    digits = patch_logits(runner, patches, [*DIGIT_IDS, ID["nothing"]]).float().flatten(0, 1)
    colours = patch_logits(runner, patches, COLOUR_IDS).float().flatten(0, 1)
    digit, colour = batch.patch_digit.flatten(), batch.patch_colour.flatten()
    on, off = (digit >= 0) & (digit < NOTHING), digit == NOTHING
    loss = F.cross_entropy(digits[on], digit[on]) + 0.5 * F.cross_entropy(colours[on], colour[on])
    right = (digits[on].argmax(-1) == digit[on]).float().mean().item()
    return loss + 0.5 * F.cross_entropy(digits[off], digit[off]), right


def answer_loss(logits: Tensor, batch: Batch) -> tuple[Tensor, float]:
    """Loss of the answers and, at a lower weight, of the general list; and the share of answers that are right."""
    question, listing = logits.float().split([SUFFIX - GENERAL_WIDTH, GENERAL_WIDTH], 1)
    answer, listed = batch.target.split([SUFFIX - GENERAL_WIDTH, GENERAL_WIDTH], 1)
    is_answer = (answer != IGNORE) & (answer != ID["<eos>"])
    right = (question.argmax(-1) == answer)[is_answer].float().mean().item()
    loss = F.cross_entropy(question.flatten(0, 1), answer.flatten(), ignore_index=IGNORE)
    return loss + 0.3 * F.cross_entropy(listing.flatten(0, 1), listed.flatten(), ignore_index=IGNORE), right


def rate(progress: float, peak: float) -> float:
    """Learning rate: a short warm-up, then a cosine to a fiftieth."""
    if progress < WARM_UP:
        return peak * (0.05 + 0.95 * progress / WARM_UP)
    turn = (progress - WARM_UP) / (1 - WARM_UP)
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, turn))))


def save(path: Path, model: Any, optimizer: torch.optim.Optimizer, state: State) -> None:
    """Write a checkpoint so that an interruption leaves the old one or the new one."""
    partial = path.with_suffix(".part")
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "state": state.__dict__}, partial)
    os.replace(partial, path)


def load(path: Path, model: Any, optimizer: torch.optim.Optimizer) -> State:
    """Restore a checkpoint, or start."""
    if not path.exists():
        return State()
    stored = torch.load(path, weights_only=True)
    model.load_state_dict(stored["model"])
    optimizer.load_state_dict(stored["optimizer"])
    return State(**stored["state"])


def make_optimizer(model: Any) -> torch.optim.Optimizer:
    """AdamW, with weight decay on the matrices only."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.02}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=True)


def _step(runner: Runner, sampler: Sampler, stage: int, number: int, size: int) -> tuple[Tensor, float, float]:
    """Loss, share of patches right and share of answers right of one batch."""
    images = 2 if stage == 2 and number % PAIR_EVERY == PAIR_EVERY - 1 else 1
    batch = sampler.batch(size // images, images)
    with torch.autocast("cpu", torch.bfloat16):
        patches = runner.encode(batch.pixels.flatten(0, 1))
        loss, patch_right = patch_loss(runner, patches, batch)
        if stage == 1:
            return loss, patch_right, 0.0
        logits = runner.answer(patches.reshape(len(batch.suffix), -1, patches.shape[-1]), batch.suffix)
        answered, answer_right = answer_loss(logits, batch)
    return answered + 0.3 * loss, patch_right, answer_right


def run_stage(
    stage: int,
    model: Any,
    runner: Runner,
    sampler: Sampler,
    optimizer: torch.optim.Optimizer,
    state: State,
    *,
    minutes: float,
    peak: float,
    batch: int,
    checkpoint: Path,
    on_step: Callable[[float, str], None],
) -> None:
    """Train one stage for its minutes, also across interruptions."""
    start, saved, patch_mean, answer_mean = time.monotonic() - state.seconds, time.monotonic(), 0.0, 0.0
    while state.seconds < minutes * 60:
        for group in optimizer.param_groups:
            group["lr"] = rate(state.seconds / (minutes * 60), peak)
        loss, patch_right, answer_right = _step(runner, sampler, stage, state.step, batch)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        state.step += 1
        state.seconds = time.monotonic() - start
        patch_mean += 0.02 * (patch_right - patch_mean)
        answer_mean += 0.02 * (answer_right - answer_mean)
        if state.step % 100 == 0:
            row = {"stage": stage, "step": state.step, "seconds": round(state.seconds), "loss": round(loss.item(), 4)}
            row |= {"patches": round(patch_mean, 4), "answers": round(answer_mean, 4)}
            with checkpoint.with_name("log.jsonl").open("a") as file:
                file.write(json.dumps(row) + "\n")
        on_step(state.seconds, f"patches {patch_mean:.3f} answers {answer_mean:.3f} loss {loss.item():.3f}")
        if time.monotonic() - saved > SAVE_SECONDS:
            save(checkpoint, model, optimizer, state)
            saved = time.monotonic()
    state.stage, state.seconds = stage + 1, 0.0
    save(checkpoint, model, optimizer, state)
