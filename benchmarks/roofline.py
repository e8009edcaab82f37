"""The least cost of the GPU backends against eager attention, the common idiom and FlashAttention: predicted.

Six captured layers of Qwen2.5-VL-7B at 4096 keys are the headline; `python -m benchmarks roofline` gives the tables.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product
from typing import Any, NamedTuple

from rich.table import Table

from benchmarks import opponent_work
from benchmarks.gpu import predicted as fitted
from benchmarks.gpu import predicted_triton as twin
from benchmarks.support.cases import GEOMETRIES, VISUAL_SHARE, Case
from carve_kernels.selfcheck.roofline import GPUS, REACHED, UNITS, Gpu, Unit, predict, work_of
from carve_kernels.selfcheck.work import Work

LAYERS = 6
LENGTHS = (512, 1024, 2048, 4096, 8192, 16384, 32768)
ROWS = (1, 8, 32)
HEADLINE, HEADLINE_LENGTH = "qwen2.5-vl-7b", 4096
# Maps of an image of 1024 x 1024 pixels on a grid of 32 x 32 tokens, six layers and eight steps.
GRID, STEPS, SIDE = 32, 8, 1024

# The language model of Qwen2.5-VL-7B, 7.6 B parameters with the table of embeddings, of which a step reads one row.
DEPTH, HIDDEN, INNER, VOCABULARY = 28, 3584, 18944, 152064

# What `predicted.Measured` holds.
MEASURED = ("trial", "folded torch", "cuda of 0.1.0", "triton of 0.1.0")

Entry = dict[str, Any]


class Cost(NamedTuple):
    """The cost of a backend or an opponent: its name, its work, and the units of the GPU that do its arithmetic."""

    name: str
    work: Work
    unit: Unit = "matrix"


def decode_step(keys: int) -> Work:
    """One decode step of the model in bf16: weights and cache read once, launches free: the fastest possible step."""
    heads, key_heads, size = GEOMETRIES[HEADLINE]
    projections = 2 * HIDDEN * heads * size + 2 * HIDDEN * key_heads * size
    weights = DEPTH * (projections + 3 * HIDDEN * INNER) + VOCABULARY * HIDDEN
    cache = DEPTH * 2 * keys * key_heads * size
    return Work(2 * (weights + cache), 0, 2 * weights + DEPTH * 4 * keys * heads * size, 0)


def captures(case: Case, layers: int = LAYERS, *, lse: bool = False) -> Iterator[Cost]:
    """Capture of several layers for a batch of one, all tokens in one run, by every backend that counts its work."""
    heads, key_heads, size = GEOMETRIES[case.geometry]
    tokens = int(VISUAL_SHARE * case.length)
    sizes = {"layers": layers, "batch": 1, "query_heads": heads, "key_heads": key_heads, "rows": case.rows}
    sizes |= {"keys": case.length, "size": size, "tokens": tokens, "element_bytes": 2}
    for backend in ("cuda", "triton"):
        work = work_of("capture", backend, **sizes, span=tokens, lse=lse)
        if work is not None:
            yield Cost(f"capture, {backend}{', with lse' if lse else ''}", work, UNITS["capture", backend])


def attended(case: Case) -> Iterator[Cost]:
    """Attention and capture of one row of one layer in one read of keys and values."""
    heads, key_heads, size = GEOMETRIES[case.geometry]
    tokens = int(VISUAL_SHARE * case.length)
    sizes = {"batch": 1, "query_heads": heads, "key_heads": key_heads, "keys": case.length, "size": size}
    work = work_of("attention", "cuda", **sizes, value_size=size, tokens=tokens, span=tokens)
    if work is not None:
        yield Cost("attention, cuda: one layer, captured", work, UNITS["attention", "cuda"])


def opponents(case: Case, layers: int = LAYERS) -> Iterator[Cost]:
    """The opponents for the same layers; eager attention and FlashAttention over all rows of a prefill."""
    yield Cost("common idiom", _layers(opponent_work.idiom(case), layers))
    yield Cost("FlashAttention, prefill", _layers(opponent_work.flash(case), layers))
    yield Cost("eager, prefill", _layers(opponent_work.eager(case, case.length), layers))


def _layers(work: Work, layers: int) -> Work:
    return Work(*(layers * count for count in work))


def pixels(side: int = SIDE) -> Iterator[Cost]:
    for backend in ("cuda", "triton"):
        work = work_of("contrast", backend, layers=LAYERS, steps=STEPS, grid=(GRID, GRID), size=(side, side))
        if work is not None:
            yield Cost(f"contrast, {backend}", work, UNITS["contrast", backend])
    work = work_of("regions", "cuda", height=side, width=side)
    if work is not None:
        yield Cost("regions, cuda", work, UNITS["regions", "cuda"])


def saliencies(side: int = SIDE) -> Iterator[Cost]:
    """A heat map of a token in one operator: a captured row, contrast with a general map, and with regions."""
    heads, key_heads, size = GEOMETRIES[HEADLINE]
    sizes = {"layers": LAYERS, "batch": 1, "query_heads": heads, "key_heads": key_heads, "rows": 1}
    sizes |= {"keys": HEADLINE_LENGTH, "size": size, "tokens": GRID * GRID, "element_bytes": 2}
    stages = [
        work_of("capture", "cuda", **sizes, span=GRID * GRID, seeks_span=True),
        work_of("contrast", "cuda", layers=LAYERS, steps=1, grid=(GRID, GRID), size=(side, side)),
        work_of("regions", "cuda", height=side, width=side),
    ]
    capture, contrast, regions = stages
    if capture is not None and contrast is not None:
        yield Cost("saliency, cuda", capture + contrast)
        if regions is not None:
            yield Cost("saliency with regions, cuda", capture + contrast + regions)


def measure(geometries: list[str], lengths: list[int], advance: Callable[[str], None]) -> list[Entry]:
    """Every line of every table."""
    step = decode_step(HEADLINE_LENGTH)
    case = Case(HEADLINE, HEADLINE_LENGTH, 1, "bf16")
    entries = [_entry("decode", Cost("the whole step", step), {}, step)]
    for cost in (*captures(case), *captures(case, lse=True), *saliencies()):
        entries.append(_entry("decode", cost, {}, step))
    entries += [_entry("decode", cost, {}, step) for cost in attended(case)]
    entries.append(_entry("decode", Cost("common idiom", _layers(opponent_work.idiom(case), LAYERS)), {}, step))
    entries.append(_entry("decode", Cost("eager attention", _layers(opponent_work.eager(case, 1), LAYERS)), {}, step))
    advance("decode step")
    for geometry, length, rows in product(geometries, lengths, ROWS):
        case = Case(geometry, length, rows, "bf16")
        labels = {"geometry": geometry, "S": length, "R": rows}
        entries += [_entry("capture", cost, labels) for cost in (*captures(case), *opponents(case))]
        advance(str(case))
    entries += [_entry("pixels", cost, {}) for cost in pixels()]
    entries += [_beside(case) for case in fitted.H100 if case.geometry in geometries]
    entries += [_twin(case) for case in twin.H100 if case.geometry in geometries]
    return entries + [_attended(case) for case in fitted.SDPA if case.geometry in geometries]


def _beside(case: Case) -> Entry:
    """The cuda backend on an H100 in a graph: predicted in two ways, beside what was measured there."""
    own = next(cost for cost in captures(case) if cost.name == "capture, cuda")
    heads, key_heads, _ = GEOMETRIES[case.geometry]
    labels = {"heads": f"{heads} on {key_heads}", "S": case.length, "R": case.rows}
    times = {
        "K at 3.0 TB/s": 1e6 * fitted.key_bytes(case) / (REACHED * GPUS["H100"].bandwidth),
        "least": 1e6 * predict(own.work, GPUS["H100"], unit=own.unit, graphs=True).seconds,
        "predicted": 1e6 * fitted.seconds(case),
        "target": fitted.TARGETS.get(case),
        **{f"measured: {name}": value for name, value in zip(MEASURED, fitted.H100[case], strict=True)},
    }
    return {"table": "beside", "way": own.name, "labels": labels, "work": own.work._asdict(), "us": times}


def _twin(case: Case) -> Entry:
    """The triton backend on an H100 in a graph: predicted in two ways, beside what was measured of cuda there."""
    own = next(cost for cost in captures(case) if cost.name == "capture, triton")
    heads, key_heads, _ = GEOMETRIES[case.geometry]
    labels = {"heads": f"{heads} on {key_heads}", "S": case.length, "R": case.rows}
    predicted, measured = 1e6 * twin.seconds(case), twin.H100[case]
    times = {
        "least": 1e6 * predict(own.work, GPUS["H100"], unit=own.unit, graphs=True).seconds,
        "predicted": predicted,
        "measured: cuda": measured.cuda,
        "measured: triton of 0.3.0": measured.triton,
    }
    labels |= {"predicted / measured cuda": f"{predicted / measured.cuda:.2f}"}
    return {"table": "twin", "way": own.name, "labels": labels, "work": own.work._asdict(), "us": times}


def _attended(case: Case) -> Entry:
    """One row of one layer attended and captured on an H100 in a graph, beside what sdpa alone took there."""
    heads, key_heads, _ = GEOMETRIES[case.geometry]
    (own,) = attended(case)
    work = own.work
    times = {
        "K and V at 3.0 TB/s": 2e6 * fitted.key_bytes(case, 1) / (REACHED * GPUS["H100"].bandwidth),
        "least": 1e6 * predict(work, GPUS["H100"], graphs=True).seconds,
        "predicted": 1e6 * fitted.attention_seconds(case),
        "measured: sdpa alone": fitted.SDPA[case],
    }
    labels = {"heads": f"{heads} on {key_heads}", "S": case.length}
    return {"table": "attended", "way": "attention, cuda", "labels": labels, "work": work._asdict(), "us": times}


def _entry(table: str, cost: Cost, labels: dict[str, Any], step: Work | None = None) -> Entry:
    predicted = {}
    for gpu in GPUS.values():
        host, graph = (predict(cost.work, gpu, unit=cost.unit, graphs=graphs) for graphs in (False, True))
        predicted[gpu.name] = {"launched": host._asdict(), "graph": graph._asdict()}
        if step is not None:
            predicted[gpu.name]["share"] = _share(cost, step, gpu)
    return {
        "table": table,
        "way": cost.name,
        "labels": labels,
        "work": cost.work._asdict(),
        "predicted": predicted,
    }


def _share(cost: Cost, step: Work, gpu: Gpu) -> dict[str, float]:
    """The share of a decode step: launched by the host and in a graph, then the same without any overlap."""
    whole = predict(step, gpu).seconds
    host, graph = (predict(cost.work, gpu, unit=cost.unit, graphs=graphs) for graphs in (False, True))
    return {
        "launched": host.seconds / whole,
        "graph": graph.seconds / whole,
        "launched, no overlap": (host.memory + host.arithmetic + host.launch) / whole,
        "graph, no overlap": (graph.memory + graph.arithmetic + graph.launch) / whole,
    }


# The lengths that the docs show for a geometry; 8192 for the others.
_CHOSEN = {HEADLINE: (512, HEADLINE_LENGTH, 32768)}

_TITLES = {
    "decode": f"predicted, not timed: {LAYERS} layers in a decode step of {HEADLINE}, {HEADLINE_LENGTH} keys, one row",
    "capture": f"predicted, not timed: capture of {LAYERS} layers, {VISUAL_SHARE:.0%} visual tokens, bf16",
    "beside": f"predicted, not timed: capture of {LAYERS} layers on an H100 in a graph, us, beside what it measured",
    "twin": "predicted, not timed: the triton backend for the same layers, us, beside what an H100 measured",
    "attended": "predicted, not timed: attention and capture of one row of one layer on an H100 in a graph, us",
    "pixels": f"predicted, not timed: {LAYERS} x {STEPS} maps of {GRID} x {GRID} tokens on {SIDE} x {SIDE} pixels",
}


def tables(entries: list[Entry]) -> list[Table]:
    result = []
    for title, heads, rows in _layout(entries):
        table = Table(title=title)
        for head in heads:
            table.add_column(head, justify="left" if head in ("name", "geometry", "backend") else "right")
        for row in rows:
            table.add_row(*row)
        result.append(table)
    return result


def markdown(report: dict[str, Any]) -> str:
    """A choice of lines: the geometry of the headline at three lengths, the others at one."""
    chosen = [
        entry
        for entry in report["results"]
        if entry["table"] != "capture" or entry["labels"]["S"] in _CHOSEN.get(entry["labels"]["geometry"], (8192,))
    ]
    parts = []
    for title, heads, rows in _layout(chosen):
        body = "\n".join(f"| {' | '.join(row)} |" for row in rows)
        parts.append(
            f"### {title[0].upper()}{title[1:]}\n\n| {' | '.join(heads)} |\n|{' --- |' * len(heads)}\n{body}\n"
        )
    return "\n".join(parts)


def _layout(entries: list[Entry]) -> Iterator[tuple[str, list[str], list[list[str]]]]:
    """Title, headings and rows of each table; the opponents of a capture are further columns."""
    for table, title in _TITLES.items():
        chosen = [entry for entry in entries if entry["table"] == table]
        if not chosen:
            continue
        work = ["MB", "MFLOP", "launches"]
        if table in ("beside", "twin", "attended"):
            rows = [[*map(str, entry["labels"].values()), *map(_us, entry["us"].values())] for entry in chosen]
            yield title, [*chosen[0]["labels"], *chosen[0]["us"]], rows
        elif table == "capture":
            others = list(dict.fromkeys(entry["way"] for entry in chosen if not entry["way"].startswith("capture")))
            times = [f"{name}: {' / '.join(GPUS)}" for name in others]
            heads = ["geometry", "S", "R", "backend", *work, *(f"{name}, us" for name in GPUS), *times]
            yield title, heads, list(_captured(chosen, others))
        else:
            heads = ["name", *work, *(f"{name}, us" for name in GPUS)]
            yield (
                title,
                heads,
                [[entry["way"], *_counts(entry), *map(_cell, entry["predicted"].values())] for entry in chosen],
            )


def _captured(chosen: list[Entry], others: list[str]) -> Iterator[list[str]]:
    by_labels: dict[tuple[Any, ...], dict[str, Entry]] = {}
    for entry in chosen:
        by_labels.setdefault(tuple(entry["labels"].values()), {})[entry["way"]] = entry
    for labels, ways in by_labels.items():
        for name, entry in ways.items():
            if name not in others:
                cells = map(_cell, entry["predicted"].values())
                times = [" / ".join(_times(ways[other], entry, gpu) for gpu in GPUS) for other in others]
                yield [*map(str, labels), name.removeprefix("capture, "), *_counts(entry), *cells, *times]


def _counts(entry: Entry) -> list[str]:
    work = Work(**entry["work"])
    return [
        _figure((work.read_bytes + work.written_bytes) / 1e6),
        _figure(work.operations / 1e6),
        str(work.launches or "free"),
    ]


def _figure(value: float) -> str:
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def _us(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _cell(predicted: dict[str, Any]) -> str:
    """Time and bound with launches by the host, then in a graph if that is faster, and the share of a step."""
    host, graph = predicted["launched"], predicted["graph"]
    text = f"{_figure(1e6 * host['seconds'])} {host['bound']}"
    if graph["seconds"] < host["seconds"]:
        text += f"; graph {_figure(1e6 * graph['seconds'])} {graph['bound']}"
    share = predicted.get("share", {"launched": 1.0})
    return text if share["launched"] == 1.0 else f"{text} ({share['launched']:.2%})"


def _times(other: Entry, own: Entry, gpu: str) -> str:
    seconds = [entry["predicted"][gpu]["launched"]["seconds"] for entry in (other, own)]
    return f"x{_figure(seconds[0] / seconds[1])}"
