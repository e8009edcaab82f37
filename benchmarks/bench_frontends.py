"""The release's and ViCrop's own programs beside our modules of the same names, checked, then timed in turns."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, Literal

import numpy as np
import typer
from PIL import Image

from benchmarks.support import lines, programs
from benchmarks.support.answers import WrongAnswer
from benchmarks.support.commands import (
    Csv,
    Hidden,
    Layers,
    Markdown,
    Output,
    Plot,
    Quick,
    Threads,
    check_output,
    progress,
    refuse_given,
    reporting,
    without_goals,
)
from benchmarks.support.frontends import (
    ANSWERS,
    LARGE,
    MAP,
    OURS,
    RELEASE,
    SIZES,
    THEIRS,
    Runs,
    Source,
    Subject,
    family_of,
    images,
    of_answers,
    of_map,
    of_release,
    peak_of,
    with_tower,
)
from benchmarks.support.lines import Goal, Line, line
from benchmarks.support.models import Shape
from benchmarks.support.timing import Spread, no_preparation, paired, ratio
from benchmarks.support.user_opponent import OpponentFailed
from carve_kernels import Preset

VERSIONS = ("v1", "v2", "v3", "v4")
GOALS = {RELEASE: 4.0, MAP: 1.5, ANSWERS: 1.5}
RATIO = f"{THEIRS} / {OURS}"
CPU_RATIO = f"{RATIO}, of CPU time"
# Of the largest value of a saliency or map, in float32.
NEAR = 1e-5


_PROGRAMS = {"--release": programs.release, "--vicrop": programs.vicrop}


def frontends(
    context: typer.Context,
    release: Annotated[Path | None, typer.Option(help="A checkout of YuyaoGe/CARVE; needs qwen_vl_utils.")] = None,
    vicrop: Annotated[Path | None, typer.Option(help="A checkout of zenjieli/mllms_know.")] = None,
    quick: Quick = False,
    layers: Layers = 28,
    hidden: Hidden = 1024,
    dtype: Annotated[
        Literal["float32", "bfloat16"], typer.Option(help="Of the timing; answers are checked in float32.")
    ] = "float32",
    family: Annotated[Literal["qwen2_5", "llava"], typer.Option(help="The model of the release.")] = "qwen2_5",
    version: Annotated[list[str] | None, typer.Option(help="Of the release, may be repeated; v1 to v4.")] = None,
    count: Annotated[int, typer.Option("--images", min=1, max=3, help="How many images.")] = 3,
    new_tokens: Annotated[int, typer.Option(min=2, help="New tokens of an answer of the release.")] = 8,
    part: Annotated[Literal["all", "seconds", "memory"], typer.Option(help="What to measure.")] = "all",
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    model: Annotated[Path | None, typer.Option(help="Your checkpoint instead of the random model.")] = None,
    threads: Threads = None,
    output: Output = None,
    csv_file: Csv = None,
    plot_file: Plot = None,
    markdown: Markdown = None,
) -> None:
    """The release's and ViCrop's own programs, from your folders, against the modules of the same names."""
    check_output("--markdown", markdown)
    if release is None and vicrop is None:
        raise typer.BadParameter("expected --release, --vicrop or both: a folder with the program")
    versions = version or list(VERSIONS)
    if unknown := sorted(set(versions) - set(VERSIONS)):
        raise typer.BadParameter(f"--version: expected some of {list(VERSIONS)}, got {unknown}")
    if model is not None:
        refuse_given(context, ("layers", "hidden", "family"))
    shape = Shape(layers, hidden, dtype)
    if quick:
        shape, count, new_tokens, rounds = Shape(2, 128, dtype), 1, 2, 1
    try:
        kind = family_of(model) if model is not None else family
    except (ValueError, ImportError) as error:
        raise typer.BadParameter(f"--model: {str(error).removeprefix('model: ')}") from error
    if vicrop is not None and model is not None and kind != "llava":
        raise typer.BadParameter("--vicrop: its program is for LLaVA-1.5, and --model is not")
    where = None if model is None else str(model)
    families = {"--release": kind, "--vicrop": "llava"}
    shapes = {option: shape if quick else with_tower(shape, name) for option, name in families.items()}
    sources = {option: Source(name, shapes[option], where) for option, name in families.items()}
    folders = {option: folder for option, folder in (("--release", release), ("--vicrop", vicrop)) if folder}
    try:
        modules = {option: _PROGRAMS[option](folder) for option, folder in folders.items()}
    except programs.BadProgram as error:
        raise typer.BadParameter(str(error)) from error
    with (
        reporting("frontends", output, threads, lines.tables, csv_file, plot_file) as report,
        progress(_total(folders, part, count, versions)) as advance,
    ):
        report["settings"] = {"rounds": rounds, "dtype": dtype}
        report["settings"] |= {"model": model.resolve().name} if model is not None else shape._asdict()
        entries: list[Line] = []
        options: dict[str, Any] = {"count": count, "rounds": rounds, "advance": advance}
        if part != "memory":
            if "--release" in modules:
                entries += measure_release(
                    modules["--release"], sources["--release"], dtype,
                    versions=versions, new_tokens=new_tokens, **options,
                )  # fmt: skip
            if "--vicrop" in modules:
                entries += measure_vicrop(modules["--vicrop"], sources["--vicrop"], dtype, **options)
        if part != "seconds":
            for option, folder in folders.items():
                entries += memory(option, folder, sources[option], dtype, new_tokens=new_tokens, advance=advance)
        report["results"] = without_goals(entries) if quick else entries
    if markdown is not None:
        markdown.write_text(lines.markdown(report))


def _total(folders: dict[str, Path], part: str, count: int, versions: Sequence[str]) -> int:
    timed = {"--release": count * len(versions), "--vicrop": 2 * count}
    peaks = {"--release": 1, "--vicrop": 2}
    return sum((part != "memory") * timed[option] + (part != "seconds") * peaks[option] for option in folders)


def measure_release(
    program: ModuleType,
    source: Source,
    dtype: str,
    *,
    versions: Iterable[str],
    count: int,
    new_tokens: int,
    rounds: int,
    advance: Callable[[str], None],
) -> list[Line]:
    """Seconds of `carve` of both, by version and image, after saliency, mask, box, refined image and answers agree."""
    chosen = [(version, image) for version in versions for image in images(SIZES[source.family])[-count:]]

    def runs(subject: Subject) -> Iterable[tuple[dict[str, Any], Runs]]:
        for version, image in chosen:
            labels = {"family": source.family, "version": version, "image": _size(image), "new tokens": new_tokens}
            yield labels, of_release(program, subject, image, version, new_tokens)

    return _measured(RELEASE, source, dtype, runs, same_results, rounds, advance)


def measure_vicrop(
    program: ModuleType,
    source: Source,
    dtype: str,
    *,
    count: int,
    rounds: int,
    advance: Callable[[str], None],
) -> list[Line]:
    """Seconds of the map with its box, and of the answers, of both, after they agree."""
    chosen = images(LARGE)[-count:]

    def maps(subject: Subject) -> Iterable[tuple[dict[str, Any], Runs]]:
        for image in chosen:
            yield {"image": _size(image)}, of_map(program, subject, image)

    def answers(subject: Subject) -> Iterable[tuple[dict[str, Any], Runs]]:
        for image in chosen:
            with tempfile.TemporaryDirectory() as folder:
                file = Path(folder, "image.png")
                image.save(file)
                yield {"image": _size(image)}, of_answers(program, subject, file)

    found = _measured(MAP, source, dtype, maps, same_maps, rounds, advance)
    return found + _measured(ANSWERS, source, dtype, answers, same_answers, rounds, advance)


def memory(
    option: str, folder: Path, source: Source, dtype: str, *, new_tokens: int, advance: Callable[[str], None]
) -> list[Line]:
    """Peaks of both in fresh processes."""
    found = []
    for what in (RELEASE,) if option == "--release" else (MAP, ANSWERS):
        peaks = {who: peak_of(what, who, folder, source, dtype, new_tokens) for who in (THEIRS, OURS)}
        share = peaks[THEIRS].tensors / peaks[OURS].tensors
        sizes = {who: peak.tensors for who, peak in peaks.items()}
        sizes |= {f"{who}, resident": peak.resident for who, peak in peaks.items()}
        labels = {"what": what, "family": source.family, "dtype": dtype}
        ratios = {RATIO: Spread(share, share, share, 1)}
        found.append(line("peak memory of one call: MiB of tensors", labels, ratios, [], sizes=sizes))
        advance(f"memory, {what}")
    return found


def _measured(
    name: str,
    source: Source,
    dtype: str,
    runs: Callable[[Subject], Iterable[tuple[dict[str, Any], Runs]]],
    check: Callable[[str, Any, Any], dict[str, Any]],
    rounds: int,
    advance: Callable[[str], None],
) -> list[Line]:
    """Lines of all cases; checked in float32, whatever the dtype of the timing."""
    exact = source.subject("float32")
    checked = [check(f"{name}, {labels}", *_both(name, case)) for labels, case in runs(exact)]
    subject = exact if dtype == "float32" else source.subject(dtype)
    found = []
    for (labels, case), differences in zip(runs(subject), checked, strict=True):
        cpu = {who: OfProcessor(run) for who, run in case.items()}
        seconds = paired(cpu, rounds=rounds, before=no_preparation, warm_up=dtype != "float32")
        goal = Goal(RATIO, GOALS[name])
        spent = {who: run.seconds[-len(seconds[who]) :] for who, run in cpu.items()}
        ratios = {RATIO: ratio(seconds, THEIRS, OURS), CPU_RATIO: ratio(spent, THEIRS, OURS)}
        named = {**labels, "dtype": dtype, **differences}
        found.append(line(f"{name}: ms", named, ratios, [goal], seconds=seconds))
        advance(f"{name}, {labels}")
    return found


class OfProcessor:
    """A run whose calls also note the time of the processor, which other work on the machine changes less."""

    def __init__(self, run: Callable[[], Any]) -> None:
        self._run = run
        self.seconds: list[float] = []

    def __call__(self) -> None:
        start = time.process_time()
        self._run()
        self.seconds.append(time.process_time() - start)


def _both(name: str, case: Runs) -> tuple[Any, Any]:
    try:
        theirs = case[THEIRS]()
    except Exception as error:
        raise OpponentFailed(f"{name}: its program raised {type(error).__name__}: {error}") from error
    return theirs, case[OURS]()


def same_results(name: str, theirs: Any, ours: Any) -> dict[str, Any]:
    """The largest difference of the saliencies over the largest value, and the pixels whose masks differ.

    Masks may differ in pixels that are as near to the threshold as the saliencies are; all else must be equal.
    """
    error = _near(name, theirs.sum_att_map, ours.sum_att_map)
    saliency, mask = np.asarray(theirs.sum_att_map), np.asarray(theirs.mask_map)
    if not 0 < mask.mean() < 1:
        raise WrongAnswer(f"{name}: expected a mask of a part of the image, got {mask.mean():.2f} of it")
    other = mask != np.asarray(ours.mask_map)
    threshold = np.percentile(saliency, 100 * (1 - Preset.release().keep))
    beyond = int((other & (np.abs(saliency - threshold) > NEAR * saliency.max())).sum())
    if beyond:
        raise WrongAnswer(f"{name}: expected the same mask of both, got {beyond} other pixels of {mask.size}")
    pairs = {
        "box": (tuple(theirs.bbox), tuple(ours.bbox)),
        "answer": (theirs.original_answer, ours.original_answer),
        "refined answer": (theirs.refined_answer, ours.refined_answer),
    }
    if not other.any():
        pairs["refined image"] = theirs.refined_image.tobytes(), ours.refined_image.tobytes()
    _equal(name, pairs)
    return {"error": f"{error:.1e}", "other pixels": int(other.sum())}


def same_maps(name: str, theirs: Any, ours: Any) -> dict[str, Any]:
    error = _near(name, theirs[0], ours[0])
    _equal(name, {"box": (tuple(theirs[1]), tuple(ours[1]))})
    return {"error": f"{error:.1e}"}


def same_answers(name: str, theirs: Any, ours: Any) -> dict[str, Any]:
    names = "answer", "answer about both images", "box"
    _equal(name, dict(zip(names, zip(map(_plain, theirs), map(_plain, ours), strict=True), strict=True)))
    return {}


def _plain(found: Any) -> Any:
    return found.strip() if isinstance(found, str) else tuple(found)


def _equal(name: str, pairs: dict[str, tuple[Any, Any]]) -> None:
    for part, (theirs, ours) in pairs.items():
        if theirs != ours:
            texts = [] if isinstance(theirs, bytes) else [f": {theirs!r} and {ours!r}"]
            raise WrongAnswer("".join([f"{name}: expected the same {part} of both, got others", *texts]))
        if isinstance(theirs, str) and not theirs:
            raise WrongAnswer(f"{name}: expected a {part} with words, got none")


def _near(name: str, theirs: Any, ours: Any) -> float:
    theirs, ours = np.asarray(theirs, np.float64), np.asarray(ours, np.float64)
    if theirs.shape != ours.shape:
        raise WrongAnswer(f"{name}: expected a map {theirs.shape}, got {ours.shape}")
    if not float(np.ptp(theirs)) > 0.1 * float(theirs.max()):
        raise WrongAnswer(f"{name}: expected a map with a peak, got a flat one")
    error = float(np.abs(theirs - ours).max() / theirs.max())
    # `not <=` instead of `>`, so that NaN fails.
    if not error <= NEAR:
        raise WrongAnswer(f"{name}: expected maps within {NEAR:g} of the largest value, got {error:.1e}")
    return error


def _size(image: Image.Image) -> str:
    return f"{image.width} x {image.height}"
