"""A release: one version everywhere, a changelog, a citation that tools can read."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import pytest
import yaml

import carve_kernels
from carve_kernels.deprecation import renamed

ROOT = Path(__file__).resolve().parents[1]
CHANGES = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
# Keep a Changelog 1.1.0.
KINDS = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


def test_one_version_everywhere() -> None:
    (project,) = re.findall(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    entries = re.findall(r"^## (\S+)", CHANGES, re.MULTILINE)
    if entries[0] == "Unreleased":
        del entries[0]
    assert entries[0] == project == carve_kernels.__version__ and "0.1.0" in entries
    assert entries == sorted(entries, key=lambda entry: [int(part) for part in entry.split(".")], reverse=True)
    assert set(re.findall(r"^### (.+)$", CHANGES, re.MULTILINE)) <= KINDS


def test_the_citation_is_valid() -> None:
    """Against the Citation File Format 1.2.0: what it requires, and no key that it does not know."""
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["cff-version"] == "1.2.0" and citation["type"] == "software"
    assert citation["message"] and citation["title"]
    known = {"cff-version", "message", "type", "title", "abstract", "authors", "version", "license", "keywords"}
    assert set(citation) <= known | {"references", "date-released", "doi", "url", "repository-code", "identifiers"}
    assert citation["version"] == carve_kernels.__version__ and citation["license"] == "Apache-2.0"
    (paper,) = citation["references"]
    assert {"type", "title", "authors"} <= set(paper) and "2509.06461" in paper["doi"] and paper["year"] == 2025
    for author in (*citation["authors"], *paper["authors"]):
        assert set(author) in ({"name"}, {"family-names", "given-names"})


def test_an_old_name_works_and_says_the_new_one() -> None:
    @renamed(old="new")
    def double(new: int, other: int = 0) -> int:
        """Twice."""
        return 2 * new + other

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert double(3) == double(new=3) == 6
    with pytest.warns(DeprecationWarning, match=r"^old: this argument is called new now$"):
        assert double(old=3, other=1) == 7  # type: ignore[call-arg]
    with pytest.raises(TypeError, match=r"^old: expected new alone, .* got both$"):
        double(new=3, old=3)  # type: ignore[call-arg]
    assert (double.__name__, double.__doc__) == ("double", "Twice.")
