"""docs/families.md is what the code and the last comparison say."""

from __future__ import annotations

from carve_kernels.hf import names
from tests.hf.layouts import families_page
from tests.support.processors.kinds import pairs


def test_the_page_is_that_of_the_code() -> None:
    """A family, kind or option that was added or changed since: `python -m tests.hf.layouts.families_page NAME`."""
    text = families_page.PAGE.read_text(encoding="utf-8")
    version = families_page.version_of(text)
    numbers = families_page.numbers_of(text)
    assert set(numbers) == {row.name for row in families_page.checked()}
    assert families_page.page(numbers, version) == text
    assert version.startswith(f"{names.TESTED[1]}.")


def test_every_family_is_checked() -> None:
    assert {row.model_type for row in families_page.checked()} == set(families_page.families())
    assert len(families_page.families()) >= 35
    assert {row.name for row in families_page.checked()} <= set(pairs())


def test_a_token_that_is_too_far_off_is_not_written() -> None:
    """The numbers of the page are below the tolerance, and are numbers unless tokens are codes."""
    for name, number in families_page.numbers_of(families_page.PAGE.read_text(encoding="utf-8")).items():
        assert name in (*families_page.CODES, *families_page.EDGES) or 0 <= float(number) <= families_page.TOLERANCE
