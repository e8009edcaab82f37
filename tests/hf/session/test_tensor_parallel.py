"""Heads that are divided among two processes (`tp_plan`): maps and answers are those of one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from torch import distributed

from tests.support.tensor_parallel import CHECKS, PROCESSES, SECONDS

LOADING = "this transformers divides models while it loads them only"
DISTRIBUTED = pytest.importorskip("transformers.distributed.utils", reason=LOADING)


@pytest.mark.skipif(not distributed.is_available(), reason="this torch has no processes")
@pytest.mark.skipif(not hasattr(DISTRIBUTED, "initialize_distributed_mesh"), reason=LOADING)
def test_all_checks_hold_in_both_processes(tmp_path: Path) -> None:
    # Before transformers is imported, tests.conftest makes torchvision importable.
    code = "import tests.conftest; from tests.support.tensor_parallel import main; main()"
    settings = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", code, str(tmp_path)]
    subprocess.run(command, cwd=Path(__file__).parents[3], env=settings, check=True, timeout=2 * SECONDS)
    for rank in range(PROCESSES):
        results = dict(map(json.loads, (tmp_path / f"{rank}.jsonl").read_text().splitlines()))
        failures = {name: error for name, error in results.items() if error is not None}
        assert not failures, f"process {rank}: " + "\n".join(failures.values())
        assert list(results) == list(CHECKS)
