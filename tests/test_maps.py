"""AttentionMaps: views, files, images."""

from __future__ import annotations

from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from carve_kernels import AttentionMaps, View, VisualLayout


def layout() -> VisualLayout:
    one = View(torch.arange(5, 11), (2, 3), (0.0, 0.0, 30.0, 20.0))
    two = View(torch.arange(20, 24), (2, 2), (5.0, 5.0, 15.0, 15.0), image=1, kind="tile")
    three = View(torch.arange(7, 11), (4, 1), (0.0, 0.0, 9.0, 9.0), frame=(0, 2), kind="frame")
    return VisualLayout(((one, two), (three,)), (((20, 30), (20, 30)), ((9, 9),)))


def maps(**changes: Any) -> AttentionMaps:
    torch.manual_seed(0)
    values = torch.rand(2, 3, 4, 1, 10)
    valid = torch.ones(2, 3, 4, 1, dtype=torch.bool)
    valid[1, :, 2:] = False
    fields = {
        "values": values,
        "mass": values.sum(-1),
        "entropy": torch.rand(2, 3, 4, 1),
        "valid": valid,
        "layers": (20, 21, 22),
        "steps": (0, 1, 2, 3),
        "tokens": layout().tokens(),
        "dtype": "bfloat16",
        "layout": layout(),
    }
    return AttentionMaps(**{**fields, **changes})


def test_views_are_cut_from_the_tokens() -> None:
    found = maps()
    assert found.view(0, 1).shape == (3, 4, 1, 2, 2)
    assert torch.equal(found.view(0, 1).flatten(-2), found.values[0][..., 6:])
    assert torch.equal(found.view(1).flatten(-2), found.values[1][..., :4])
    assert [found.last_step(b) for b in range(2)] == [3, 1]
    for b, i, name in ((2, 0, "b"), (0, 2, "i"), (-1, 0, "b")):
        with pytest.raises(ValueError, match=f"{name}: expected an integer from 0"):
            found.view(b, i)


def test_saved_maps_are_loaded_equal(tmp_path: Path) -> None:
    before = maps()
    before.save(tmp_path / "maps.safetensors")
    after = AttentionMaps.load(tmp_path / "maps.safetensors")
    for name in ("values", "mass", "entropy", "valid", "tokens"):
        assert torch.equal(getattr(before, name), getattr(after, name))
    assert (after.layers, after.steps, after.dtype) == (before.layers, before.steps, before.dtype)
    assert after.layout is not None and after.layout.sizes == layout().sizes
    for mine, theirs in zip(after.layout.views, layout().views, strict=True):
        for view, other in zip(mine, theirs, strict=True):
            assert torch.equal(view.tokens, other.tokens)
            assert (view.grid, view.box, view.image, view.frame, view.kind) == (
                other.grid, other.box, other.image, other.frame, other.kind,
            )  # fmt: skip
    maps(layout=None).save(tmp_path / "maps.safetensors")
    assert AttentionMaps.load(tmp_path / "maps.safetensors").layout is None
    assert [path.name for path in tmp_path.iterdir()] == ["maps.safetensors"]


def partly_seen() -> AttentionMaps:
    """Row 0: layer 1 loses a token of the second view from step 2 on, layer 2 has no map at the last step."""
    missing = torch.zeros(2, 3, 4, 1, 10, dtype=torch.bool)
    missing[0, 1, 2:, 0, 7] = True
    found = maps()
    found.valid[0, 2, 3] = False
    found.values[missing | ~found.valid[..., None]] = 0.0
    return replace(found, missing=missing)


def test_missing_tokens_are_not_dark_ones(tmp_path: Path) -> None:
    found = partly_seen()
    assert found.whole(0).tolist() == [[True] * 4, [True, True, False, False], [True, True, True, False]]
    assert found.whole(1).tolist() == [[True, True, False, False]] * 3 and found.last_step(0) == 3
    assert int((~found.seen[0]).sum()) == 2 + 10 and not bool(found.seen[1, ..., 4:].any())
    assert found.seen_in_view(0, 1)[1, 3, 0].tolist() == [[True, False], [True, True]]
    assert "some tokens missing" in repr(found) and "missing" not in repr(maps())
    found.save(tmp_path / "maps")
    after = AttentionMaps.load(tmp_path / "maps")
    assert after.missing is not None and found.missing is not None and torch.equal(after.missing, found.missing)
    damaged = bytearray((tmp_path / "maps").read_bytes())
    # `missing` is the only tensor of zeros and ones as long as this.
    at = damaged.find(bytes(240 // 4))
    damaged[at] ^= 1
    (tmp_path / "maps").write_bytes(damaged)
    with pytest.raises(ValueError, match="is damaged"):
        AttentionMaps.load(tmp_path / "maps")


def test_maps_without_missing_tokens_are_files_of_earlier_versions(tmp_path: Path) -> None:
    maps().save(tmp_path / "maps")
    assert b"carve_kernels.AttentionMaps/1" in (tmp_path / "maps").read_bytes()
    assert AttentionMaps.load(tmp_path / "maps").missing is None
    partly_seen().save(tmp_path / "maps")
    assert b"carve_kernels.AttentionMaps/2" in (tmp_path / "maps").read_bytes()


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "maps.safetensors"
    maps().save(path)
    before = path.read_bytes()

    def fail(*_: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="no space"):
        maps().save(path)
    assert path.read_bytes() == before and [found.name for found in tmp_path.iterdir()] == [path.name]


def test_other_files_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    path = tmp_path / "file"
    path.write_text("no safetensors")
    with pytest.raises(ValueError, match="path: expected a safetensors file"):
        AttentionMaps.load(path)
    save_file({"values": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="path: expected maps written by"):
        AttentionMaps.load(path)
    with pytest.raises(FileNotFoundError):
        AttentionMaps.load(tmp_path / "missing")


def test_a_layout_must_hold_the_captured_tokens() -> None:
    bare = maps(layout=None)
    with pytest.raises(ValueError, match="layout: expected maps with a layout"):
        bare.view()
    assert torch.equal(bare.with_layout(layout()).view(0, 1), maps().view(0, 1))
    other = VisualLayout(layout().views[::-1], layout().sizes[::-1])
    with pytest.raises(ValueError, match=r"layout: expected the \[10, 4\] captured tokens"):
        bare.with_layout(other)


def test_a_notebook_shows_an_image() -> None:
    data = maps()._repr_png_()
    assert data is not None
    image = Image.open(BytesIO(data))
    assert image.width == 3 * (448 // 3) and image.height == 2 * (448 // 3)
    assert len(image.getcolors() or []) > 3
    assert maps(layout=None)._repr_png_() is None
    assert "layers=[20, 21, 22]" in repr(maps())
