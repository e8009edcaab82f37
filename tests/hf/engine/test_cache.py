"""Memory: what is kept comes back untouched, bounds hold to the byte, threads and the engine's argument."""

from __future__ import annotations

import random
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from carve_kernels import AttentionMaps
from carve_kernels.hf.engine.cache import Memory, memory_of
from carve_kernels.maps import encode
from tests.support.saved_maps import KEY, maps, same


def storages(found: AttentionMaps) -> list[torch.Tensor]:
    return [
        found.values, found.mass, found.entropy, found.valid, found.tokens,
        *(view.tokens for row in found.layout.views for view in row),
    ]  # fmt: skip


def size_of(found: AttentionMaps) -> int:
    return len(encode(found, key="0" * 64))


@pytest.mark.parametrize("folder", [False, True])
def test_cached_maps_cannot_change(tmp_path: Path, folder: bool) -> None:
    memory = Memory(tmp_path if folder else None, maps_bytes=0 if folder else 2**20)
    given = maps()
    assert memory.maps(KEY) is None
    memory.keep_maps(KEY, given)
    given.values.zero_()
    first = memory.maps(KEY)
    assert same(first, maps())
    for tensor in storages(first):
        tensor.zero_()
    assert same(memory.maps(KEY), maps())
    assert memory.maps((*KEY[:-1], 1)) is None


def test_bounds_hold_to_the_byte_under_random_use() -> None:
    """Against a plain list of (key, size), the most lately used last."""
    one = size_of(maps())
    bound = 4 * one + 100
    memory = Memory(maps_bytes=bound)
    kept: list[tuple[int, int]] = []
    most, draw = 0, random.Random(0)
    for _ in range(300):
        key = draw.randrange(9)
        if draw.random() < 0.5:
            entry = next((entry for entry in kept if entry[0] == key), None)
            assert (memory.maps(key) is not None) == (entry is not None)
            if entry is not None:
                kept.remove(entry)
                kept.append(entry)
        else:
            tokens = draw.choice([12, 40, 200, 4000])
            size = size_of(maps(tokens=tokens))
            memory.keep_maps(key, maps(key, tokens))
            kept = [entry for entry in kept if entry[0] != key]
            if size <= bound:
                kept.append((key, size))
            while sum(size for _, size in kept) > bound:
                kept.pop(0)
        held = memory.held()
        assert (held.maps, held.maps_bytes) == (len(kept), sum(size for _, size in kept))
        assert held.maps_bytes <= bound
        most = max(most, held.maps)
    assert size_of(maps(tokens=4000)) > bound and most == 4


def test_memory_of_the_process_stays_bounded() -> None:
    """1000 maps of 600 kB each under a bound of 32: the process grows by the bound and no more."""
    program = """
import os, tests.support.tiny_models
from tests.support.saved_maps import maps
from carve_kernels.hf.engine.cache import Memory
def rss():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
memory, one = Memory(maps_bytes=32 * 2**20), maps(tokens=20_000)
for key in range(8):
    memory.keep_maps(key, one)
before = rss()
for key in range(1000):
    memory.keep_maps(key, one)
assert memory.held().maps > 20, memory.held()
print((rss() - before) / 2**20)
"""
    if not Path("/proc/self/statm").exists():
        pytest.skip("needs /proc")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=300)
    assert float(done.stdout) < 48


def test_0_turns_parts_off(tmp_path: Path) -> None:
    off = Memory(tmp_path, maps_bytes=0, prefix_bytes=0, folder_bytes=0)
    off.keep_maps(KEY, maps())
    off.keep_prefix(KEY, object(), 1)
    assert off.maps(KEY) is None and off.prefix(KEY) is None and sum(off.held()) == 0
    assert list(tmp_path.iterdir()) == []
    none = Memory(images=0)
    none.keep_prefix(KEY, object(), 0)
    assert none.prefix(KEY) is None


def test_prefixes_are_lent_and_bounded() -> None:
    memory = Memory(prefix_bytes=100, images=3)
    for key, nbytes in (("a", 40), ("b", 30), ("c", 30)):
        memory.keep_prefix(key, key.upper(), nbytes)
    assert memory.held()[2:] == (3, 100)
    assert memory.prefix("a") == "A" and memory.prefix("a") is None
    assert memory.held()[2:] == (2, 60)
    memory.keep_prefix("a", "A", 40)
    memory.keep_prefix("d", "D", 1)
    assert memory.prefix("b") is None and memory.held()[2:] == (3, 71)
    memory.keep_prefix("e", "E", 90)
    assert memory.held()[2:] == (2, 91) and memory.prefix("d") == "D"
    memory.keep_prefix("f", "F", 101)
    assert memory.prefix("f") is None and memory.prefix("e") == "E"
    memory.keep_prefix("g", "G", 5)
    memory.keep_maps(KEY, maps())
    memory.clear()
    assert sum(memory.held()) == 0


def test_threads_share_a_memory() -> None:
    memory = Memory(maps_bytes=3 * size_of(maps()), prefix_bytes=50, images=2)
    faults: list[BaseException] = []
    lent: set[int] = set()

    def work(seed: int) -> None:
        draw = random.Random(seed)
        try:
            for _ in range(200):
                key = draw.randrange(5)
                found = memory.maps(key)
                assert found is None or same(found, maps(key))
                memory.keep_maps(key, maps(key))
                prefix = memory.prefix(key)
                if prefix is not None:
                    assert id(prefix) not in lent, "one user at a time"
                    lent.add(id(prefix))
                    lent.remove(id(prefix))
                memory.keep_prefix(key, prefix or object(), 10)
        except BaseException as error:
            faults.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert faults == []
    held = memory.held()
    assert held.maps <= 3 and held.prefixes <= 2


def test_the_argument_of_the_engine(tmp_path: Path) -> None:
    own = Memory()
    assert memory_of(own) is own and memory_of(False) is None
    assert isinstance(memory_of(None), Memory) and memory_of(None) is not memory_of(None)
    memory_of(tmp_path / "maps").keep_maps(KEY, maps())
    assert len(list((tmp_path / "maps").iterdir())) == 1
    for wrong in (True, 3, 0):
        with pytest.raises(TypeError, match="memory: expected None, False, a folder or a Memory"):
            memory_of(wrong)
    for name in ("maps_bytes", "prefix_bytes", "images", "folder_bytes"):
        with pytest.raises(ValueError, match=f"{name}: expected an integer of at least 0"):
            Memory(**{name: -1})
        for value in (1.5, "5", None, True):
            with pytest.raises(TypeError, match=f"{name}: expected an integer"):
                Memory(**{name: value})
    for number in (3, False, b"maps", [tmp_path]):
        with pytest.raises(TypeError, match="folder: expected a path, got"):
            Memory(number)  # type: ignore[arg-type]
    for empty in ("", " "):
        with pytest.raises(ValueError, match="folder: expected a string with at least one visible character"):
            Memory(empty)
        with pytest.raises(ValueError, match="memory: expected a string with at least one visible character"):
            memory_of(empty)
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError):
        Memory(tmp_path / "file")
