"""CARVE's two passes: original images, then refined ones; a `Job` is one request from its prompts to its result."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from carve_kernels.hf.decoding import Branch, Decoder, PromptGroup
from carve_kernels.hf.engine.cache import Memory
from carve_kernels.hf.engine.fingerprint import Unidentified, digest, fingerprint, same_pixels
from carve_kernels.hf.engine.requests import Prompt, Request, SecondPrompt, make_second_prompt
from carve_kernels.hf.engine.result import CarvedImage, CarveResult
from carve_kernels.hf.engine.whole_layers import whole_layers
from carve_kernels.hf.image_inputs import ImageFeatures
from carve_kernels.hf.model import input_device
from carve_kernels.hf.query_rows import general_rows
from carve_kernels.maps import AttentionMaps
from carve_kernels.pipeline import CarveOutcome, carve_views, strength
from carve_kernels.presets import Preset
from carve_kernels.types import RowsSpec

_LOG = logging.getLogger("carve_kernels")


class Setup:
    """What the jobs of one call have in common; `carving` is the preset with its layer weights in order."""

    def __init__(
        self,
        model: Any,
        processor: Any,
        preset: Preset,
        carving: Preset,
        layers: tuple[int, ...],
        *,
        backend: str,
        memory: Memory | None,
        plain: bool,
        fit: str | None,
    ) -> None:
        self.model, self.processor, self.preset, self.carving = model, processor, preset, carving
        self.layers, self.backend, self.plain = layers, backend, plain
        self.decoder = Decoder(model, processor, layers, backend)
        at_every_step = preset.rows == "last" or isinstance(preset.rows, int)
        self._steps = 1 if preset.steps == "t_start" or not at_every_step else preset.max_new_tokens
        # Only as many new tokens as the maps need; a plain answer needs all of them.
        self.general_new_tokens = 0 if self._steps == 1 else preset.max_new_tokens
        self.task_new_tokens = preset.max_new_tokens if plain else self.general_new_tokens
        self.general_rows: RowsSpec = general_rows(preset.rows)
        self.memory, self._fit, self._fingerprint = memory, fit, ""
        if memory is not None:
            try:
                self._fingerprint = fingerprint(model, processor)
            except Unidentified as error:
                self.memory = None
                _LOG.info("nothing is cached for this model, since %s", error)

    def cached_general(self, job: Job) -> AttentionMaps | None:
        return None if self.memory is None else self.memory.maps(self._maps_key(job))

    def cache_general(self, job: Job, maps: AttentionMaps) -> None:
        if self.memory is not None:
            self.memory.keep_maps(self._maps_key(job), maps)

    def cached_prefix(self, job: Job, prompt: Prompt) -> Any:
        if self.memory is None or self.decoder.sequential_reason is not None:
            return None
        return self.memory.prefix(self._prefix_key(job, prompt))

    def free_prefixes(self, jobs: Sequence[Job]) -> None:
        """Without a memory, drop the prefix caches that no second prompt continues, before the second pass."""
        if self.memory is None:
            continued = {job.group for job in jobs if job.continues_prefix()}
            for job in jobs:
                if job.group not in continued:
                    job.group.prefix = None

    def cache_prefixes(self, jobs: Sequence[Job]) -> None:
        """Put the prefix caches of the original images into the memory."""
        if self.memory is None:
            return
        for group, job in {job.group: job for job in jobs}.items():
            if group.prefix is not None:
                group.prefix.trim()
                self.memory.keep_prefix(self._prefix_key(job, job.request.task), group.prefix, group.prefix.nbytes)

    def _maps_key(self, job: Job) -> tuple[Any, ...]:
        general_ids: list[int] = job.request.general.inputs["input_ids"][0].tolist()
        return (
            self._fingerprint, job.image_key, self.preset.max_pixels, self._fit, general_ids,
            self.layers, self.general_rows, self._steps, self.backend,
        )  # fmt: skip

    def _prefix_key(self, job: Job, prompt: Prompt) -> tuple[Any, ...]:
        device = str(input_device(self.model))
        return self._fingerprint, device, job.image_key, self.preset.max_pixels, self._fit, prompt.prefix_ids


@dataclass(eq=False)
class Job:
    """One request in progress, with the results so far."""

    request: Request
    # Equal for equal images; empty where nothing is compared.
    image_key: str = ""
    group: PromptGroup = field(init=False)
    task: Branch = field(init=False)
    general: AttentionMaps = field(init=False)
    carved: list[CarveOutcome] = field(init=False)
    strengths: list[float | None] = field(init=False)
    # The numbers of the refined images.
    chosen: tuple[int, ...] = ()
    second: SecondPrompt | None = None
    refined_ids: tuple[int, ...] = ()
    reason: str | None = None
    # Captured layers that are past their windows.
    left_out: tuple[int, ...] = ()
    seconds: dict[str, float] = field(default_factory=dict)

    def carve(self, setup: Setup) -> None:
        """Contrast the maps of each image, find the regions, zoom; make the second prompt, if there is one to make."""
        request = self.request
        self._carve_images(setup)
        self.chosen = self._choose()
        refined = {number: self.carved[number].refined for number in self.chosen}
        self.reason = self._why_unchanged()
        plain = None if setup.plain else SecondPrompt(request.task.inputs, request.features, None, ())
        unchanged = self.reason is not None or all(
            same_pixels(image, request.images[number]) for number, image in refined.items()
        )
        if setup.preset.images == "refined" and unchanged:
            self.second = plain
            return
        try:
            self.second = make_second_prompt(setup.processor, setup.preset, request, refined, unchanged)
        except ValueError as error:
            # The processor may refuse a very thin crop; the results so far are kept.
            self.second, self.reason = plain, f"the refined image cannot be shown to the model: {error}"

    def _carve_images(self, setup: Setup) -> None:
        """The outcome and the strength of each image, from its own tokens."""
        layout = self.request.task.layout
        whole = whole_layers(self.task.maps, self.general, setup.carving)
        self.left_out = whole.left_out
        if whole.left_out:
            _LOG.info("layers %s do not see the whole image at %s: left out", list(whole.left_out), setup.preset.steps)
        carving = replace(setup.carving, layer_weights=whole.weights)
        self.carved, self.strengths = [], []
        several = len(self.request.images) > 1
        for number, image in enumerate(self.request.images):
            spans = zip(layout.views[0], layout.spans(0), strict=True)
            views, columns = zip(*((view, span) for view, span in spans if view.image == number), strict=True)
            boxes, grids = [view.box for view in views], [view.grid for view in views]
            own = [
                torch.cat([maps[..., span] for span in columns], -1) if several else maps
                for maps in (whole.task, whole.general)
            ]
            outcome = carve_views(image, own[0], own[1], grids, boxes, carving, setup.backend)
            self.carved.append(outcome)
            size = image.height, image.width
            # One image has no other to compare it with.
            self.strengths.append(
                strength(size, own[0], own[1], grids, boxes, carving, setup.backend) if several else None
            )
            for stage, seconds in outcome.seconds.items():
                self.seconds[stage] = self.seconds.get(stage, 0.0) + seconds

    def _choose(self) -> tuple[int, ...]:
        """The images to refine: those of the request, or of those with regions the one with the strongest contrast."""
        if self.request.refine is not None:
            return self.request.refine
        found = [number for number, outcome in enumerate(self.carved) if outcome.reason is None]
        return (max(found or range(len(self.carved)), key=lambda number: self.strengths[number] or 0.0),)

    def _why_unchanged(self) -> str | None:
        """Why no chosen image has a region, or None."""
        reasons = {number: self.carved[number].reason for number in self.chosen}
        if None in reasons.values():
            return None
        if len(self.request.images) == 1:
            return reasons[0]
        return "; ".join(f"image {number}: {reason}" for number, reason in reasons.items())

    def result(self, setup: Setup) -> CarveResult:
        request, plain_ids = self.request, self.task.ids if setup.plain else ()
        refined_ids = plain_ids if self.second is None else self.refined_ids
        layout = request.task.layout
        images = tuple(
            CarvedImage(
                image, carved.refined, carved.saliency, carved.regions, carved.seen, layout.unseen(0, number),
                carved.reason, contrast,
            )
            for number, (image, carved, contrast) in enumerate(
                zip(request.images, self.carved, self.strengths, strict=True)
            )
        )  # fmt: skip
        first = images[self.chosen[0]]
        return CarveResult(
            question=request.question,
            prompt=request.task.text,
            answer=decode_answer(setup.processor, plain_ids),
            refined_answer=decode_answer(setup.processor, refined_ids),
            image=first.image,
            refined=first.refined,
            task=self.task.maps,
            general=self.general,
            saliency=first.saliency,
            regions=first.regions,
            entropy=entropy_by_layer(self.task.maps, setup.preset.steps, self.left_out),
            seconds={**self.seconds, "second pass": self.seconds.get("second pass", 0.0)},
            preset=setup.preset,
            reason=self.reason,
            answer_ids=plain_ids,
            refined_ids=refined_ids,
            unseen=first.unseen,
            images=images,
            refined_images=self.chosen,
            layers_left_out=self.left_out,
        )

    def continues_prefix(self) -> bool:
        """Whether the second prompt begins with the original image as the first pass has read it."""
        if self.second is None:
            return False
        separable = self.second.features is self.request.features or self.second.later_images is not None
        prefix_ids = self.request.task.prefix_ids
        ids = self.second.inputs["input_ids"][0, : len(prefix_ids)]
        return separable and tuple(ids.tolist()) == prefix_ids


def first_pass(setup: Setup, jobs: Sequence[Job]) -> None:
    """Decode every question, and the general instruction once for each image, on the original images."""
    start = time.perf_counter()
    groups: dict[Any, PromptGroup] = {}
    features: dict[str, ImageFeatures] = {}
    general: dict[str, AttentionMaps | Branch] = {}
    for job in jobs:
        if setup.memory is not None or len(jobs) > 1:
            job.image_key = " ".join(map(digest, job.request.images))
        shared = features.setdefault(job.image_key, job.request.features)
        job.task = Branch(job.request.task.inputs, setup.task_new_tokens, setup.preset.rows)
        job.group = _group(setup, groups, job, job.request.task, shared)
        job.group.branches.append(job.task)
        if job.image_key not in general:
            general[job.image_key] = setup.cached_general(job) or Branch(
                job.request.general.inputs, setup.general_new_tokens, setup.general_rows
            )
            if isinstance(branch := general[job.image_key], Branch):
                _group(setup, groups, job, job.request.general, shared).branches.append(branch)
    setup.decoder.decode(list(groups.values()))
    seconds = (time.perf_counter() - start) / len(jobs)
    for job in jobs:
        maps = general[job.image_key]
        if isinstance(maps, Branch):
            maps = general[job.image_key] = maps.maps
            setup.cache_general(job, maps)
        job.general = maps
        if setup.plain:
            job.request.features.free()
        job.seconds["first pass"] = seconds


def second_pass(setup: Setup, jobs: Sequence[Job]) -> None:
    """Decode the second prompts, after the prefix of the original image if they begin with it."""
    if not jobs:
        return
    start = time.perf_counter()
    groups: dict[Any, PromptGroup] = {}
    branches = {}
    for job in jobs:
        second = job.second
        if second is None:
            continue
        same_images = second.features is job.request.features
        branch = Branch(second.inputs, setup.preset.max_new_tokens, images=second.features)
        if job.continues_prefix():
            key: Any = job.group
            group = PromptGroup(job.group.images, job.group.start, prefix=job.group.prefix)
            branch.later_images = None if same_images else second.later_images
        else:
            group, key = PromptGroup(second.features, _end_of_images(job.request.task, second)), job
            if second.images and len(jobs) > 1:
                # Two questions may select the same part of an image.
                prefix_ids = tuple(second.inputs["input_ids"][0, : group.start].tolist())
                key = " ".join(map(digest, second.images)), prefix_ids
        groups.setdefault(key, group).branches.append(branch)
        branches[job] = branch
    setup.decoder.decode(list(groups.values()))
    for job, branch in branches.items():
        job.refined_ids = branch.ids
        job.seconds["second pass"] = (time.perf_counter() - start) / len(jobs)


def _end_of_images(first: Prompt, second: SecondPrompt) -> int:
    """The column after the last image token of the second prompt, which has the ids of those of the first."""
    marks = first.inputs["input_ids"][0, first.layout.tokens()[0].long()].unique()
    return int(torch.isin(second.inputs["input_ids"][0], marks).nonzero()[-1]) + 1


def _group(
    setup: Setup, groups: dict[Any, PromptGroup], job: Job, prompt: Prompt, features: ImageFeatures
) -> PromptGroup:
    """The group of the prompts that begin like this one."""
    key = job.image_key, prompt.prefix_ids
    if key not in groups:
        # An image that the second prompt shows again is read by all layers.
        all_layers = setup.preset.images != "refined"
        prefix = setup.cached_prefix(job, prompt)
        groups[key] = PromptGroup(features, prompt.prefix_length, prompt.layout, prefix, all_layers)
    return groups[key]


def decode_answer(processor: Any, ids: tuple[int, ...]) -> str:
    """The text of an answer's tokens."""
    answer: str = processor.decode(list(ids), skip_special_tokens=True)
    return answer.strip()


def entropy_by_layer(maps: AttentionMaps, steps: str, left_out: tuple[int, ...]) -> dict[int, float]:
    """H / ln N of each layer that is read, at the steps that are read, the mean if there are several."""
    end = maps.last_step(0) + 1
    chosen = slice(0, 1) if steps == "t_start" else slice(end - 1, end) if steps == "t_end" else slice(0, end)
    values, valid = maps.entropy[0, :, chosen].flatten(1), maps.valid[0, :, chosen].flatten(1)
    mean = values.sum(1) / valid.sum(1).clamp(min=1)
    return {layer: float(value) for layer, value in zip(maps.layers, mean, strict=True) if layer not in left_out}
