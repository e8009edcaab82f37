"""The tensors of a record: all that a forward writes to and that outlives it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from carve_kernels.maps import UNCAPTURED, Hidden, new_buffers
from carve_kernels.types import Capture


class DeviceState:
    """Allocated before a forward, never inside of one: no memory pool of a CUDA graph holds them.

    ============  =======  ==========  ==============================================================================
    name          dtype    shape       meaning
    ============  =======  ==========  ==============================================================================
    columns       int32    [4 + B N]   `span` [2], the lowest and the highest visual token; `tokens` [B, N], all
    counts        int64    [4]         `total`, the tokens after the current step; `slot`, where `later` takes maps
    first         float32              maps of the prefill, [1, L, B, Q, N]
    later         float32              maps of the steps, [T + 1, L, B, 1, N]; the last is for what is beyond T
    fed           int64    [B, T + 1]  the token fed at each step, -1 where it is unknown
    hidden        bool                 tokens that the rows of `first` cannot attend to, [1, L, B, Q, N]
    hidden_later  bool                 the same of `later`, [T + 1, L, B, 1, N]; None where no layer loses any in a step
    deferred      bool     []          conditions that are read at the end only, by name
    zero          int64    []          the slot of the prefill
    row           int64    [B, 1]      the captured row of a step
    ============  =======  ==========  ==============================================================================

    `calls` is the CaptureCalls with the scratch. A step that follows the one before changes `counts` by one operator;
    `_host` is what `counts` was last set to. The parts of `columns` and `counts` start at multiples of 16 bytes, since
    compilers copy inputs that do not.
    """

    def __init__(self, calls: Any, tokens: torch.Tensor, layers: int, rows: int, conditions: Iterable[str]) -> None:
        batch, count = tokens.shape
        self.calls, self.device = calls, tokens.device
        # A tensor made in inference mode could not be written outside of it.
        with torch.inference_mode(False), torch.no_grad():
            self.columns = torch.zeros(4 + batch * count, dtype=torch.int32, device=self.device)
            self.tokens, self.span = self.split(self.columns, batch)
            self.counts = torch.zeros(4, dtype=torch.int64, device=self.device)
            self.total, self.slot, self.slots = self.counts[0], self.counts[2], self.counts[2:3]
            self.zero, self.one = (torch.full((), each, dtype=torch.int64, device=self.device) for each in (0, 1))
            self.row = torch.zeros(batch, 1, dtype=torch.int64, device=self.device)
            self.first = new_buffers((1, layers, batch, rows), count, self.device)
            self.hidden = torch.zeros(1, layers, batch, rows, count, dtype=torch.bool, device=self.device)
            self.deferred = {name: torch.zeros((), dtype=torch.bool, device=self.device) for name in conditions}
            self.fed = torch.empty(batch, 0, dtype=torch.int64, device=self.device)
        self.later: Capture | None = None
        self.hidden_later: torch.Tensor | None = None
        self.steps = 0
        # Whether a CUDA graph writes here: then only the device knows how many steps there were.
        self.graphed = False
        self._host: tuple[int, int] | None = None
        self._row = 0

    @staticmethod
    def split(columns: torch.Tensor, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The tokens [B, N] and their span [2] in `columns`."""
        span, _, tokens = columns.split_with_sizes([2, 2, columns.shape[0] - 4])
        return tokens.view(batch, -1), span

    def fits(self, tokens: torch.Tensor, rows: int, steps: int) -> bool:
        """Whether another prompt with these tokens, captured rows and steps has tensors of the same shapes."""
        expected = self.tokens.shape, self.device, self.first.mass.shape[3], self.steps
        return expected == (tokens.shape, tokens.device, rows, steps)

    def start(self, tokens: torch.Tensor, total: int) -> None:
        """Begin with a prompt of `total` tokens."""
        used = tokens[tokens >= 0]
        ends = used.aminmax() if used.numel() else (tokens.new_zeros(()), tokens.new_full((), -1))
        with torch.inference_mode(False), torch.no_grad():
            self.span.copy_(torch.stack(tuple(ends)))
            self.tokens.copy_(tokens)
            self._host = None
            self.move(total, -1)
            self.select(0)
            self.first.mass.fill_(UNCAPTURED)
            if self.later is not None:
                self.later.mass.fill_(UNCAPTURED)
                self.fed.fill_(-1)
            for condition in self.deferred.values():
                condition.zero_()

    def move(self, total: int, slot: int) -> None:
        """Set `counts`, by one operator where both are one more than they were."""
        if self._host == (total - 1, slot - 1):
            self.counts.add_(self.one)
        elif self._host != (total, slot):
            self.total.fill_(total)
            self.slot.fill_(slot)
        self._host = total, slot

    def select(self, row: int) -> None:
        """Set the captured row of a step; without a cache it is another one at each step."""
        if row != self._row:
            self.row.fill_(row)
            self._row = row

    def move_in_graph(self) -> None:
        """The next step, at each replay of a CUDA graph; those beyond `later` share its last slot."""
        self.graphed = True
        self.counts.add_(self.one)
        self.slot.clamp_max_(self.steps)

    @property
    def total_so_far(self) -> int | None:
        """The tokens so far, without the replays since they were last read."""
        return None if self._host is None else self._host[0]

    def read(self) -> int:
        """The tokens so far, read from the device: the replays of a graph count there."""
        total, _, slot, _ = self.counts.tolist()
        self._host = total, slot
        return int(total)

    def hide(self, tokens: torch.Tensor, first: int, count: int, decoding: bool) -> None:
        """Note the tokens [B, R, N] that rows do not see in `count` layers from the index `first` on."""
        target, slot = (self.hidden_later, self.slots) if decoding else (self.hidden, self.zero[None])
        if target is None:
            target = self.follow_hidden()
        target[:, first : first + count].index_copy_(0, slot, tokens.expand(1, count, *tokens.shape))

    def follow_hidden(self) -> torch.Tensor:
        """Note the hidden tokens of steps from now on: until a step has, they are those of the prefill's last row."""
        later = self.hidden_later
        with torch.inference_mode(False), torch.no_grad():
            if later is None or later.shape[0] != self.steps + 1:
                shape = self.steps + 1, *self.hidden.shape[1:3], 1, self.hidden.shape[4]
                later = self.hidden_later = torch.empty(shape, dtype=torch.bool, device=self.device)
            later.copy_(self.hidden[:, :, :, -1:])
        return later

    def hidden_tokens(self, steps: int) -> Hidden:
        """The hidden tokens of the prefill and of `steps` steps."""
        first = self.hidden[0].clone()
        if not steps:
            return Hidden(first, None)
        if self.hidden_later is None:
            return Hidden(first, self.hidden[:, :, :, -1].expand(steps, -1, -1, -1))
        return Hidden(first, self.hidden_later[:steps, :, :, 0])

    def grow(self, steps: int) -> None:
        """Allocate `later`, `fed` and `hidden_later` for more steps, and keep what they hold."""
        (batch, count), layers = self.tokens.shape, self.first.mass.shape[1]
        with torch.inference_mode(False), torch.no_grad():
            later = new_buffers((steps + 1, layers, batch, 1), count, self.device)
            fed = torch.full((batch, steps + 1), -1, dtype=torch.int64, device=self.device)
            if self.later is not None:
                for target, values in zip(later, self.later, strict=True):
                    target[: self.steps] = values[: self.steps]
                fed[:, : self.steps] = self.fed[:, : self.steps]
        before, hidden = self.steps, self.hidden_later
        self.later, self.fed, self.steps = later, fed, steps
        if hidden is not None:
            self.follow_hidden()[:before] = hidden[:before]
