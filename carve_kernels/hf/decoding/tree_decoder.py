"""Tree decoding: prompts that share an image prefix decode greedily in one batch; the prefix is prefilled once.

The prompts of a group are branches of a tree: they share a prefix up to (at least) the last token of the image. One
packed forward (tree_attention.py) takes the next tokens of all branches of all groups, so the weights are read once for
all of them. Finished branches take no part in later forwards.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from carve_kernels.hf.decoding.blocks import MasksUnknown, PromptBlocks, blocks_of, common_kinds, whole_blocks
from carve_kernels.hf.decoding.generation import Generation, prepare_generation
from carve_kernels.hf.decoding.prefix_cache import PREFIX, PrefixCache, Segment, TokenTree, common_length
from carve_kernels.hf.decoding.prompt_groups import Branch, Decoded, PromptGroup
from carve_kernels.hf.decoding.tree_attention import TreeAttention, TreeUnsupported
from carve_kernels.hf.query_rows import Rows, resolve_rows
from carve_kernels.maps import Hidden, assemble
from carve_kernels.types import Capture

_NO_ROWS = torch.empty(0, dtype=torch.int64)


@dataclass
class _BranchState:
    """A branch while it is decoded."""

    source: Branch
    generation: Generation
    ids: torch.Tensor
    rows: Rows | None
    branch_id: int
    position: torch.Tensor
    blocks: torch.Tensor
    captures: list[Capture] = field(default_factory=list)
    hidden: list[torch.Tensor] = field(default_factory=list)
    tokens: int = 0

    def __post_init__(self) -> None:
        self.prompt_length = self.ids.shape[1]
        self.done = self.source.max_new_tokens == 0

    def captured_rows(self, start: int) -> torch.Tensor:
        """The columns of its prompt that the next forward captures, counted from column `start`."""
        if self.rows is None:
            return _NO_ROWS
        if not self.captures:
            return self.rows.columns[0] - start
        return torch.zeros(int(self.rows.last), dtype=torch.int64)


class _GroupState:
    """A group while it is decoded: its tree and its branches."""

    def __init__(self, group: PromptGroup, branches: list[_BranchState], length: int) -> None:
        self.group, self.branches = group, branches
        self.needs_prefill = group.prefix is None
        if group.prefix is not None:
            group.prefix.truncate(length)
        else:
            group.prefix = PrefixCache(branches[0].ids[0, :length].cpu())
            group.prefix.blocks = branches[0].blocks[:length]
        suffixes = sum(state.prompt_length - length + max(0, state.source.max_new_tokens - 1) for state in branches)
        self.tree = TokenTree(group.prefix, length + suffixes)
        self.tokens = _NO_ROWS[None].int() if group.layout is None else group.layout.tokens()

    def segment(self, start: int, batch: list[tuple[_BranchState, int]], fresh: int = 0) -> Segment:
        """The next tokens of some branches, (branch, count), after `fresh` tokens of the prefix."""
        past = 0 if fresh else len(self.tree)
        end, rows = start + fresh, []
        runs = [(PREFIX, start, end)] if fresh else []
        for state, count in batch:
            first = state.ids.shape[1] - count
            rows.append(state.captured_rows(first) + end - start)
            self.tree.append(state.branch_id, count, None if first >= state.prompt_length else state.blocks[first:])
            state.tokens += count
            runs.append((state.branch_id, end, end + count))
            end += count
        return Segment(self.tree, start, end, past, fresh, torch.cat([_NO_ROWS, *rows]), self.tokens, runs)


class TreeDecoder:
    """Tree decoding on one model; `layers` are captured by the backend `backend`."""

    def __init__(self, model: Any, processor: Any, layers: tuple[int, ...], backend: str) -> None:
        self._model, self._processor, self._layers = model, processor, tuple(sorted(layers))
        self._attention = TreeAttention(model, self._layers, backend)

    def decode(self, groups: Sequence[PromptGroup]) -> list[Decoded]:
        """Decode each branch of each group. Raises TreeUnsupported if a prompt or the model rules it out."""
        try:
            prompts = [[blocks_of(self._model, branch.inputs) for branch in group.branches] for group in groups]
            self._attention.blocks = common_kinds([blocks for group in prompts for blocks in group])
        except MasksUnknown as error:
            raise TreeUnsupported(str(error)) from error
        states = [self._start(group, blocks) for group, blocks in zip(groups, prompts, strict=True)]
        with self._attention.installed():
            for state in states:
                for batch, depth in self._prefill_batches(state):
                    self._prefill(state, batch, depth)
            while any(not branch.done for state in states for branch in state.branches):
                self._step(states)
        return [self._finish(state, branch) for state in states for branch in state.branches]

    def _start(self, group: PromptGroup, blocks: list[PromptBlocks]) -> _GroupState:
        branches, bounds = [], []
        for branch_id, branch in enumerate(group.branches):
            ids = branch.inputs["input_ids"]
            generation = prepare_generation(self._model, self._processor, branch.inputs, max(1, branch.max_new_tokens))
            rows = None
            if branch.rows is not None and group.layout is not None:
                attended = torch.ones(ids.shape, dtype=torch.bool)
                rows = resolve_rows(branch.rows, ids.cpu(), attended, group.layout.tokens(), self._processor)
                bounds.append(int(rows.columns.min()))
            position = generation.positions[..., -1:]
            branches.append(_BranchState(branch, generation, ids, rows, branch_id, position, blocks[branch_id].ids))
        prompts = [state.ids[0].cpu() for state in branches]
        length = min(*(common_length(prompts[0], ids) for ids in prompts), *(len(ids) - 1 for ids in prompts), *bounds)
        if length < group.start:
            raise TreeUnsupported("no text follows the image tokens, or rows are captured before their end")
        blocks_of_all = [state.blocks for state in branches]
        # States are those after a token, and the prompts to come share the image at least.
        length = _whole_blocks(blocks_of_all, group.start if self._attention.keeps_states else length)
        if group.prefix is not None:
            cached = min(length, common_length(group.prefix.ids, prompts[0]))
            cached = _whole_blocks([branches[0].blocks, group.prefix.blocks], cached)
            if self._attention.keeps_states and len(group.prefix) != length:
                cached = -1
            if cached >= group.start and group.prefix.depth >= self._depth(group):
                length = cached
            else:
                group.prefix = None
        if group.prefix is None and any(branch.later_images for branch in group.branches):
            # The prefix has no later images.
            length = _whole_blocks(blocks_of_all, group.start)
        if length < group.start:
            raise TreeUnsupported("tokens up to the end of its image attend to later ones")
        return _GroupState(group, branches, length)

    def _depth(self, group: PromptGroup) -> int:
        """How many layers must read the prefix."""
        if group.all_layers or any(branch.max_new_tokens for branch in group.branches):
            return self._attention.depth
        return self._layers[-1] + 1

    def _prefill_batches(self, state: _GroupState) -> Iterator[tuple[list[_BranchState], int | None]]:
        """The prefill forwards, as (branches, depth); the first one also processes the prefix unless it is cached."""
        captured_only = [branch for branch in state.branches if branch.done]
        with_images = [branch for branch in state.branches if not branch.done and branch.source.later_images]
        text_only = [branch for branch in state.branches if not branch.done and not branch.source.later_images]
        if text_only or (state.needs_prefill and (state.group.all_layers or with_images)):
            yield text_only, None
        for branch in with_images:
            yield [branch], None
        if captured_only:
            yield captured_only, self._layers[-1] + 1

    def _prefill(self, state: _GroupState, batch: list[_BranchState], depth: int | None) -> None:
        length = len(state.tree.prefix)
        first, fresh = state.branches[0], length if state.needs_prefill else 0
        ids, positions, images = [], [], None
        if fresh:
            ids.append(first.ids[:, :length])
            positions.append(first.generation.positions[..., :length])
            images = state.group.images
        for branch in batch:
            ids.append(branch.ids[:, length:])
            positions.append(branch.generation.positions[..., length:])
            images = branch.source.later_images or images
        segment = state.segment(0, [(branch, branch.prompt_length - length) for branch in batch], fresh)
        counts = torch.tensor([branch.prompt_length - length for branch in batch], dtype=torch.int64)
        logits = self._attention.forward(
            torch.cat(ids, 1),
            torch.cat(positions, -1),
            [segment],
            logits=(fresh - 1 + counts.cumsum(0)).tolist(),
            depth=depth,
            features={} if images is None else images.for_model(self._model),
        )
        state.needs_prefill = False
        self._collect([segment], [batch])
        if depth is None:
            self._choose(batch, logits)
        else:
            state.tree.truncate(segment.past + fresh)

    def _step(self, states: list[_GroupState]) -> None:
        """One new token for every branch that is not done."""
        segments, batches, start = [], [], 0
        for state in states:
            batch = [branch for branch in state.branches if not branch.done]
            if batch:
                segments.append(state.segment(start, [(branch, 1) for branch in batch]))
                batches.append(batch)
                start = segments[-1].stop
        running = [branch for batch in batches for branch in batch]
        ids = torch.cat([branch.ids[:, -1:] for branch in running], 1)
        positions = torch.cat([branch.position for branch in running], -1)
        logits = self._attention.forward(ids, positions, segments, logits=list(range(start)))
        self._collect(segments, batches)
        self._choose(running, logits)

    @staticmethod
    def _collect(segments: list[Segment], batches: list[list[_BranchState]]) -> None:
        """Split the captures of a forward among its branches."""
        for segment, batch in zip(segments, batches, strict=True):
            if segment.captured is None or segment.hidden is None:
                continue
            start = 0
            for branch in batch:
                stop = start + len(branch.captured_rows(0))
                if stop > start:
                    branch.captures.append(Capture(*(values[:, start:stop] for values in segment.captured)))
                    branch.hidden.append(segment.hidden[:, start:stop])
                start = stop

    @staticmethod
    def _choose(batch: list[_BranchState], logits: torch.Tensor) -> None:
        for branch, scores in zip(batch, logits, strict=True):
            branch.ids, branch.done = branch.generation.next(branch.ids, scores)
            branch.position = branch.position + 1

    def _finish(self, state: _GroupState, branch: _BranchState) -> Decoded:
        ids, layout = tuple(branch.ids[0, branch.prompt_length :].tolist()), state.group.layout
        if branch.rows is None or layout is None:
            return Decoded(ids, None, branch.tokens)
        first, *later = branch.captures
        device = first.maps.device
        hidden_later = torch.stack([each[:, None, 0] for each in branch.hidden[1:]]).to(device) if later else None
        maps = assemble(
            Capture(*(buffer[:, None] for buffer in first)),
            Capture(*map(torch.stack, zip(*later, strict=True))) if later else None,
            torch.ones(1, len(branch.captures), dtype=torch.bool, device=device),
            branch.rows.weight,
            layers=self._layers,
            tokens=state.tokens.to(device),
            dtype=self._attention.dtype,
            layout=layout,
            hidden=Hidden(branch.hidden[0][:, None].to(device), hidden_later),
        )
        return Decoded(ids, maps, branch.tokens)


def _whole_blocks(prompts: list[torch.Tensor], length: int) -> int:
    """The largest length, at most `length`, up to which the blocks of prompts are the same and whole."""
    same = min(common_length(prompts[0], blocks) for blocks in (*prompts, prompts[0][:length]))
    return whole_blocks(prompts[0], same)
