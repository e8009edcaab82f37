"""Answers of a model whose prompts lose visual tokens behind their first layers, as in FastV.

python examples/fastv.py                                                    # the embedded model, drawn scenes
python examples/fastv.py --model DIR --image FILE --question TEXT --k 3     # yours
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from time import perf_counter
from typing import Any

import torch
from PIL import Image

from carve_kernels import VisualLayout, capture_attention, layout_of, load
from carve_kernels.frontends.pruning import FastV
from carve_kernels.models.scenes import draw_scene

SHARES = (0.0, 0.25, 0.5, 0.75, 0.9)


def prompt(processor: Any, image: Image.Image, question: str) -> Any:
    """The inputs of a question about an image."""
    content = [{"type": "image"}, {"type": "text", "text": question}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    return processor(images=image, text=text, return_tensors="pt")


def answer(model: Any, processor: Any, inputs: Any, k: int, share: float, new: int) -> tuple[str, int, int]:
    """The answer where a share of the tokens is dropped, and the keys that the first and the last layer cache."""
    with FastV(model, k=k, r=share), torch.no_grad():
        output = model.generate(**inputs, max_new_tokens=new, do_sample=False, return_dict_in_generate=True)
    text = processor.decode(output.sequences[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    # The newer of its names first.
    cache = output["cache"] if "cache" in output else output["past_key_values"]
    keys = [layer.keys.shape[2] for layer in cache.layers]
    return text.strip(), keys[0], keys[-1]


def kept_tokens(model: Any, inputs: Any, layout: VisualLayout, k: int) -> str:
    """The tokens of the first view that half of the tokens leave, as text: # is kept."""
    with FastV(model, k=k), capture_attention(model, layers=[-1], tokens=layout) as session, torch.no_grad():
        model(**inputs)
    kept = session.maps.seen_in_view()[0, 0, 0]
    return "\n".join("".join("#" if token else "." for token in row) for row in kept.tolist())


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="small", help="a folder, an id in the local hub cache, or small")
    parser.add_argument("--image", help="a file; scenes are drawn without it")
    parser.add_argument("--question", default="What digit is red?")
    parser.add_argument("--k", type=int, default=2, help="how many layers process all tokens")
    parser.add_argument("--scenes", type=int, default=40, help="how many scenes are drawn")
    parser.add_argument("--new", type=int, default=4, help="how many new tokens")
    given = parser.parse_args(arguments)
    model, processor = load(given.model, dtype="float32" if given.model == "small" else "auto")
    if given.image is None:
        scenes = [draw_scene(seed, 3, split="test") for seed in range(given.scenes)]
        cases = [(scene.image, scene.question, scene.answer) for scene in scenes]
    else:
        cases = [(Image.open(given.image).convert("RGB"), given.question, None)]
    for share in SHARES:
        right, start = 0, perf_counter()
        for image, question, expected in cases:
            text, first, last = answer(model, processor, prompt(processor, image, question), given.k, share, given.new)
            right += expected is not None and text.split()[:1] == expected.split()[:1]
        seconds = (perf_counter() - start) / len(cases)
        result = f"{text!r}" if given.image is not None else f"{right} of {len(cases)} right"
        print(f"r={share:<4}  {first} keys up to layer {given.k - 1}, {last} behind  {seconds:.3f} s  {result}")
    image, question, _ = cases[0]
    inputs = prompt(processor, image, question)
    print(kept_tokens(model, inputs, layout_of(model, processor, inputs, [image]), given.k))


if __name__ == "__main__":
    main()
