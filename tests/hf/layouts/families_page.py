"""docs/families.md, from the code and from a run that compares every family with what is measured.

`python -m tests.hf.layouts.families_page` compares all families, which takes minutes, and writes the page; with names
of processors it compares these and keeps the numbers of the others.
"""

from __future__ import annotations

# Before transformers, which looks for torchvision once.
import tests.conftest  # noqa: F401  # isort: skip

import argparse
import functools
import re
import textwrap
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import transformers

from carve_kernels.hf.families import BY_PROCESSOR, FAMILIES, VIDEO_FAMILIES, Family
from carve_kernels.hf.layouts.comparison import deviations
from carve_kernels.hf.layouts.measured import measure
from tests.hf.layouts.test_measured import ALL, CODES, EDGES, OPTIONS, SHAPES, TOLERANCE, UNLISTED, family, layout
from tests.support.processors.kinds import pair, pairs, zoo_kind
from tests.support.zoo.kinds import kinds

PAGE = Path(__file__).resolve().parents[3] / "docs" / "families.md"
# With another vision tower, since that of the checkpoints needs timm.
TOWERS = ("fast_vlm", "gemma3n")
COLUMNS = ("`model_type`", "class", "tokens", "settings", "worst token")
_ROW = re.compile(r"^\| `(\w+)`[^|]* \| `\w+` \|.*\| ([^|]+) \|$", re.MULTILINE)
_VERSION = re.compile(r"transformers (\d+\.\d+\.\d+)")

HEAD = """# Model families

{count} families have a layout, which says where in an image each of its tokens lies. A family is an entry of `FAMILIES`
in `carve_kernels/hf/families.py` that names its kind of layout; a kind is a file in `carve_kernels/hf/layouts/`
([how to add one](contributing.md#add-a-model-family)).

{checked}

**A family that is not listed** works, too: its boxes are measured in the same way, once for each size of an image, and
`VisualLayout.measured` says so; the log names the `model_type`. `carve-kernels doctor --model DIR` draws the layout of
a checkpoint over an image, numbered token by token, and compares it with what it measures. Learned queries, codes and
cross-attention have no place that can be measured, and are refused.

The grid always comes from what the processor returned, never from a count; a count that does not fit it is an error
that names both. `layout_of(model, processor, inputs, images)` needs the images or their (height, width), since a
processor may not return them. An image with an EXIF orientation is refused, since some calls of a processor apply it
and others do not: rotate it first, with `PIL.ImageOps.exif_transpose`. Settings of a processor that do not fit the
model, such as the `patch_size` that files of older LLaVA processors lack, are refused by name.

**Another order of the images**, or another image, is noticed by the pixels in every family above: a few cells of the
tower's input are compared with the image, and inputs that do not show it are refused. Nothing is noticed of images that
are given as (height, width), whose sizes and numbers of tokens alone are checked; of families that are not listed; of
videos whose frames the processor chose, of SmolVLM's, and of several of InternVL's in a prompt; of modes other than 1,
L, LA, P, PA, RGB, RGBA, RGBX and CMYK; where images differ in other places than these cells; where nothing but padding
and its edge is in a cell (tiny images of Fuyu, Kimi-K2.5, Llama 4, DeepSeek-VL); and, in Idefics3 and SmolVLM, of an
image with tiles that one side enlarges much, if its longest edge was given to a call: how it was resized twice is then
open.
"""
CHECKED = """
**What was checked**, with the real class of each family, tiny and random, and its real processor: on photographs of
{shapes} pixels (width x height) the box of every token is where it is measured through the model's own processor and
vision tower, in the same order, within {tolerance} of its side, or of 4 pixels for smaller boxes; "worst token" is the
farthest. The tokens of {sizes} random sizes fit. {codes} embed codes of the image, which no gradient reaches: measured
is where their image is cut, not the order of their tokens. {edges} resizes the edge of its image twice with what is
around it: compared are a few cells with the image, and where it ends. {towers} have a vision tower of timm, in whose
place is one with the same grid. `python -m tests.hf.layouts.families_page` compares, and
writes this page: last with transformers {version}.
"""
VIDEOS = """
The videos of {names} have a layout, too: `layout_of(..., videos=)` and `CarveEngine.ask_video`. Each view has
its frames, and their seconds where the processor or the `Video` has them. The box and the frames of every token are
compared with a clip whose colours are coordinates. `video_llava` is in none of the tables above, since it is listed
with videos alone: its images are measured, like those of a family that is not listed.
"""
REFUSED = """## Refused

The image tokens of these have no place in an image; `layout_of` and the engine refuse them with this reason.

| `model_type` | reason |
| --- | --- |
"""
TAIL = """
## Cropped images

A centre crop hides 40 % of an image of 640 x 384 pixels: `CarveResult.unseen` is that share, and the command line
prints it. With `CarveEngine(..., fit="pad")` or `--fit pad` the image is pasted on a canvas of the processor's mean
colour that the model sees whole, and so is the refined image; maps, boxes and masks stay in pixels of the image. Where
the processor keeps the whole image, as with Qwen, nothing changes.

## Which model

`load` and `--model` accept a checkpoint directory of a model that takes images and text, `small` (the embedded model; a
directory of that name is `./small`), or the id of a model in the local hub cache, such as `Org/Name`. A directory takes
precedence over an id. Nothing is downloaded: an error names the command, `hf download Org/Name`. Images need no
torchvision: without it, `load` leaves out the part of a processor that handles videos. A torchvision that does not fit
torch breaks transformers itself; `carve-kernels doctor` says whether yours fits.
"""


class Checked(NamedTuple):
    """A processor of the tests, with the family of its model."""

    name: str
    model_type: str
    class_name: str
    family: Family


def families() -> list[str]:
    """The model types that have a layout."""
    return sorted(name for name, family in FAMILIES.items() if family.kind is not None)


@functools.cache
def checked() -> list[Checked]:
    """The processors of the tests whose model is listed with a layout."""
    found = []
    for name, each in pairs().items():
        kind = kinds()[each.kind]
        if name in UNLISTED:
            continue
        model_type = kind.make().config.model_type
        listed = [other for (type_, _), other in BY_PROCESSOR.items() if type_ == model_type]
        entry = listed[0] if listed and each.kind != model_type else FAMILIES[model_type]
        if entry.kind is not None:
            found.append(Checked(name, model_type, kind.class_name, entry))
    return found


def worst(name: str) -> str:
    """How far the farthest token is off on all shapes, for the page."""
    if not zoo_kind(name).exists():
        raise ValueError(f"names: transformers {transformers.__version__} has no {zoo_kind(name).class_name}")
    if name in CODES:
        return "only where the image is cut"
    if name in EDGES:
        return "only where the image ends"
    assert family(name).reason is None
    off = max(float(deviations(layout(name, size, {}), measure(*pair(name), size)).max()) for size in SHAPES)
    if off > TOLERANCE:
        raise ValueError(f"names: a token of {name} is {off:.3f} of its side off, at most {TOLERANCE} is allowed")
    return f"{off:.3f}"


def page(numbers: dict[str, str], version: str) -> str:
    """The page with the worst token of each processor."""
    shapes = ", ".join(f"{width} x {height}" for height, width in SHAPES)
    groups = {"codes": CODES, "edges": EDGES, "towers": TOWERS}
    named = {group: " and ".join(f"`{name}`" for name in names) for group, names in groups.items()}
    paragraph = CHECKED.format(version=version, shapes=shapes, tolerance=TOLERANCE, sizes=ALL, **named)
    filled = textwrap.fill(" ".join(paragraph.split()), 118, break_long_words=False, break_on_hyphens=False)
    text = HEAD.format(count=len(families()), checked=filled)
    rows = checked()
    for kind in sorted({row.family.kind for row in rows if row.family.kind}):
        text += f"\n## {kind.replace('_', ' ').capitalize()}\n\n{first_line(kind)}\n\n"
        text += f"| {' | '.join(COLUMNS)} |\n|{' --- |' * len(COLUMNS)}\n"
        for row in sorted(rows, key=lambda row: row.name):
            if row.family.kind == kind:
                text += line(row, numbers[row.name])
    videos = " ".join(VIDEOS.format(names=", ".join(f"`{name}`" for name in sorted(VIDEO_FAMILIES))).split())
    text += f"\n## Videos\n\n{textwrap.fill(videos, 118, break_long_words=False, break_on_hyphens=False)}\n\n{REFUSED}"
    text += "".join(f"| `{name}` | {each.reason} |\n" for name, each in sorted(FAMILIES.items()) if each.reason)
    return text + TAIL


def line(row: Checked, number: str) -> str:
    """The row of a processor: its name, the model's class and type, what stands for an image, what was tried."""
    name = f"`{row.name}`" if row.name == row.model_type else f"`{row.name}` (`{row.model_type}`)"
    tokens = "a placeholder in the prompt" if row.family.placeholder else "the model's own"
    tried = ", ".join(sorted({key for settings in OPTIONS.get(row.name, ()) for key in settings})) or "as it is"
    return f"| {name} | `{row.class_name}` | {tokens} | {tried} | {number} |\n"


def first_line(kind: str) -> str:
    """What the module of a kind says that it is."""
    text = import_module(f"carve_kernels.hf.layouts.{kind}").__doc__ or ""
    return text.strip().split("\n\n")[0].replace("\n", " ")


def numbers_of(text: str) -> dict[str, str]:
    """The worst token of each processor on a page."""
    return dict(_ROW.findall(text))


def version_of(text: str) -> str:
    """The version with which a page was written."""
    found = _VERSION.search(text)
    assert found is not None, "the page names no version of transformers"
    return found[1]


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare families with what is measured, and write docs/families.md.")
    parser.add_argument("names", nargs="*", help="processors of tests/support/processors; without any, all")
    names = parser.parse_args().names
    kept = numbers_of(PAGE.read_text(encoding="utf-8"))
    for row in checked():
        if not names or row.name in names:
            kept[row.name] = worst(row.name)
            print(f"{row.name}: {kept[row.name]}", flush=True)
    PAGE.write_text(page(kept, transformers.__version__), encoding="utf-8")


if __name__ == "__main__":
    main()
