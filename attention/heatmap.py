"""Word maps as pictures and masks. Pure torch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from ..host.branch.maps import map_size
from ..host.files.store import AttentionStore

RAMP = [(0.0, 0.0, 0.2), (0.3, 0.05, 0.5), (0.8, 0.2, 0.35), (1.0, 0.6, 0.1), (1.0, 1.0, 0.7)]  # from cold to hot


def word_heat(
    store: AttentionStore, columns: Tensor, size: tuple[int, int], start: float, end: float, all_sizes: bool
) -> Tensor:
    """[b * m, *size] in 0..1: where each phrase is attended to, image after image, phrase after phrase.

    columns: [tokens, m], 1 at the tokens of each phrase. Maps are averaged over the steps from `start` to `end`
    (fractions of the schedule), and over layers: those that local blend uses, or those of all recorded sizes. Each is
    scaled to a maximum of 1. Raises ValueError where no step lies between start and end, and where there are no maps.
    """
    steps = len(store.inputs)
    chosen = [step for step in range(steps) if start <= step / steps < end]
    if not chosen:
        raise ValueError(
            f"Attention Maps shows the steps from {start:g} to {end:g} of the schedule, where there are none: "
            "set end above start."
        )
    if not store.maps:
        raise ValueError(
            f"The attention store of this {store.trajectory.model.name} holds no maps of words: Record Attention keeps "
            "them of single pictures in Flux.1, Flux.2 klein, Chroma, SD3, SD3.5, Qwen-Image and Z-Image, and of "
            "layers up to 32 x 32 in SD1.x, SD2.x and SDXL: record a smaller picture, or one of these models'."
        )
    placing = map_size(tuple(store.trajectory.states.shape[-2:]))
    alike = all_sizes or bool(store.fields)  # all layers of a flow transformer are of one size
    maps = [held for held in store.maps if alike or tuple(held.shape[2:4]) == placing]
    if not maps:
        raise ValueError(
            f"The attention store holds no maps of the layers that place words in this picture, {placing[0]} x "
            f"{placing[1]}: set layers of Attention Maps to all, or record a smaller picture."
        )
    means = [(held[chosen].mean(0) @ columns).movedim(-1, 1) for held in maps]
    means = [interpolate(mean, size, mode="bicubic").clamp_min(0) for mean in means]
    heat = torch.stack(means).mean(0).flatten(0, 1)
    return heat / heat.amax((1, 2), keepdim=True).clamp_min(1e-12)


def colored(heat: Tensor, images: Tensor | None) -> Tensor:
    """[n, h, w, 3]: heat [n, h, w] in colours, over `images` [n, h, w, 3] where given."""
    ramp = torch.tensor(RAMP, device=heat.device)
    place = heat.clamp(0, 1) * (len(ramp) - 1)
    below = place.long().clamp_max(len(ramp) - 2)
    colors = torch.lerp(ramp[below], ramp[below + 1], (place - below)[..., None])
    return colors if images is None else torch.lerp(images, colors, 0.65)
