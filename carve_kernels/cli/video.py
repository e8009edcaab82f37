"""What `carve-kernels run --video` writes: a strip of key frames, animations, arrays, a record."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy
from PIL import features

from carve_kernels.animation import animation, seconds_of, strip
from carve_kernels.cli.ask import model_facts, quiet
from carve_kernels.cli.digests import file_digest
from carve_kernels.cli.ours import is_json, png_info, png_texts, write_json
from carve_kernels.cli.output import clock, number_of, one_line, replace_files, say, stages, versions
from carve_kernels.hf.engine.engine import STAGES, CarveEngine
from carve_kernels.hf.engine.video import VideoResult
from carve_kernels.hf.videos import Video
from carve_kernels.maps import is_saved
from carve_kernels.presets import Preset
from carve_kernels.video import VideoSaliency

RECORD = "video.json"
_KIND = "carve_kernels.video"
_STRIP = "strip.png"


def files() -> tuple[str, ...]:
    """The files of a question about a video, none of which one about images has; the record comes last."""
    suffix = "webp" if features.check("webp") else "gif"
    return (_STRIP, f"saliency.{suffix}", f"refined.{suffix}", "saliency-frames.npy", "maps-frames.safetensors", RECORD)


def ask(
    output: Path,
    video: Video,
    question: str,
    preset: Preset,
    load: Callable[[], tuple[Any, Any]],
    **options: Any,
) -> VideoResult:
    """Ask about a video, write the results into a folder, print a summary; `options` are the engine's."""
    names = files()
    imported = clock.seconds()
    with replace_files(output, names, is_ours) as folder, quiet(), stages(2 + len(STAGES)) as announce:
        announce("loading the model")
        model, processor = load()
        engine = CarveEngine(model, processor, preset=preset, **options)
        result = engine.ask_video(
            video, question, on_progress=lambda stage, *_: announce(stage) if stage in STAGES else None
        )
        announce("writing")
        seconds = {"imports": imported, "total": clock.seconds()}
        write(folder, result, record(result, model_facts(model), seconds))
    _summarise(result, output, names)
    return result


def record(result: VideoResult, model: Mapping[str, Any], seconds: Mapping[str, float]) -> dict[str, Any]:
    """Every number of a result, ready for JSON."""
    video = result.video
    mass = result.saliency.mass().tolist()
    return {
        "question": result.question,
        "video": {
            "path": video.path, "frames": len(video), "seconds": list(video.seconds), "duration": video.duration,
            "width": video.size[1], "height": video.size[0],
        },
        "model": dict(model),
        "preset": result.preset.to_dict(),
        "answer": result.answer,
        "refined_answer": result.refined_answer,
        "reason": result.reason,
        "box": list(result.box),
        "boxes": result.regions.boxes.tolist(),
        "scores": result.regions.scores.tolist(),
        "refined": {
            "frames": len(result.refined), "seconds": [*result.refined.seconds, result.refined.duration],
            "width": result.refined.size[1], "height": result.refined.size[0],
        },
        "key_frames": [{"frame": frame, "seconds": video.seconds[frame], "share": mass[frame]}
                       for frame in result.key_frames],
        "share": mass,
        "views": [
            {"grid": list(view.grid), "box": list(view.box), "frame": list(view.frame or ()),
             "seconds": list(view.seconds or ())}
            for view in result.layout.views[0]
        ],
        "seconds": {**result.seconds, **seconds},
        "versions": versions(),
    }  # fmt: skip


def is_ours(path: Path) -> bool:
    """Whether a file with one of the names of `files` is as this module wrote it."""
    if path.name == _STRIP:
        return png_texts(path) is not None
    if path.suffix in (".webp", ".gif", ".npy"):
        # They cannot hold a mark, so the strip beside them identifies them.
        texts = png_texts(path.with_name(_STRIP))
        return texts is not None and texts.get(path.name) == file_digest(path)
    return is_saved(path) if path.suffix == ".safetensors" else is_json(_KIND)(path)


def write(folder: Path, result: VideoResult, facts: Mapping[str, Any]) -> None:
    """Write every file of `files`; `facts` are the record."""
    _, heat, refined, array, maps, record_name = files()
    video, saliency = result.video, result.saliency
    ends = [*video.seconds, video.duration]
    animation(folder / heat, video.frames, saliency, regions=result.regions, seconds=ends)
    animation(folder / refined, result.refined.frames, seconds=[*result.refined.seconds, result.refined.duration])
    _write_frames(folder / array, saliency)
    page = strip(
        video.frames, saliency, chosen=result.key_frames, seconds=video.seconds, shares=saliency.mass().tolist(),
        title=result.question, caption=_caption(result),
    )  # fmt: skip
    marks = {name: file_digest(folder / name) or "" for name in (heat, refined, array)}
    page.save(folder / _STRIP, pnginfo=png_info(**marks))
    result.task.save(folder / maps)
    write_json(folder / record_name, _KIND, facts)


def _write_frames(path: Path, saliency: VideoSaliency) -> None:
    """The saliency of all frames as a .npy file, float32 [F, h, w] in the size that regions are selected on."""
    size = saliency.reduced_size()
    array = numpy.lib.format.open_memmap(path, mode="w+", dtype=numpy.float32, shape=(len(saliency), *size))
    for number in range(len(saliency)):
        array[number] = saliency.frame(number, size).cpu().numpy()
    array.flush()


def _caption(result: VideoResult) -> str:
    answers = f"Plain answer: {one_line(result.answer)}\n" if result.answer else ""
    answers += f"Refined answer: {one_line(result.refined_answer)}"
    return f"{answers}\n{_kept(result)}. Above: the frames with the largest shares of the contrast."


def _kept(result: VideoResult) -> str:
    if result.regions.reason is not None:
        return f"The whole video is kept: {result.regions.reason}"
    x0, y0, f0, x1, y1, f1 = result.box
    begin, end = seconds_of(result.video.seconds[f0]), seconds_of(result.video.end(f1 - 1))
    frames = f"frames {f0} to {f1 - 1}" if f1 > f0 + 1 else f"frame {f0}"
    return f"Kept: {frames} of {len(result.video)}, numbered from 0 ({begin} to {end}), pixels {x0},{y0} to {x1},{y1}"


def _summarise(result: VideoResult, folder: Path, names: tuple[str, ...]) -> None:
    say(f"question: {one_line(result.question)}")
    if result.answer:
        say(f"plain answer: {one_line(result.answer)}")
    say(f"refined answer: {one_line(result.refined_answer)}")
    say(_kept(result))
    times = ", ".join(seconds_of(result.video.seconds[frame]) for frame in result.key_frames)
    say(f"{number_of(len(result.key_frames), 'key frame')}: {times}")
    if result.reason is not None and result.regions.reason is None:
        say(result.reason, "yellow", stderr=True)
    say(f"{folder}/: {', '.join(names)}")
