"""Text in images: in a font that has its characters, in its direction, and as escapes where there is no font."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy
import pytest
from PIL import Image, ImageDraw, features

from carve_kernels import fonts
from carve_kernels.visualize import Tile, panel


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """Clear the caches of fonts before and after."""
    cached = (fonts._path_of, fonts._has, fonts._font, fonts._paths)
    for function in cached:
        function.cache_clear()
    yield
    for function in cached:
        function.cache_clear()


@pytest.fixture
def only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with no fonts but those in this folder."""
    monkeypatch.setattr(fonts, "_folders", lambda: [tmp_path])
    return tmp_path


def make_font(path: Path, letters: str, height: int = 800) -> None:
    """A font with a block for each letter, and a lower block for missing ones."""
    from fontTools.fontBuilder import FontBuilder
    from fontTools.pens.ttGlyphPen import TTGlyphPen

    def block(top: int) -> object:
        pen = TTGlyphPen(None)
        pen.moveTo((50, 0))
        for corner in ((50, top), (850, top), (850, 0)):
            pen.lineTo(corner)
        pen.closePath()
        return pen.glyph()

    names = {ord(letter): f"u{ord(letter):x}" for letter in letters}
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder([".notdef", *names.values()])
    builder.setupCharacterMap(names)
    builder.setupGlyf({".notdef": block(100), **{name: block(height) for name in names.values()}})
    builder.setupHorizontalMetrics({name: (900, 50) for name in (".notdef", *names.values())})
    builder.setupHorizontalHeader(ascent=900, descent=-100)
    builder.setupNameTable({"familyName": "Test", "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    builder.save(path)


def drawn(text: str, size: int = 24) -> numpy.ndarray:
    page = Image.new("RGB", (400, 40), "white")
    fonts.draw(ImageDraw.Draw(page), (2, 2), text, size, (0, 0, 0))
    return numpy.asarray(page.convert("L"))


def test_a_character_that_no_font_has_is_an_escape(only: Path) -> None:
    assert fonts.legible("what \u732b is caf\u00e9 \U0001f408") == "what \\u732b is caf\\xe9 \\U0001f408"
    assert fonts.legible("plain \u201ctext\u201d\n") == "plain \u201ctext\u201d\n" and not fonts.unreadable("plain")
    assert fonts.legible("\ud800\x07") == "\\ud800\\x07"
    # A combining mark follows its letter.
    assert fonts.legible("\u0915\u094d") == "\\u0915\\u094d"


def test_a_font_is_found_and_a_broken_one_is_skipped(only: Path) -> None:
    (only / "deep").mkdir()
    make_font(only / "deep/b.ttf", "\u732b\u72ac")
    (only / "a.ttf").write_bytes(b"no font")
    # A font with one glyph for everything.
    make_font(only / "LastResort.ttf", "\u732b\u4e00")
    assert fonts.legible("\u732b is \u4e00") == "\u732b is \\u4e00"
    with_glyphs, boxes = drawn("\u732b\u732b"), drawn("\u4e00\u4e00")
    assert (with_glyphs < 128).sum() > 2 * (boxes < 128).sum() > 0


def test_a_line_is_in_one_font_where_possible(only: Path) -> None:
    make_font(only / "a.ttf", "\u732b")
    make_font(only / "b.ttf", "\u72acabc ")
    assert [run for run, _ in fonts._runs("ab\u72acc", 20)] == ["ab\u72acc"]
    assert [run for run, _ in fonts._runs("ab\u732bc", 20)] == ["ab", "\u732b", "c"]
    assert fonts.length("ab\u732bc", 20) == pytest.approx(sum(fonts.length(part, 20) for part in ("ab", "\u732b", "c")))


def test_the_direction_is_that_of_the_first_letter_outside_isolates() -> None:
    for text, direction in (
        ("abc", "ltr"),
        ("12 \u05d0 a", "rtl"),
        ("\u201c\u0623\u064a\u0646", "rtl"),
        ("a \u05d0", "ltr"),
        ("\u2068\u0623\u064a\u0646\u2069", "ltr"),
        ("\u2068\u0623\u064a\u0646\u2069; the answer", "ltr"),
        ("", "ltr"),
    ):
        assert fonts._direction(text) == direction, text


def test_russian_greek_and_accents_are_read_where_matplotlib_is_installed() -> None:
    pytest.importorskip("matplotlib")
    text = "\u0413\u0434\u0435 \u043a\u043e\u0448\u043a\u0430? caf\u00e9 \u03a9 cafe\u0301"
    assert fonts.legible(text).count("\u00e9") == 2 and "\\" not in fonts.legible(text)
    # Not the same image as the same number of boxes.
    assert not numpy.array_equal(drawn("\u0413\u0434\u0435"), drawn("\u0411\u0438\u044e"))


def test_arabic_joins_and_runs_from_right_to_left(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    if features.check("raqm"):
        word = "\u0642\u0637\u0629"
        assert fonts.legible(word) == word
        # Joined letters are narrower than separate ones.
        assert fonts.length(word, 40) < sum(fonts.length(letter, 40) for letter in word)
    fonts._path_of.cache_clear()
    monkeypatch.setattr(fonts.features, "check", lambda name: False)
    assert fonts.legible("\u0642 a") == "\\u0642 a"


def test_a_panel_says_that_it_has_escapes(only: Path, caplog: pytest.LogCaptureFixture) -> None:
    image = Image.new("RGB", (64, 64))
    plain = panel([[Tile(image, "one", "two")]], title="cat", caption="c", tile=320)
    assert not caplog.records
    escaped = panel([[Tile(image, "one", "two")]], title="\u732b", caption="c", tile=320)
    assert escaped.height > plain.height and [record.name for record in caplog.records] == ["carve_kernels"]
