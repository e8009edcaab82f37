"""Many prompts looked at together: each picture is read once, and all answers grow by one token in one forward.

The prompts of one picture are branches of a tree: they share a prefix up to (at least) the last picture, and everything
behind it is each one's own. A forward is one row that holds the next tokens of all branches of all pictures (row.py),
so the model's weights are read once for all of them; a branch that has ended is in no row any more.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch

from carve_kernels.hf.decoding.generation import Decision, decide, positions_kept
from carve_kernels.hf.decoding.prefix_cache import Prefix, common
from carve_kernels.hf.decoding.token_tree import Part, Tree
from carve_kernels.hf.decoding.tree_attention import Row, Unshareable
from carve_kernels.hf.decoding.tree_capture import maps_of
from carve_kernels.hf.image_features import Shown
from carve_kernels.hf.model import unwrap
from carve_kernels.hf.query_rows import Rows, RowsSpec, resolve_rows
from carve_kernels.maps import AttentionMaps
from carve_kernels.types import Capture, VisualLayout

_NONE = torch.empty(0, dtype=torch.int64)
_OPENING = threading.Lock()
_LOCKS: WeakKeyDictionary[Any, threading.RLock] = WeakKeyDictionary()


@contextmanager
def alone(model: Any) -> Iterator[None]:
    """Other threads that want this model to themselves wait until the block is left."""
    with _OPENING:
        lock = _LOCKS.setdefault(unwrap(model), threading.RLock())
    with lock:
        yield


@contextmanager
def at_work(model: Any) -> Iterator[None]:
    """Forwards of `Joint` run in here: alone, without gradients, and what is noted of positions is put back.

    Not in inference mode either: keys are kept for calls that may be out of it, and written to then.
    """
    with alone(model), torch.inference_mode(False), torch.no_grad(), positions_kept(unwrap(model)):
        yield


@dataclass
class Branch:
    """One prompt: what the processor made of it, which rows are captured, how many words are wanted.

    Without words the forward ends behind the last captured layer. `pictures` is what the model takes for the image
    tokens behind the prefix, if there are any.
    """

    inputs: Mapping[str, Any]
    words: int
    rows: RowsSpec | None = None
    pictures: Shown | None = None


@dataclass
class Look:
    """The prompts that begin with one picture: the first `start` columns are the same in all of them.

    `pictures` is what the model takes for the image tokens there. `prefix` may hold what was read of them before;
    afterwards it holds what has been read. `whole` has the prefix read by all layers, whether words are wanted or not.
    """

    branches: Sequence[Branch]
    start: int
    pictures: Shown
    layout: VisualLayout | None = None
    prefix: Prefix | None = None
    whole: bool = False


@dataclass
class Outcome:
    """The new tokens of a branch, its maps, and how many tokens were forwarded for it alone."""

    ids: tuple[int, ...]
    maps: AttentionMaps | None
    tokens: int


@dataclass
class _Growing:
    """A branch on its way."""

    branch: Branch
    decision: Decision
    ids: torch.Tensor
    rows: Rows | None
    number: int
    position: torch.Tensor
    captures: list[Capture] = field(default_factory=list)
    tokens: int = 0

    def __post_init__(self) -> None:
        self.prompt = self.ids.shape[1]
        self.done = self.branch.words == 0

    def captured(self, start: int) -> torch.Tensor:
        """The columns of its prompt that the next forward captures, counted from column `start`."""
        if self.rows is None:
            return _NONE
        if not self.captures:
            return self.rows.columns[0] - start
        return torch.zeros(int(self.rows.last), dtype=torch.int64)


class _Picture:
    """One look on its way: its tree, and its branches."""

    def __init__(self, look: Look, growing: list[_Growing], length: int) -> None:
        self.look, self.growing = look, growing
        self.unread = look.prefix is None
        if look.prefix is not None:
            look.prefix.cut(length)
        else:
            look.prefix = Prefix(growing[0].ids[0, :length].cpu())
        suffixes = sum(each.prompt - length + max(0, each.branch.words - 1) for each in growing)
        self.tree = Tree(look.prefix, length + suffixes)
        self.tokens = _NONE[None].int() if look.layout is None else look.layout.tokens()

    def part(self, start: int, batch: list[tuple[_Growing, int]], fresh: int = 0) -> Part:
        """The next tokens of some branches, (branch, how many), behind `fresh` tokens of the prefix."""
        past = 0 if fresh else len(self.tree)
        end, rows = start + fresh, []
        for each, count in batch:
            rows.append(each.captured(each.ids.shape[1] - count) + end - start)
            self.tree.grow(each.number, count)
            each.tokens += count
            end += count
        return Part(self.tree, start, end, past, fresh, torch.cat([_NONE, *rows]), self.tokens)


class Joint:
    """Looks through one model; `layers` are captured by the room `backend`."""

    def __init__(self, model: Any, processor: Any, layers: tuple[int, ...], backend: str) -> None:
        self._model, self._processor, self._layers = model, processor, tuple(sorted(layers))
        self._row = Row(model, self._layers, backend)

    def run(self, looks: Sequence[Look]) -> list[list[Outcome]]:
        """The outcome of each branch of each look. Raises Unshareable where a prompt or the model forbids it."""
        pictures = [self._picture(look) for look in looks]
        with self._row.installed():
            for picture in pictures:
                self._read(picture)
            while any(not each.done for picture in pictures for each in picture.growing):
                self._step(pictures)
        return [[self._outcome(picture, each) for each in picture.growing] for picture in pictures]

    def _picture(self, look: Look) -> _Picture:
        growing, bounds = [], []
        for number, branch in enumerate(look.branches):
            ids = branch.inputs["input_ids"]
            decision = decide(self._model, self._processor, branch.inputs, max(1, branch.words))
            rows = None
            if branch.rows is not None and look.layout is not None:
                attended = torch.ones(ids.shape, dtype=torch.bool)
                rows = resolve_rows(branch.rows, ids.cpu(), attended, look.layout.tokens(), self._processor)
                bounds.append(int(rows.columns.min()))
            growing.append(_Growing(branch, decision, ids, rows, number, decision.positions[..., -1:]))
        first = growing[0].ids[0].cpu()
        others = [each.ids[0].cpu() for each in growing]
        length = min(*(common(first, other) for other in others), *(len(other) - 1 for other in others), *bounds)
        if length < look.start:
            raise Unshareable("a prompt has nothing behind its picture, or rows that are captured before the end of it")
        if look.prefix is not None:
            kept = min(length, common(look.prefix.ids, first))
            if kept >= look.start and look.prefix.depth >= self._needed(look):
                length = kept
            else:
                look.prefix = None
        return _Picture(look, growing, length)

    def _needed(self, look: Look) -> int:
        """How many layers must read the prefix."""
        if look.whole or any(branch.words for branch in look.branches):
            return self._row.depth
        return self._layers[-1] + 1

    def _read(self, picture: _Picture) -> None:
        """The prefix, where it has not been read, and the rest of each prompt."""
        look = picture.look
        silent = [each for each in picture.growing if not each.branch.words]
        pictured = [each for each in picture.growing if each.branch.words and each.branch.pictures]
        others = [each for each in picture.growing if each.branch.words and not each.branch.pictures]
        if others or (picture.unread and (look.whole or pictured)):
            self._prefill(picture, others)
        for each in pictured:
            self._prefill(picture, [each])
        if silent:
            self._prefill(picture, silent, self._layers[-1] + 1)

    def _prefill(self, picture: _Picture, batch: list[_Growing], depth: int | None = None) -> None:
        length = len(picture.tree.prefix)
        first = picture.growing[0]
        ids, positions, shown = [], [], None
        fresh = length if picture.unread else 0
        if fresh:
            ids.append(first.ids[:, :length])
            positions.append(first.decision.positions[..., :length])
            shown = picture.look.pictures
        for each in batch:
            ids.append(each.ids[:, length:])
            positions.append(each.decision.positions[..., length:])
            shown = each.branch.pictures or shown
        part = picture.part(0, [(each, each.prompt - length) for each in batch], fresh)
        ends = [fresh - 1 + sum(each.prompt - length for each in batch[: index + 1]) for index in range(len(batch))]
        given = {} if shown is None else shown.taken(self._model)
        logits = self._row.forward(
            torch.cat(ids, 1), torch.cat(positions, -1), [part], logits=ends, depth=depth, pictures=given
        )
        picture.unread = False
        self._keep([part], [batch])
        if depth is None:
            self._choose(batch, logits)
        else:
            picture.tree.shrink(part.past + fresh)

    def _step(self, pictures: list[_Picture]) -> None:
        """One new token for every branch that is not done."""
        parts, batches, start = [], [], 0
        for picture in pictures:
            batch = [each for each in picture.growing if not each.done]
            if batch:
                parts.append(picture.part(start, [(each, 1) for each in batch]))
                batches.append(batch)
                start = parts[-1].stop
        running = [each for batch in batches for each in batch]
        ids = torch.cat([each.ids[:, -1:] for each in running], 1)
        positions = torch.cat([each.position for each in running], -1)
        logits = self._row.forward(ids, positions, parts, logits=list(range(start)))
        self._keep(parts, batches)
        self._choose(running, logits)

    def _keep(self, parts: list[Part], batches: list[list[_Growing]]) -> None:
        """Hand each branch its rows of what a forward has captured."""
        for part, batch in zip(parts, batches, strict=True):
            if part.taken is None:
                continue
            start = 0
            for each in batch:
                stop = start + len(each.captured(0))
                if stop > start:
                    each.captures.append(Capture(*(values[:, start:stop] for values in part.taken)))
                start = stop

    def _choose(self, batch: list[_Growing], logits: torch.Tensor) -> None:
        for each, scores in zip(batch, logits, strict=True):
            each.ids, each.done = each.decision.next(each.ids, scores)
            each.position = each.position + 1

    def _outcome(self, picture: _Picture, each: _Growing) -> Outcome:
        maps = None
        layout = picture.look.layout
        if each.rows is not None and layout is not None:
            tokens = picture.tokens.to(each.captures[0].maps.device)
            maps = maps_of(each.captures, each.rows, tokens, self._layers, self._row.dtype, layout)
        return Outcome(tuple(each.ids[0, each.prompt :].tolist()), maps, each.tokens)
