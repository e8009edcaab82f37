"""Calls of every kernel on small, odd shapes, for compute-sanitizer: `python -m tests.gpu.small_calls [BACKEND...]`.

Inputs are made on the CPU and answers are judged there, so that hardly any kernel but ours runs.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import partial

import torch

from carve_kernels.backends import PREFERRED, why_not
from carve_kernels.checks import BackendUnavailable
from carve_kernels.selfcheck.moving import move
from carve_kernels.selfcheck.trials import Trial, trials

# Triton compiles each of its kernels for seconds, so few of its calls are run.
_QUICK = ("triton",)
_LARGE = ("long",)


def chosen(backend: str, device: torch.device) -> Iterator[Trial]:
    """The trials of the stages that a backend has, each built when it is due, without those that are large."""
    quick = backend in _QUICK
    for build in trials(quick=quick):
        # The large ones are timed; they fill a gigabyte.
        if isinstance(build, partial) and build.keywords.get("timed") and not quick:
            continue
        trial = build()
        if not trial.name.startswith(_LARGE) and why_not(trial.stage, backend, device) is None:
            yield trial


def run(device: torch.device, backends: tuple[str, ...], announce: Callable[[str], None]) -> list[str]:
    """Run them all; the problems."""
    problems = []
    for backend in backends:
        count = 0
        for trial in chosen(backend, device):
            arguments, options = move(trial.arguments, device), move(trial.options, device)
            try:
                result = trial.call(*arguments, **options, backend=backend)
            except BackendUnavailable:
                continue
            problem = trial.judge(move(result, "cpu")).problem
            count += 1
            if problem is not None:
                problems.append(f"{backend}, {trial.stage}, {trial.name}: {problem}")
        announce(f"{backend}: {count} calls")
    return problems


if __name__ == "__main__":
    found = run(torch.device("cuda"), tuple(sys.argv[1:]) or PREFERRED["cuda"], print)
    print("\n".join(found) or "all right", flush=True)
    sys.exit(bool(found))
