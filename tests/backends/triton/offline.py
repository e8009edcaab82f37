"""Compile the kernels for GPUs that are not present, and check the output of the compiler.

    python -m tests.backends.triton.offline            the cases in the table of registers, against limits and table
    python -m tests.backends.triton.offline --all      every head size, option and target as well
    python -m tests.backends.triton.offline --write    write this Triton's registers to registers.json
    python -m tests.backends.triton.offline --json "90 bfloat16 head size 128 rows 1"    targets and cases, as JSON

For another Triton, `pip install --no-deps --target FOLDER triton==3.6.0` and set PYTHONPATH=FOLDER. Kernels are
launched by `forward`, with a stub for the driver, so that tiles, hints and specialisation are those of a real call.
Never under TRITON_INTERPRET: kernels would be interpreted.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from triton.compiler.compiler import CompiledKernel

from carve_kernels.backends.triton import capture, capture_backward, column_sums, contrast
from carve_kernels.types import Capture, CaptureOptions, ContrastOptions, Given, Layers, Slot
from tests.backends.triton import offline_driver
from tests.backends.triton.limits import (
    EARLY,
    REGISTERS,
    REWRITE,
    TARGETS,
    Row,
    by_age,
    is_counted,
    release,
    table,
    verdict,
)

MORE_TARGETS = (*TARGETS, "86")
PROCESSES = 2

_BINARIES = Path(triton.__file__).parent / "backends/nvidia/bin"
_OPCODE = re.compile(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", re.MULTILINE)
_HEAD_SIZES = (32, 40, 64, 72, 80, 96, 128, 192, 256)


class Case(NamedTuple):
    name: str
    launch: Callable[[], Any]


def capture_case(dtype: torch.dtype, size: int, rows: int, option: str = "") -> Case:
    """Six layers of the attention of Qwen2.5-VL-7B, with another head size."""

    def launch() -> None:
        heads, key_heads, keys, tokens, layers = 28, 4, 4096, 1024, 6
        query = [torch.empty(1, rows, heads, size, dtype=dtype).transpose(1, 2) for _ in range(layers)]
        key = [torch.empty(1, key_heads, keys, size, dtype=dtype) for _ in range(layers)]
        options = CaptureOptions(size**-0.5)
        if option == "mask":
            options = options._replace(mask=torch.empty(1, 1, rows, keys, dtype=torch.bool))
        if option == "window":
            options = options._replace(positions=torch.empty(1, rows, dtype=torch.int64), softcap=50.0, window=512)
        where = torch.empty(1, tokens, dtype=torch.int32)
        if option in ("lse", "each"):
            changes: Any = {"lse": torch.empty(1, heads, rows)} if option == "lse" else {"heads": "each"}
            capture.forward(query[0], key[0], where, options._replace(**changes))
            return
        out = Capture(
            torch.empty(2, layers, 1, rows, tokens), torch.empty(2, layers, 1, rows), torch.empty(2, layers, 1, rows)
        )
        sink = [torch.empty(heads) for _ in range(layers)] if option == "sink" else []
        step, span = torch.zeros(1, dtype=torch.int64), torch.zeros(2, dtype=torch.int32)
        if not capture.forward_layers(Layers(query, key, sink), where, options, Slot(out, step), span):
            raise RuntimeError("the backend refused to capture the layers in one call")

    name = f"{str(dtype).removeprefix('torch.')} head size {size} rows {rows}"
    return Case(f"{name} {option}".strip(), launch)


def gradient_case(dtype: torch.dtype, size: int, rows: int, option: str = "") -> Case:
    """The gradients of one layer of the same attention."""

    def launch() -> None:
        heads, key_heads, keys, tokens = 28, 4, 4096, 1024
        query, key = torch.zeros(1, heads, rows, size, dtype=dtype), torch.zeros(1, key_heads, keys, size, dtype=dtype)
        options = CaptureOptions(size**-0.5, positions=torch.zeros(1, rows, dtype=torch.int64))
        if option == "window":
            options = options._replace(softcap=50.0, window=512)
        given = Given(torch.zeros(1, rows, tokens), None, None)
        capture_backward.backward(query, key, torch.zeros(1, tokens, dtype=torch.int32), options, given)

    name = f"gradient {str(dtype).removeprefix('torch.')} head size {size} rows {rows}"
    return Case(f"{name} {option}".strip(), launch)


def columns_case(dtype: torch.dtype, size: int, option: str = "") -> Case:
    """A causal prefill of the attention of Qwen2.5-VL-7B, with another head size."""

    def launch() -> None:
        heads, key_heads, keys = 28, 4, 4096
        query = torch.empty(1, keys, heads, size, dtype=dtype).transpose(1, 2)
        key = torch.empty(1, key_heads, keys, size, dtype=dtype)
        options = CaptureOptions(size**-0.5, positions=torch.empty(1, keys, dtype=torch.int64))
        if option == "mask":
            options = options._replace(mask=torch.empty(1, 1, 1, keys, dtype=torch.bool).expand(1, 1, keys, keys))
        if option == "window":
            options = options._replace(softcap=50.0, window=512, sink=torch.empty(heads))
        if option == "lse":
            options = options._replace(lse=torch.empty(1, heads, keys))
        column_sums.forward(query, key, options)

    return Case(f"columns {str(dtype).removeprefix('torch.')} head size {size} rows 64 {option}".strip(), launch)


def contrast_case(lam: float | str, normalize: str, views: int) -> Case:
    """Sizes of 1 or a multiple of 16, for which Triton would compile more kernels, must not get them."""

    def launch() -> None:
        task = torch.empty(6, 32, 1024 * views)
        options = ContrastOptions(lam, torch.ones(6), torch.arange(1, 33), normalize)
        for grid, size in (((32, 32), (448, 448)), ((1, 1024), (1, 999)), ((16, 64), (63, 1))):
            contrast.forward(task, task, [(grid, size)] * views, options)

    return Case(f"lam {lam} normalize {normalize} views {views}", launch)


def cases() -> list[Case]:
    """The cases in the table of registers: one row gives a product of 16 lanes, 64 rows one of 64."""
    heads = [(torch.bfloat16, 64), (torch.bfloat16, 128), (torch.bfloat16, 256), (torch.float32, 128)]
    return [
        *(capture_case(dtype, size, rows) for dtype, size in heads for rows in (1, 64)),
        *(capture_case(torch.bfloat16, 128, rows, "lse") for rows in (1, 64)),
        contrast_case("mean", "none", 1),
        columns_case(torch.bfloat16, 128),
        columns_case(torch.bfloat16, 256),
        columns_case(torch.float32, 128),
    ]


def more_cases() -> list[Case]:
    found = {case.name: case for case in cases()}
    heads = [(dtype, size) for dtype in (torch.bfloat16, torch.float32) for size in _HEAD_SIZES]
    listed = [capture_case(dtype, size, rows) for dtype, size in heads for rows in (1, 64)]
    options = ("mask", "window", "sink", "lse", "each")
    listed += [capture_case(torch.bfloat16, 128, rows, option) for option in options for rows in (1, 64)]
    listed += [capture_case(torch.float16, 128, rows) for rows in (1, 8, 64)]
    some = [(torch.bfloat16, 80), (torch.bfloat16, 128), (torch.bfloat16, 256), (torch.float32, 128)]
    listed += [gradient_case(dtype, size, rows) for dtype, size in some for rows in (1, 64)]
    listed += [gradient_case(torch.float32, 256, 64), gradient_case(torch.bfloat16, 128, 64, "window")]
    listed += [contrast_case(1e-8, normalize, views) for normalize, views in (("sum", 2), ("max", 5), ("minmax", 13))]
    listed += [columns_case(dtype, size) for dtype, size in heads]
    listed += [columns_case(torch.bfloat16, 128, option) for option in ("mask", "window", "lse")]
    listed += [columns_case(torch.float16, 128)]
    return list((found | {case.name: case for case in listed}).values())


def compiled_by(launch: Callable[[], Any]) -> list[CompiledKernel]:
    """The kernels that a call compiles."""
    kernels: list[CompiledKernel] = []
    shipped = CompiledKernel.__init__

    def recording(self: CompiledKernel, *args: Any, **options: Any) -> None:
        shipped(self, *args, **options)
        kernels.append(self)

    with mock.patch.object(CompiledKernel, "__init__", recording):
        launch()
    return kernels


def row_of(kernel: CompiledKernel, case: str, target: str) -> Row:
    if "cubin" not in kernel.asm:
        return _row_of_amd(kernel, case, target)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = _run("cuobjdump", "--dump-resource-usage", file.name)
        listing = _run("nvdisasm", "-c", file.name)
    found = {name: int(count) for name, count in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    opcodes = _OPCODE.findall(listing)
    if "ACQBULK" in opcodes:
        # What the launch before stores is loaded past the first-level cache.
        opcodes += [EARLY] * sum(
            one.startswith("LDG") and "STRONG" in one for one in opcodes[: opcodes.index("ACQBULK")]
        )
    return Row(
        kernel.name,
        case,
        target,
        found["REG"],
        found["STACK"] + found["LOCAL"],
        kernel.metadata.shared,
        _count(opcodes),
    )


def _row_of_amd(kernel: CompiledKernel, case: str, target: str) -> Row:
    listing = kernel.asm["amdgcn"]
    found = {name: int(count) for name, count in re.findall(r"^\s+\.(\w+):\s+(\d+)$", listing, re.MULTILINE)}
    # Scalar registers spill into lanes of vector registers, not into memory.
    stack = found["private_segment_fixed_size"] + 4 * found["vgpr_spill_count"]
    opcodes = re.findall(r"^\s+([a-z]\w+)", listing, re.MULTILINE)
    return Row(kernel.name, case, target, found["vgpr_count"], stack, kernel.metadata.shared, _count(opcodes))


def _run(program: str, *arguments: str) -> str:
    return subprocess.run([_BINARIES / program, *arguments], capture_output=True, text=True, check=True).stdout


def _count(opcodes: list[str]) -> dict[str, int]:
    return {name: opcodes.count(name) for name in sorted(set(opcodes))}


def compile_one(task: tuple[str, str]) -> list[Row]:
    """The rows of one case on one target, in a separate process: kernels remember their first target."""
    target, name = task
    torch.set_num_threads(1)
    offline_driver.activate(target)
    case = next(case for case in more_cases() if case.name == name)
    return [row_of(kernel, case.name, target) for kernel in compiled_by(case.launch)]


def compile_all(tasks: Iterable[tuple[str, str]]) -> Iterator[Row]:
    """The rows of targets and cases, in their order."""
    # Forked, so that torch and Triton are imported once.
    with multiprocessing.get_context("fork").Pool(PROCESSES, maxtasksperchild=1) as pool:
        for rows in pool.imap(compile_one, tasks):
            yield from rows


def compile_in_subprocess(root: Path, *tasks: tuple[str, str]) -> list[Row]:
    """The rows of targets and cases, compiled from a folder, in a process where Triton does not interpret."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.backends.triton.offline", "--json", *map(" ".join, tasks)]
    result = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=600)
    if result.returncode != 0:
        raise RuntimeError(result.stderr[-3000:])
    return [Row(*row) for row in json.loads(result.stdout)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="every head size, option and target")
    parser.add_argument("--write", action="store_true", help="write the registers to registers.json")
    parser.add_argument("--json", nargs="+", metavar="TASK", help="print these targets and cases as JSON")
    arguments = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET"):
        parser.error("TRITON_INTERPRET is set: the kernels would be interpreted")
    if arguments.json:
        json.dump(list(compile_all(tuple(task.split(" ", 1)) for task in arguments.json)), sys.stdout)
        return 0
    if arguments.write:
        write(compile_all(_tasks(cases(), TARGETS)))
        return 0
    wanted = _tasks(more_cases(), MORE_TARGETS) if arguments.all else _tasks(cases(), TARGETS)
    return report(compile_all(wanted))


def _tasks(wanted: list[Case], targets: tuple[str, ...]) -> list[tuple[str, str]]:
    return [(target, case.name) for target in targets for case in wanted]


def write(rows: Iterable[Row]) -> None:
    """Put this Triton's registers into the table, a line for each kernel and case."""
    found: dict[str, dict[str, int]] = {}
    for row in rows:
        found.setdefault(f"{row.kernel} {row.case}", {})[row.target] = row.registers
    lines = []
    for name in sorted(found):
        by_version = table().get(name, {}) | {release(triton.__version__): [found[name][one] for one in TARGETS]}
        lines.append(f" {json.dumps(name)}: {json.dumps({one: by_version[one] for one in by_age(by_version)})}")
    REGISTERS.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def report(rows: Iterable[Row]) -> int:
    """Print every row with its faults; 1 if there are any."""
    kernels = failed = 0
    for row in rows:
        found = verdict(row, triton.__version__)
        print(
            f"{row.name}: {row.registers} registers, {row.shared_bytes} bytes shared", *found, sep="\n    ", flush=True
        )
        kernels += 1
        failed += bool(found)
    print(f"{kernels} kernels with triton {triton.__version__}, {failed} at fault")
    if not is_counted(triton.__version__):
        print(f"triton {triton.__version__} is not in {REGISTERS.name}; to write its registers there: {REWRITE}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
