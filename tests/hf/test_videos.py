"""Videos: real files are written and opened again, with the frames in the middle of equal times, upright."""

from __future__ import annotations

import struct
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy
import pytest
from PIL import Image

from carve_kernels.hf.videos import Video, open_video


def planted(number: int, size: tuple[int, int]) -> numpy.ndarray:
    """A frame whose brightness is its number, with a light corner at the upper left."""
    width, height = size
    frame = numpy.full((height, width, 3), 12 * number + 8, dtype=numpy.uint8)
    frame[: height // 4, : width // 4] = 255
    return frame


def write(
    path: Path, count: int = 20, fps: int = 10, size: tuple[int, int] = (64, 48), codec: str = "mpeg4", gap: int = 0
) -> Path:
    """A video of `count` planted frames; with a gap the second half begins so many frames later."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=fps, options={"g": "5"})
        stream.width, stream.height = size
        stream.pix_fmt = "yuv420p"
        stream.time_base = Fraction(1, fps)
        for number in range(count):
            frame = av.VideoFrame.from_ndarray(planted(number, size), format="rgb24")
            frame.pts = number + (gap if number >= count // 2 else 0)
            frame.time_base = Fraction(1, fps)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def numbers(video: Video) -> list[int]:
    """The numbers of planted frames."""
    return [round((numpy.asarray(frame)[-5:, -5:].mean() - 8) / 12) for frame in video.frames]


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "avi"])
@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"max_frames": 4}, [2, 7, 12, 17]),
        ({"max_frames": 1}, [10]),
        ({"max_frames": 3}, [3, 10, 16]),
        ({"max_frames": 99}, list(range(20))),
        ({"max_frames": 99, "fps": 2}, [2, 7, 12, 17]),
        ({"max_frames": 2, "fps": 2}, [5, 15]),
        ({"fps": 1e9}, list(range(20))),
        ({"fps": 0.01}, [10]),
    ],
)
def test_frames_are_in_the_middle_of_equal_times(
    suffix: str, options: dict[str, Any], wanted: list[int], tmp_path: Path
) -> None:
    video = open_video(write(tmp_path / f"clip.{suffix}"), **options)
    assert numbers(video) == wanted
    assert video.seconds == pytest.approx([number / 10 for number in wanted], abs=2e-3)
    assert video.duration == pytest.approx(2.0, abs=2e-3) and video.fps == pytest.approx(10, abs=0.02)
    assert video.total == 20 and video.size == (48, 64)
    assert video.metadata["frames_indices"] == wanted and video.metadata["total_num_frames"] == 20
    assert video.end(len(video) - 1) == video.duration


def test_times_of_an_uneven_rate_are_kept(tmp_path: Path) -> None:
    video = open_video(write(tmp_path / "clip.mkv", gap=30), max_frames=5)
    # Five seconds: frames 0 to 9 in the first one, then the last of them stands for three.
    assert numbers(video) == [5, 9, 15]
    assert video.seconds == pytest.approx([0.5, 0.9, 4.5], abs=2e-3)
    times = [number / video.fps for number in video.metadata["frames_indices"]]
    assert times == pytest.approx(video.seconds, abs=0.5 / video.fps + 1e-9)


def rotate(path: Path, degrees: int) -> Path:
    """Write a rotation into the matrix of the track of an MP4, as a phone does."""
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 4 + 40
    one = 1 << 16
    turned = {90: (0, one, -one, 0), 180: (-one, 0, 0, -one), 270: (0, -one, one, 0)}[degrees]
    a, b, c, d = turned
    data[at : at + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    ("degrees", "corner"), [(90, (slice(0, 8), slice(-8, None))), (180, (slice(-8, None), slice(-8, None))),
                            (270, (slice(-8, None), slice(0, 8)))]
)  # fmt: skip
def test_a_rotated_video_is_upright(degrees: int, corner: Any, tmp_path: Path) -> None:
    # Clockwise from the upper left, as players show it.
    video = open_video(rotate(write(tmp_path / "clip.mp4"), degrees), max_frames=2)
    assert video.size == ((48, 64) if degrees == 180 else (64, 48))
    frame = numpy.asarray(video.frames[0])
    assert frame[corner].min() > 200 and (frame > 200).mean() < 0.1


def test_progress_is_reported(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    open_video(write(tmp_path / "clip.mp4"), max_frames=3, progress=lambda done, all: seen.append((done, all)))
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_a_video_is_cropped_in_space_and_time(tmp_path: Path) -> None:
    video = open_video(write(tmp_path / "clip.mp4"), max_frames=4)
    part = video.crop((16, 4, 1, 60, 40, 3))
    assert len(part) == 2 and part.size == (36, 44) and part.seconds == video.seconds[1:3]
    assert part.duration == video.seconds[3] and part.metadata["frames_indices"] == [7, 12]
    assert part.frames[0].tobytes() == video.frames[1].crop((16, 4, 60, 40)).tobytes()
    assert video.crop((0, 0, 3, 9, 9, 4), least=2).seconds == video.seconds[2:]
    assert video.crop((0, 0, 0, 9, 9, 1), least=9).seconds == video.seconds
    with pytest.raises(ValueError, match="box: expected a part of 4 frames 64 wide and 48 high"):
        video.crop((0, 0, 0, 64, 48, 5))


def sound_alone(path: Path) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        stream.layout = "mono"
        frame = av.AudioFrame.from_ndarray(numpy.zeros((1, 800), dtype=numpy.int16), format="s16", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def broken(path: Path) -> Path:
    path.write_bytes(b"no video at all" * 100)
    return path


def empty(path: Path) -> Path:
    path.write_bytes(b"")
    return path


@pytest.mark.parametrize(
    ("make", "options", "error", "message"),
    [
        (lambda path: path, {}, ValueError, "^path: .* is missing"),
        (lambda path: path.parent, {}, ValueError, "^path: .* is not a file"),
        (lambda path: 3, {}, TypeError, "^path: expected a path, got int 3"),
        (broken, {}, ValueError, "^path: .* cannot be read as a video"),
        (empty, {}, ValueError, "^path: .* cannot be read as a video"),
        (sound_alone, {}, ValueError, "^path: .* has no video, only audio"),
        (write, {"max_image_pixels": 3071}, ValueError, "^path: .* is too large: 64 x 48 pixels a frame, at most 3071"),
        (write, {"max_frames": 0}, ValueError, "max_frames: expected an integer of at least 1"),
        (write, {"fps": 0}, ValueError, "fps: expected a number above 0"),
        (write, {"fps": "2"}, TypeError, "fps: expected a number"),
        (write, {"progress": 3}, TypeError, "progress: expected a function"),
    ],
)
def test_what_is_no_video_is_named(
    make: Any, options: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        open_video(make(tmp_path / "clip.mkv"), **options)


def test_a_damaged_end_leaves_the_frames_before_it(tmp_path: Path) -> None:
    path = write(tmp_path / "clip.mkv")
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 3 // 5])
    video = open_video(path, max_frames=3)
    assert 0 < len(video) <= 3 and video.duration < 2


def test_damaged_frames_are_left_out_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path / "clip.mkv", codec="ffv1")
    data = bytearray(path.read_bytes())
    for index in range(len(data) // 2, len(data) * 3 // 5):
        data[index] ^= 0x5A
    path.write_bytes(data)
    video = open_video(path)
    assert 8 <= len(video) < 20 and numbers(video)[:8] == list(range(8))
    lost = video.total - len(video)
    assert lost >= 1 and f"is damaged, {lost} of {video.total} frames cannot be decoded" in caplog.text


def test_frames_that_would_fill_the_memory_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("carve_kernels.hf.videos.MAX_PIXELS", 5 * 64 * 48)
    path = write(tmp_path / "clip.mp4")
    assert len(open_video(path, max_frames=5)) == 5
    with pytest.raises(ValueError, match=r"max_frames: 6 frames of 64 x 48 pixels are too many .* at most 5"):
        open_video(path, max_frames=6)


def test_without_pyav_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "clip.mp4")
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ImportError, match=r"a video needs av, which is missing; pip install 'carve-kernels\[video\]'"):
        open_video(path)


def test_frames_of_no_video_or_of_several_sizes_are_refused() -> None:
    frame = Image.new("RGB", (4, 4))
    with pytest.raises(ValueError, match="frames: expected at least one frame, got none"):
        Video((), (), 1.0, 1.0, 0)
    with pytest.raises(ValueError, match=r"seconds: expected ascending times, got \(1\.0, 1\.0\)"):
        Video((frame, frame), (1.0, 1.0), 2.0, 1.0, 2)
    with pytest.raises(ValueError, match=r"frames\[1\]: expected an RGB image, got mode L"):
        Video((frame, frame.convert("L")), (0.0, 1.0), 2.0, 1.0, 2)
    with pytest.raises(TypeError, match=r"frames\[0\]: expected a PIL image, got a NumPy array of float64"):
        Video((numpy.zeros((4, 4, 3)),), (0.0,), 1.0, 1.0, 1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="frames: expected frames of one size"):
        Video((frame, Image.new("RGB", (5, 4))), (0.0, 1.0), 2.0, 1.0, 2)
    with pytest.raises(ValueError, match="seconds: expected one for each of 1 frames, got 2"):
        Video((frame,), (0.0, 1.0), 2.0, 1.0, 2)
