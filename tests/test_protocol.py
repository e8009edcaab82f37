"""The protocol: backends and frontends that conform pass, planted wrong ones do not, and installed ones are found."""

from __future__ import annotations

import dataclasses
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from PIL import Image

from carve_kernels.arrays import as_tensor
from carve_kernels.checks import BackendUnavailable
from carve_kernels.conformance import NotConforming, check, check_frontend
from carve_kernels.plugin import KernelsBackend, backend
from carve_kernels.protocol import VERSION, CarveBackend, discover, discover_frontends
from carve_kernels.types import Capture, Regions

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def toys(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Any, Callable[[CarveBackend], Any]]]:
    for name in ("toy_backend", "toy_frontend"):
        monkeypatch.syspath_prepend(str(ROOT / "examples" / name))
    from toy_backend import backend as toy  # type: ignore[import-not-found]
    from toy_frontend import point  # type: ignore[import-not-found]

    yield toy, point
    for name in ("toy_backend", "toy_frontend"):
        del sys.modules[name]


@pytest.mark.parametrize("kernels", ["auto", "reference"])
def test_this_package_conforms(kernels: str) -> None:
    assert isinstance(backend, CarveBackend) and backend.version == VERSION
    check(KernelsBackend(kernels))


def test_this_package_conforms_with_a_model() -> None:
    check(backend, model="small", image=Image.new("RGB", (96, 64), "gray"))


def test_conformance_both_ways(toys: tuple[Any, Callable[[CarveBackend], Any]]) -> None:
    toy, point = toys
    check(toy)
    for engine in (backend, toy):
        check_frontend(point, engine)
        x0, y0, x1, y1 = point(engine)
        # The planted token covers columns 40 to 50 and rows 20 to 30.
        assert x0 <= 40 < 50 <= x1 and y0 <= 20 < 30 <= y1


class Changed:
    """Our backend on the reference, one call of which is wrong."""

    def __init__(self, **methods: Any) -> None:
        self._right = KernelsBackend("reference")
        for name, method in methods.items():
            setattr(self, name, method)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._right, name)


RIGHT = KernelsBackend("reference")


def doubled(*args: Any, scale: Any, **options: Any) -> Capture:
    return RIGHT.maps(*args, scale=2 * scale if isinstance(scale, float) else scale, **options)


def nats(*args: Any, **options: Any) -> Capture:
    found = RIGHT.maps(*args, **options)
    return found._replace(entropy=found.entropy * 5)


def refuses_lists(task: Any, *args: Any, **options: Any) -> Any:
    if isinstance(task, list):
        raise TypeError("task: expected a tensor")
    return RIGHT.contrast(task, *args, **options)


def writes_into_its_argument(saliency: Any, **options: Any) -> Regions:
    found = RIGHT.regions(saliency, **options)
    if not isinstance(saliency, list):
        saliency[0, 0] = -1
    return found


def pads_ragged_lists(saliency: Any, **options: Any) -> Regions:
    if isinstance(saliency, list):
        width = max(map(len, saliency))
        saliency = [row + [0.0] * (width - len(row)) for row in saliency]
    return RIGHT.regions(saliency, **options)


def inclusive(saliency: Any, **options: Any) -> Regions:
    found = RIGHT.regions(saliency, **options)
    return dataclasses.replace(found, boxes=found.boxes - torch.tensor([0, 0, 1, 1]))


def nearest(task: Any, general: Any, grid: Any, size: Any, **options: Any) -> Any:
    if isinstance(grid, list):
        return RIGHT.contrast(task, general, grid, size, **options)
    small = RIGHT.contrast(task, general, grid, grid, **options)
    RIGHT.contrast(task, general, grid, size, **options)
    return torch.nn.functional.interpolate(small[None, None], size, mode="nearest")[0, 0]


def each_view_alone(task: Any, general: Any, grid: Any, size: Any, **options: Any) -> Any:
    if not isinstance(grid, list):
        return RIGHT.contrast(task, general, grid, size, **options)
    first = grid[0][0] * grid[0][1]
    parts = (slice(first), slice(first, None))
    return [RIGHT.contrast(task[..., part], general[..., part], *each) for part, *each in zip(parts, grid, size)]  # noqa: B905


def without(method: str, *names: str) -> Callable[..., Any]:
    """A method that does not read some of its options."""

    def call(*args: Any, **options: Any) -> Any:
        getattr(RIGHT, method)(*args, **options)  # the errors stay
        return getattr(RIGHT, method)(*args, **{name: value for name, value in options.items() if name not in names})

    return call


def says(name: str, other: str) -> Callable[..., Any]:
    """A contrast whose errors name another argument."""

    def call(*args: Any, **options: Any) -> Any:
        try:
            return RIGHT.contrast(*args, **options)
        except (TypeError, ValueError) as error:
            raise type(error)(str(error).replace(name, other)) from error

    return call


def any_size(saliency: Any, *, min_size: Any = None, **options: Any) -> Regions:
    return RIGHT.regions(saliency, **options, min_size=min_size and 1)


def counts_small_ones(saliency: Any, **options: Any) -> Regions:
    """Small regions are removed from what was selected."""
    min_size = options.pop("min_size", None)
    if min_size is None or set(options) <= {"keep", "score"}:
        return RIGHT.regions(saliency, **options, min_size=min_size)
    found = RIGHT.regions(saliency, **options)
    large = [
        index for index, box in enumerate(found.boxes.tolist()) if (box[2] - box[0]) * (box[3] - box[1]) >= min_size
    ]
    return dataclasses.replace(found, boxes=found.boxes[large], scores=found.scores[large])


def nothing_without_a_reason(saliency: Any, **options: Any) -> Regions:
    found = RIGHT.regions(saliency, **options)
    if options.get("min_size") is None or found.reason is None:
        return found
    return dataclasses.replace(found, mask=torch.zeros_like(found.mask), reason=None)


def first_box_alone(*args: Any, box: Any = None, **options: Any) -> Any:
    if isinstance(box, list):
        RIGHT.carve(*args, box=box, **options)
        box = [box[0]] * len(box)
    return RIGHT.carve(*args, box=box, **options)


def keep_of_the_image(*args: Any, box: Any = None, preset: Any = "paper", **options: Any) -> Any:
    right = RIGHT.carve(*args, box=box, preset=preset, **options)
    if right.reason is not None:
        return right
    other = {**preset, "keep": preset["keep"] * right.seen.numel() / int(right.seen.sum())}
    return RIGHT.carve(*args, box=box, preset=other, **options)


def highest(*args: Any, preset: Any = "paper", **options: Any) -> Any:
    return RIGHT.carve(*args, preset={**preset, "overlap": "max"} if isinstance(preset, dict) else preset, **options)


def cuts_boxes(image: Any, *args: Any, box: Any = None, **options: Any) -> Any:
    if isinstance(box, tuple):
        box = (*box[:2], min(box[2], len(image[0]) if isinstance(image, numpy.ndarray) else image.width), box[3])
    return RIGHT.carve(image, *args, box=box, **options)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "another scale": ({"maps": doubled}, "maps of a torch tensor: maps"),
    "positions are not read": ({"maps": without("maps", "positions")}, "maps of a torch tensor with positions"),
    "a softcap is not read": ({"maps": without("maps", "softcap")}, "maps of a list with softcap"),
    "a window is not read": ({"maps": without("maps", "window")}, "maps of a list with positions with window"),
    "a sink is not read": ({"maps": without("maps", "sink")}, "maps of a list with sink"),
    "heads are not read": ({"maps": without("maps", "heads")}, "maps of a list with heads"),
    "a mask is not read": ({"maps": without("maps", "mask")}, "maps of a list with mask"),
    "entropy that is not a share": ({"maps": nats}, "entropy"),
    "a tuple": ({"maps": lambda *args, **options: tuple(RIGHT.maps(*args, **options))}, "expected a Capture"),
    "lists are refused": ({"contrast": refuses_lists}, "task: expected a tensor"),
    "lam is not read": ({"contrast": without("contrast", "lam")}, "'lam': 0.25"),
    "layer weights are not read": ({"contrast": without("contrast", "layer_weights")}, "layer_weights"),
    "step weights are not read": ({"contrast": without("contrast", "step_weights")}, "step_weights"),
    "not normalised": ({"contrast": without("contrast", "normalize")}, "minmax"),
    "upsampled to the nearest": ({"contrast": nearest}, "contrast of a NumPy array with {}"),
    "each view alone": ({"contrast": each_view_alone}, "view 0"),
    "arrays come back": ({"contrast": lambda *a, **o: numpy.asarray(RIGHT.contrast(*a, **o))}, "expected a tensor"),
    "an error names another argument": ({"contrast": says("grid", "shape")}, "begins with grid"),
    "connectivity is not read": ({"regions": without("regions", "connectivity")}, "'connectivity': 8"),
    "min_size is not read": ({"regions": any_size}, "'min_size': 5"),
    "small regions count": ({"regions": counts_small_ones}, "'min_size': 2, 'top': 2"),
    "nothing is left without a reason": ({"regions": nothing_without_a_reason}, "all below min_size"),
    "the score is not read": ({"regions": without("regions", "score")}, "'score': 'mean'"),
    "edges are inclusive": ({"regions": inclusive}, "boxes"),
    "an argument is changed": ({"regions": writes_into_its_argument}, "as it was"),
    "ragged lists are padded": ({"regions": pads_ragged_lists}, "saliency (a ragged list)"),
    "a flat saliency has a region": (
        {"regions": lambda *a, **o: dataclasses.replace(RIGHT.regions(*a, **o), reason=None)}, "flat"
    ),
    "a box is not read": ({"carve": without("carve", "box")}, "carve of a box: seen"),
    "boxes are not read": ({"carve": first_box_alone}, "carve of two grids side by side: saliency"),
    "keep is a share of the image": ({"carve": keep_of_the_image}, "expected the highest tenth of the 2880 pixels"),
    "the highest view": ({"carve": highest}, "carve of two grids, one over the other: saliency"),
    "a box past an edge is cut": ({"carve": cuts_boxes}, "box (past an edge): expected an error, got a result"),
    "the preset is not read": ({"carve": without("carve", "preset")}, "exact size"),
    "rows and columns are exchanged": (
        {"carve": lambda image, *a, grid, **o: RIGHT.carve(image, *a, grid=grid[::-1], **o)}, "carve of a PIL image"
    ),
    "every model is supported": ({"supports": lambda model: None}, "supports: expected a reason"),
    "everything loads": ({"load": lambda model: print}, "load: expected an error"),
    "of another version": ({"version": VERSION + 1}, f"is for version {VERSION + 1} of the protocol"),
    "no name": ({"name": ""}, "expected a name"),
    "no method": ({"carve": None}, "lacks carve"),
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_backend_does_not_pass(wrong: str) -> None:
    methods, line = WRONG[wrong]
    with pytest.raises(NotConforming) as error:
        check(Changed(**methods))
    assert any(line in fault for fault in error.value.faults), error.value


def test_a_backend_with_nothing_changed_passes() -> None:
    check(Changed())


def test_a_class_is_no_backend() -> None:
    with pytest.raises(NotConforming, match="is a class, expected an instance"):
        check(KernelsBackend)


@pytest.mark.parametrize(
    ("frontend", "line"),
    [
        (lambda engine: engine.saliency([[1.0]]), "saliency: expected a member of the protocol"),
        (lambda engine: engine.regions([[1.0, 2.0]], share=0.4), "regions: expected the arguments of the protocol"),
        (lambda engine: engine.load("small"), "load: expected a call of supports with the model before it"),
        (lambda engine: None, "called nothing"),
        (lambda engine: engine.regions([[1.0], []], keep=0.4, top=1), "the frontend failed: ValueError: saliency"),
    ],
)  # fmt: skip
def test_a_wrong_frontend_does_not_pass(frontend: Callable[[Any], Any], line: str) -> None:
    with pytest.raises(NotConforming) as error:
        check_frontend(frontend)
    assert any(line in fault for fault in error.value.faults), error.value


def test_a_frontend_that_asks_before_it_loads_passes() -> None:
    def frontend(engine: CarveBackend) -> Any:
        return engine.load("small") if engine.supports("small") is None else None

    check_frontend(frontend)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        ("/no/such/folder", "is missing"),
        (7, "model: expected a directory"),
        ((1, 2, 3), "expected a checkpoint or a pair"),
        ((torch.nn.Linear(2, 2), None), "model: expected a transformers model"),
    ],
)
def test_what_is_not_supported_has_a_reason_that_load_raises(model: Any, reason: str) -> None:
    said = backend.supports(model)
    assert said is not None and reason in said
    with pytest.raises((TypeError, ValueError), match=re.escape(said)):
        backend.load(model)


@pytest.mark.parametrize(
    ("value", "error"),
    [
        ([[1.0, 2.0], [3.0]], r"^saliency\[1\]: expected shape \[2\] as of saliency\[0\], got \[1\]$"),
        ([[[1.0]], [[1.0, 2.0]]], r"^saliency\[1\]: expected shape \[1, 1\] as of saliency\[0\], got \[1, 2\]$"),
        ([1.0, [2.0]], r"^saliency\[0\]: expected a list as other items of saliency, got float 1.0$"),
        ([[1.0, None]], r"^saliency\[0\]: expected numbers, got list \[1.0, None\]$"),
        (numpy.array(["a"]), r"^saliency: expected numbers, got list \['a'\]$"),
        ({1.0}, r"^saliency: expected a tensor, a NumPy array or a list of numbers, got set"),
        ([10**400], r"^saliency: expected numbers"),
    ],
)
def test_what_is_no_array_is_refused(value: Any, error: str) -> None:
    with pytest.raises((TypeError, ValueError), match=error):
        as_tensor("saliency", value)


def test_arrays_keep_their_dtype_and_lists_become_float32() -> None:
    array = numpy.arange(6, dtype=">f8").reshape(2, 3)[:, ::-1]
    found = as_tensor("x", array)
    assert found.dtype == torch.float64 and found.tolist() == array.tolist()
    frozen = numpy.ones(3, "float32")
    frozen.flags.writeable = False
    assert as_tensor("x", frozen).tolist() == [1, 1, 1]
    shared = numpy.zeros(3, "float32")
    as_tensor("x", shared)[0] = 1
    assert shared[0] == 1
    assert as_tensor("x", [1, 2]).dtype == torch.int64 and as_tensor("x", [1, 2], floating=True).dtype == torch.float32
    assert as_tensor("x", [[0.5], [1.5]]).dtype == torch.float32 and as_tensor("x", [True]).dtype == torch.bool
    assert as_tensor("x", [torch.ones(2), [3.0, 4.0]]).tolist() == [[1, 1], [3, 4]]


def install(folder: Path, package: str, points: str, **modules: str) -> None:
    """What pip leaves of a package: its metadata and its modules."""
    metadata = folder / f"{package.replace('-', '_')}-1.0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(points)
    for name, code in modules.items():
        (folder / f"{name}.py").write_text(code)


def test_each_backend_that_cannot_serve_has_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = "from carve_kernels.plugin import KernelsBackend\nbackend = KernelsBackend()\n"
    group = "[carve.backends]\n"
    install(tmp_path, "good-one", f"{group}good = made_good:backend\n", made_good=f"{made}backend.name = 'good'\n")
    install(
        tmp_path, "old-one", f"{group}old = made_old:backend\n",
        made_old=f"{made}backend.name, backend.version = 'old', 0\n",
    )  # fmt: skip
    install(tmp_path, "torn-one", f"{group}torn = made_torn:backend\n", made_torn="import no_such_module_at_all\n")
    install(tmp_path, "bare-one", f"{group}bare = carve_kernels:carve\n")
    install(tmp_path, "other-name", f"{group}other = carve_kernels.plugin:backend\n")
    for package in ("twin-one", "twin-two"):
        install(tmp_path, package, f"{group}twin = carve_kernels.plugin:backend\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    found = discover()
    assert {"good", "old", "torn", "bare", "other", "twin"} <= set(found) and "made_torn" not in sys.modules
    assert found["good"].name == "good"
    reasons = {
        "old": "old: made_old:backend of old-one 1.0 is for version 0 of the protocol, expected 1; install a newer "
        "release of the backend",
        "torn": "torn: made_torn:backend of torn-one 1.0 cannot be imported (ModuleNotFoundError: No module named "
        "'no_such_module_at_all')",
        "bare": "bare: carve_kernels:carve of bare-one 1.0 is not a CarveBackend: expected a version of the protocol, "
        "an integer, got NoneType None",
        "other": "other: carve_kernels.plugin:backend of other-name 1.0 calls itself 'carve_kernels', expected the "
        "name of its entry point",
        "twin": "twin: twin-one 1.0 and twin-two 1.0 each install a backend of this name; uninstall one",
    }
    for name, reason in reasons.items():
        with pytest.raises(BackendUnavailable, match=f"^{re.escape(reason)}$"):
            found[name]
    assert found.broken().items() >= reasons.items() and "good" in found.working()
    with pytest.raises(KeyError, match=r"expected one of the installed backends, .*good"):
        found["no such name"]


def test_the_entry_point_is_our_backend() -> None:
    points = re.findall(r'"carve\.backends"\]\n(\w+) = "([\w.]+):(\w+)"', (ROOT / "pyproject.toml").read_text("utf-8"))
    assert points == [(backend.name, KernelsBackend.__module__, "backend")]


@pytest.mark.slow
def test_the_toys_find_each_other_in_a_fresh_environment(tmp_path: Path) -> None:
    """Installed by pip without an index, beside the metadata of this package as its own pyproject.toml makes them."""
    site = tmp_path / "site"
    sources = [
        str(shutil.copytree(ROOT / "examples" / name, tmp_path / name)) for name in ("toy_backend", "toy_frontend")
    ]
    pip = [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-index", "--no-deps"]
    run([*pip, "--no-build-isolation", "--target", str(site), *sources], tmp_path)
    ours = tmp_path / "ours"
    ours.mkdir()
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, ours)
    (ours / "carve_kernels").symlink_to(ROOT / "carve_kernels")
    run([sys.executable, "setup.py", "-q", "egg_info", "--egg-base", str(site)], ours)
    program = (
        "import sys; sys.path[:0] = [sys.argv[1], sys.argv[2]]\n"
        "from carve_kernels.conformance import check, check_frontend\n"
        "from carve_kernels.protocol import discover, discover_frontends\n"
        "for name, backend in discover().working().items():\n"
        "    check(backend)\n"
        "    for other, frontend in discover_frontends().working().items():\n"
        "        check_frontend(frontend, backend)\n"
        "        print(name, other)\n"
        "import toy_frontend\n"
        "toy_frontend.main()\n"
    )
    printed = run([sys.executable, "-c", program, str(site), str(ROOT)], tmp_path).splitlines()
    assert printed[:2] == ["carve_kernels toy", "toy toy"]
    assert [line.split()[0] for line in printed[2:]] == ["carve_kernels", "toy"]
    assert {line.split(maxsplit=1)[1] for line in printed[2:]} == {"35 17 53 34"}


def test_no_frontend_is_installed_with_the_package() -> None:
    assert "toy" not in discover_frontends()


def run(command: list[str], folder: Path) -> str:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout
