"""Inputs and outputs of capturing several layers in one call, and the calls of the package."""

from __future__ import annotations

import torch

from benchmarks.support.answers import WrongAnswer, check_maps, check_truth
from benchmarks.support.cases import Case, Problem, problem, truth
from benchmarks.support.timing import Run
from carve_kernels import capture_layers
from carve_kernels.backends.native.scratch import Memory
from carve_kernels.ops.layer_operator import layer_operator
from carve_kernels.types import Capture


class Stack:
    """Layers of one shape on a device, buffers for their maps, and the true maps [L, R, N] in float64."""

    def __init__(self, case: Case, device: torch.device, layers: int) -> None:
        self.case, self.device = case, device
        self.layers: list[Problem] = [problem(case, seed, device) for seed in range(layers)]
        first = self.layers[0]
        self.query, self.key = [layer.query for layer in self.layers], [layer.key for layer in self.layers]
        # Each layer has inputs of its own: a layer that is computed twice is found.
        self.truth = torch.cat([truth(layer) for layer in self.layers])
        check_truth(str(case), self.truth)
        rows, count = case.rows, first.tokens.shape[1]
        shape = (1, layers, 1, rows)
        self.out = Capture(*(torch.empty(size, device=device) for size in ((*shape, count), shape, shape)))
        self.step = torch.zeros((), dtype=torch.int64, device=device)

    def public(self, backend: str) -> Run:
        """The public function with one backend."""
        options = {**self.layers[0].options, "step": self.step, "out": self.out, "backend": backend}
        return lambda: capture_layers(self.query, self.key, self.layers[0].tokens, **options)

    def operator(self, backend: str, layers: int) -> Run:
        """The operator itself for the first layers, with everything allocated beforehand, as a session calls it."""
        inputs, key = self.layers[0], self.key[0]
        query = self.query[0]
        chosen = layer_operator(backend, self.device, dtype=query.dtype, size=query.shape[3])
        needs = chosen.needs(
            layers=layers, batch=1, query_heads=query.shape[1], key_heads=key.shape[1], rows=query.shape[2],
            keys=key.shape[2], size=query.shape[3], tokens=inputs.tokens.shape[1], element_bytes=query.element_size(),
        )  # fmt: skip
        span = torch.stack([inputs.tokens.min(), inputs.tokens.max()])
        arguments = (
            self.query[:layers], self.key[:layers], inputs.tokens, span, None, inputs.positions, [], None,
            inputs.scale, 0.0, 0, False, self.step, 0, *Memory.new(needs, self.device), *self.out,
        )  # fmt: skip
        return lambda: chosen.run(*arguments)

    def check(self, name: str, run: Run, layers: int | None = None) -> None:
        """A run of the package must fill the buffers with the true maps, whatever they held before."""
        chosen = slice(0, layers)
        for buffer in self.out:
            buffer.fill_(torch.nan)
        run()
        maps, mass = self.out.maps[0, chosen, 0], self.out.mass[0, chosen, 0]
        check_maps(f"{name}, {self.case}", maps, self.truth[chosen], relative=1e-4, correlation=1 - 1e-6)
        expected = self.truth[chosen].sum(-1)
        # `not <=` instead of `>`, so that NaN fails.
        if not float(((mass - expected).abs() / expected).max()) <= 1e-4:
            raise WrongAnswer(f"{name}, {self.case}: expected the sums of the maps as mass, got others")

    def check_opponent(self, name: str, maps: torch.Tensor) -> None:
        """Plain torch rounds its scores to bf16."""
        check_maps(f"{name}, {self.case}", maps, self.truth, relative=0.1, correlation=0.999)
