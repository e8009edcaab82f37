"""Build the embedded small model from scratch: glyph atlas, scenes, two stages of training, export, evaluation.

    python examples/small_vlm/reproduce.py --output DIR

A second call with the same DIR continues where the first one stopped. `--smoke` runs every step in seconds.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
from batches import Sampler
from evaluate import MINUTES, evaluate
from forward import Runner
from model import build_model, export
from pool import SHARD_SCENES, draw_pool, first_stage, load_pool
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from train import BATCH, load, make_optimizer, run_stage

from carve_kernels.models import scenes

SEED = 1
PEAKS = {1: 1.5e-3, 2: 1.0e-3}


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--minutes", type=float, nargs=2, default=MINUTES, metavar=("STAGE1", "STAGE2"))
    parser.add_argument("--shards", type=int, default=45, help="thousands of training scenes")
    parser.add_argument("--samples", type=int, default=300, help="evaluation scenes a level")
    parser.add_argument("--smoke", action="store_true", help="seconds instead of an hour; the model learns nothing")
    return parser.parse_args()


def train(
    output: Path, minutes: tuple[float, float], shards: int, scene_count: int, batch: int, compiled: bool
) -> None:
    """Scenes, both stages and the export into `output`/model."""
    note = TextColumn("{task.fields[note]}")
    columns = (TextColumn("{task.description:10}"), BarColumn(), TimeRemainingColumn(), note)
    with Progress(*columns, refresh_per_second=1) as progress:
        drawn = progress.add_task("scenes", total=shards, note="")
        draw_pool(output / "pool", shards, scene_count, lambda: progress.advance(drawn))
        model = build_model(SEED)
        optimizer = make_optimizer(model)
        checkpoint = output / "checkpoint.pt"
        state = load(checkpoint, model, optimizer)
        runner = Runner(model, compiled)
        for stage, limit in enumerate(minutes, 1):
            if state.stage != stage:
                continue
            views, labels = load_pool(output / "pool", first_stage(shards) if stage == 1 else shards)
            sampler = Sampler(views, labels, seed=SEED + state.step)
            bar: TaskID = progress.add_task(f"stage {stage}", total=limit * 60, note="")
            run_stage(
                stage, model, runner, sampler, optimizer, state,
                minutes=limit, peak=PEAKS[stage], batch=batch, checkpoint=checkpoint,
                on_step=lambda seconds, note, bar=bar: progress.update(bar, completed=seconds, note=note),
            )  # fmt: skip
    export(model, output / "model")


def main() -> None:
    """Run every step that is not yet done."""
    options = arguments()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    options.output.mkdir(parents=True, exist_ok=True)
    atlas = Path(scenes.__file__).parent / "glyphs.npz"
    if not atlas.exists():
        from atlas import build_atlas

        build_atlas(atlas)
    model = options.output / "model"
    if options.smoke:
        train(options.output, (0.02, 0.02), 2, 20, 4, compiled=False)
        evaluate(model, 2, 1, (0.02, 0.02))
    else:
        minutes = tuple(options.minutes)
        train(options.output, minutes, options.shards, SHARD_SCENES, BATCH, compiled=True)
        evaluate(model, options.samples, 60, minutes)


if __name__ == "__main__":
    main()
