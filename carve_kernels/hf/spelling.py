"""A prompt's ids as text: which tokens hold a character, and where a text stands in it."""

from __future__ import annotations

import re
import unicodedata
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import Any

import numpy

IMAGE = "\ufffc"
"""What stands in the text for a visual token."""

# Byte-level tokenizers write a byte as a character that can be seen: itself, or the next one from 256 on.
_SEEN = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_HIDDEN = [byte for byte in range(256) if byte not in _SEEN]
_BYTES = {chr(byte): byte for byte in _SEEN} | {chr(256 + place): byte for place, byte in enumerate(_HIDDEN)}
_FALLBACK = re.compile("<0x([0-9A-F]{2})>")
_JOINER = "\u200d"
_SELECTORS = "\ufe0e\ufe0f"
# How the names of characters begin whose scripts put no space between words; Korean puts none before particles.
_SPACELESS = (
    *("CJK", "IDEOGRAPHIC", "HIRAGANA", "KATAKANA", "HALFWIDTH KATAKANA", "BOPOMOFO", "HANGUL", "YI"),
    *("THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN"),
)


class Spelled:
    """The text of a row of ids; `visual` are the tokens that stand for pieces of images.

    Raises ValueError if the tokenizer's own text of the ids is not that of its tokens one by one.
    """

    def __init__(self, tokenizer: Any, ids: Sequence[int], visual: Sequence[bool]) -> None:
        said = [id for id, image in zip(ids, visual, strict=True) if not image]
        pieces = iter(_pieces(tokenizer, said))
        each = [IMAGE.encode() if image else next(pieces) for image in visual]
        # A byte that belongs to no character is a character by itself.
        self.text = b"".join(each).decode("utf-8", "surrogateescape")
        self._tokens = [0, *accumulate(map(len, each))]
        self._characters = [0, *accumulate(_sizes(self.text))]
        # Where the first image begins.
        self.first = self.begin(visual.index(True)) if any(visual) else 0

    def tokens(self, start: int, stop: int) -> list[int]:
        """The tokens that hold at least one byte of the characters from `start` to before `stop`."""
        first = bisect_right(self._tokens, self._characters[start]) - 1
        last = bisect_left(self._tokens, self._characters[stop])
        return [token for token in range(first, last) if self._tokens[token] < self._tokens[token + 1]]

    def begin(self, token: int) -> int:
        """The first character that begins in a token or behind it."""
        return bisect_left(self._characters, self._tokens[token])


def spellings(tokenizer: Any, text: str, unknown: bool = False) -> Iterator[str]:
    """A text as it is and, where the tokenizer writes it in another way (lower-cased, without accents), as it does.

    With `unknown` also where it does not know a part of the text, and writes its mark for it.
    """
    yield text
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    lost = getattr(tokenizer, "unk_token_id", None)
    known = [id for id in ids if id != lost]
    # Marks alone may stand for any text.
    if len(known) == len(ids) or (unknown and _decoded(tokenizer, known).strip()):
        written = _decoded(tokenizer, ids).strip()
        if written and written != text:
            yield written


def special_tokens(tokenizer: Any) -> set[str]:
    """The tokens that are no text of a user, the mark of what the tokenizer does not know among them."""
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    return {token.content for token in added if token.special} | set(
        getattr(tokenizer, "all_special_tokens", None) or ()
    )


def unknown_of(tokenizer: Any) -> str | None:
    """What a tokenizer writes for characters that it does not know; None where that is the mark of something else."""
    mark: str | None = getattr(tokenizer, "unk_token", None)
    return None if mark in {getattr(tokenizer, f"{name}_token", None) for name in ("bos", "eos", "pad")} else mark


def find_last(text: str, wanted: str, word: bool, start: int = 0) -> tuple[int, int] | None:
    """The characters of the last place where `wanted` stands, as it is or else in another case; None where none is.

    White space is alike, and an accent may be a character of its own. A `word` has no letter or digit beside it, but in
    scripts without spaces.
    """
    bare = wanted.strip().rstrip(_SELECTORS) or wanted.strip()
    forms = dict.fromkeys([bare, *(unicodedata.normalize(form, bare) for form in ("NFC", "NFD"))])
    pattern = "|".join(r"\s+".join(map(re.escape, form.split())) for form in forms)
    for flags in (0, re.IGNORECASE):
        expression = re.compile(f"(?=((?:{pattern})[{_SELECTORS}]?))", flags)
        found = [match.span(1) for match in expression.finditer(text, start)]
        for first, stop in reversed(found):
            if not _one(text, first, word) and not _one(text, stop, word):
                return first, stop
    return None


def find_written(text: str, wanted: str, start: int = 0) -> list[tuple[int, int]]:
    """The characters of each place where a template's `wanted` stands: tokenizers may move its white space."""
    visible = "".join(wanted.split())
    if not visible:
        return []
    expression = re.compile(r"\s*".join(map(re.escape, visible)))
    return [match.span() for match in expression.finditer(text, start)]


def _one(text: str, place: int, word: bool) -> bool:
    """Whether the characters on both sides of a place are parts of one character, or of one word."""
    if place in (0, len(text)):
        return False
    left, right = text[place - 1], text[place]
    if _JOINER in (left, right) or _is_mark(right):
        return True
    return word and all(
        (side.isalnum() or _is_mark(side)) and not unicodedata.name(side, "").startswith(_SPACELESS)
        for side in (left, right)
    )


def _is_mark(character: str) -> bool:
    """Whether a character is an accent, a vowel sign or a colour of skin: a part of the character before it."""
    return unicodedata.category(character)[0] == "M" or "\U0001f3fb" <= character <= "\U0001f3ff"


def _pieces(tokenizer: Any, ids: list[int]) -> list[bytes]:
    """The bytes of each token, by the way of writing them whose text is the tokenizer's own."""
    distinct = sorted(set(ids))
    tokens = [token or "" for token in tokenizer.convert_ids_to_tokens(distinct)]
    expected = _known(_decoded(tokenizer, ids))
    for write in (_byte_level, _sentence_piece, _words(".,?!"), _words("")):
        written = dict(zip(distinct, map(write, tokens), strict=True))
        each = [written[id] for id in ids]
        if _known(b"".join(each).decode("utf-8", "replace")) == expected:
            return each
    raise ValueError(
        f"processor: expected a tokenizer whose text is that of its tokens one by one, got {type(tokenizer).__name__}, "
        "which writes the prompt in another way; give rows as positions"
    )


def _byte_level(token: str) -> bytes:
    codes = [_BYTES.get(character) for character in token]
    return token.encode() if None in codes else bytes(codes)  # type: ignore[arg-type]


def _sentence_piece(token: str) -> bytes:
    byte = _FALLBACK.fullmatch(token)
    return bytes.fromhex(byte[1]) if byte else token.replace("\u2581", " ").encode()


def _words(close: str) -> Callable[[str], bytes]:
    """Words with a space before each, but before continuations and the marks in `close`."""

    def write(token: str) -> bytes:
        if token.startswith("##"):
            return token[2:].encode()
        return token.encode() if token[:1] and token[0] in close else f" {token}".encode()

    return write


def _decoded(tokenizer: Any, ids: Sequence[int]) -> str:
    text: str = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text


def _known(text: str) -> str:
    """A text without what decoders differ in: marks of broken characters, and the space before the first word."""
    return text.replace("\ufffd", "").lstrip(" ")


def _sizes(text: str) -> list[int]:
    """The bytes of each character in UTF-8; a byte that belongs to none is a surrogate."""
    codes = numpy.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")
    sizes = 1 + (codes >= 0x80) + (codes >= 0x800) + (codes >= 0x10000)
    sizes[(codes >= 0xDC80) & (codes <= 0xDCFF)] = 1
    found: list[int] = sizes.tolist()
    return found
