"""Examples in the prompt: what the base answers once it has seen a few rows, so that an adapter that buys no more than that is seen."""

from collections.abc import Sequence
from dataclasses import replace

from pipeline.example import Example


def with_shots(example: Example, train: Sequence[Example], count: int, max_images: int) -> Example:
    """`example` after up to `count` training rows of its kind (else of any), in their order; fewer where their images would be more than `max_images` in all.

    Every example of a kind gets the same rows, so that a server's prefix cache holds them. Training rows' own system messages are left out.
    """
    same = [row for row in train if row.kind == example.kind] or list(train)
    left = max_images - len(example.images)
    shots: list[Example] = []
    for row in same:
        if len(shots) < count and len(row.images) <= left:
            shots.append(row)
            left -= len(row.images)
    system = [message for message in example.messages[:1] if message["role"] == "system"]
    before = [message for shot in shots for message in shot.messages if message["role"] != "system"]
    images = [image for shot in shots for image in shot.images]
    return replace(example, messages=(*system, *before, *example.messages[len(system) :]), images=(*images, *example.images))
