"""Whole edits with the demo model."""

from __future__ import annotations

import argparse
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from palimpsest.benchmarks import edits
from palimpsest.benchmarks.picture import sample
from palimpsest.demo import scenes, score
from palimpsest.host.run.model import noise_latent
from palimpsest.inversion.ddim import leading_sigmas
from palimpsest.inversion.run import Guidance, invert
from palimpsest.nodes.demo import DemoScene
from palimpsest.nodes.inversion import LEADING, DDIMInversion
from palimpsest.nodes.p2p import P2PAttentionController
from palimpsest.nodes.prompt import PromptEdit
from reference import classic_p2p, swapped
from tiny import execute

SOURCE, TARGET = "a photo of a red car on a street", "a photo of a blue cup in a room"


def latent_of(demo: tuple, caption: str) -> torch.Tensor:
    _, _, vae = demo
    return vae.encode(torch.from_numpy(scenes.render(scenes.parse(caption, 3)))[None])


def inverted(demo: tuple, caption: str, steps: int) -> tuple:
    model, clip, _ = demo
    sigmas = leading_sigmas(model.get_model_object("model_sampling").sigmas, steps)
    source = [edits.encode(clip, [caption])]
    return invert(model, Guidance(source, None, 1.0), latent_of(demo, caption), sigmas), source, sigmas


@pytest.mark.slow
def test_fifty_steps_equal_the_classic_pair(demo: tuple) -> None:
    """Through the nodes, with a word of one token for one of two: within 1e-4 of explicit maps in float64."""
    model, clip, _ = demo
    checkered = SOURCE.replace("red", "checkered")  # no word of the model's, which does not matter here
    source, target, prompt_edit, _ = PromptEdit.execute(clip, SOURCE, checkered).result
    image = {"samples": latent_of(demo, SOURCE)}
    trajectory, noise, sigmas = DDIMInversion.execute(model, source, image, 50, 1.0, LEADING).result
    (edited,) = execute(P2PAttentionController, model=model, trajectory=trajectory, prompt_edit=prompt_edit)
    negative = [edits.encode(clip, [""])]
    ours = sample(edited, Guidance(target, negative, 4.0), noise["samples"], sigmas)
    parts = SimpleNamespace(
        model=model, trajectory=trajectory, sigmas=sigmas, source=source, target=target, negative=negative
    )
    mapper = prompt_edit.carry().source[0]
    theirs = classic_p2p(parts, swapped(mapper, 40), 20, 4.0)
    assert not torch.equal(mapper, torch.eye(77))
    assert (model.model.process_latent_in(ours) - theirs).norm() < 1e-4 * theirs.norm()


def test_equal_prompts_at_cfg_1_reconstruct_as_resampling_does(demo: tuple) -> None:
    model, clip, vae = demo
    trajectory, source, sigmas = inverted(demo, SOURCE, 25)
    image, noise = latent_of(demo, SOURCE), noise_latent(model, trajectory)
    prompt_edit = PromptEdit.execute(clip, SOURCE, SOURCE).result[2]
    (edited,) = execute(P2PAttentionController, model=model, trajectory=trajectory, prompt_edit=prompt_edit)
    plain, ours = (sample(m, Guidance(source, None, 1.0), noise, sigmas) for m in (model, edited))
    assert torch.equal(trajectory.states[-1], model.model.process_latent_in(image))
    assert (plain - image).norm() < 0.2 * image.norm()
    assert (ours - image).norm() < 1.05 * (plain - image).norm()


@pytest.mark.slow
def test_p2p_keeps_what_naive_resampling_loses(demo: tuple) -> None:
    """On twelve scenes: a smaller error outside the change, and mostly nearer the answer inside it than before."""
    arguments = argparse.Namespace(edit="swap", steps=20, cfg=3.0, cross=0.8, self_=0.4)
    cases = edits.draw_cases("swap", 12, seed=1)
    pictures = edits.edit(demo, cases, arguments, (edits.RESAMPLED, edits.NAIVE, edits.DIRECT))
    before, naive, direct = (
        np.array([edits.errors(image, case) for image, case in zip(images, cases, strict=True)]).T
        for images in pictures.values()
    )
    assert np.nanmean(direct[1]) > np.nanmean(naive[1])
    assert (direct[0] > before[0]).sum() >= 7


def test_demo_model_draws_what_it_is_asked_for(demo: tuple) -> None:
    """The style, the place, the time and, as the middle of the picture tells, which of the colours."""
    model, clip, vae = demo
    sigmas = leading_sigmas(model.get_model_object("model_sampling").sigmas, 20)
    asked = [scenes.parse(caption, 0) for caption in BALLOONS]
    guidance = Guidance([edits.encode(clip, list(BALLOONS))], [edits.encode(clip, [""])], 4.0)
    noise = torch.randn(len(asked), 16, 16, 16, generator=torch.Generator().manual_seed(1)) * sigmas[0]
    images = vae.decode(sample(model, guidance, noise, sigmas)).numpy()
    right = [middle(scenes.render(scene)) for scene in asked]
    for index, (image, scene) in enumerate(zip(images, asked, strict=True)):
        assert score.read_place(image)[:3] == (scene.style, scene.place, scene.time)
        assert np.argmin([np.abs(middle(image) - color).sum() for color in right]) == index


BALLOONS = (
    "a photo of a large blue balloon on a meadow",
    "a watercolor of a large red balloon on a beach",
    "a photo of a large purple balloon in a desert at night",
)


def middle(image: np.ndarray) -> np.ndarray:
    """The mean colour of where a large balloon is."""
    return image[44:76, 48:80].mean((0, 1))


def test_alpha_and_odd_sizes_are_taken_as_the_host_takes_them(demo: tuple) -> None:
    """The host's VAE drops alpha and crops odd sizes; the inversion then works as on any image."""
    model, clip, vae = demo
    image = torch.from_numpy(scenes.render(scenes.parse(SOURCE, 3)))[None]
    padded = torch.nn.functional.pad(image, (0, 1, 0, 3, 0, 2))  # alpha, 3 columns and 2 rows
    source = [edits.encode(clip, [SOURCE])]
    trajectory, _, _ = DDIMInversion.execute(model, source, {"samples": vae.encode(padded)}, 2, 1.0, LEADING).result
    assert trajectory.states.shape[1:] == (1, 16, 16, 16)


def test_bad_latents_are_refused_in_a_sentence(demo: tuple) -> None:
    model, clip, _ = demo
    source = [edits.encode(clip, [SOURCE])]
    with pytest.raises(ValueError, match=r"shape \[1, 4, 16, 16\] but the MODEL takes 16 channels"):
        DDIMInversion.execute(model, source, {"samples": torch.zeros(1, 4, 16, 16)}, 5, 1.0, LEADING)
    with pytest.raises(ValueError, match="holds NaN or infinite values"):
        DDIMInversion.execute(model, source, {"samples": torch.full((1, 16, 16, 16), torch.nan)}, 5, 1.0, LEADING)
    trajectory, source, _ = inverted(demo, SOURCE, 2)
    other = PromptEdit.execute(clip, "a photo of a blue car on a street", TARGET).result[2]
    with pytest.raises(ValueError, match="made with another source prompt"):
        execute(P2PAttentionController, model=model, trajectory=trajectory, prompt_edit=other)
    prompt_edit = PromptEdit.execute(clip, SOURCE, TARGET).result[2]
    (edited,) = execute(P2PAttentionController, model=model, trajectory=trajectory, prompt_edit=prompt_edit)
    with pytest.raises(ValueError, match="given a MODEL that is already edited"):
        DDIMInversion.execute(edited, source, {"samples": latent_of(demo, SOURCE)}, 5, 1.0, LEADING)


def test_demo_scene_shows_the_edit_and_its_answer() -> None:
    image, source, target, answer, changed = DemoScene.execute(SOURCE, TARGET, 3).result
    assert (source, target) == (SOURCE, TARGET)
    assert image.shape == answer.shape == (1, 128, 128, 3)
    assert ((image - answer).abs().amax(-1) > 2 / 255).float().equal(changed)
    with pytest.raises(ValueError, match="has 'banana' where it needs one of: cat, dog"):
        DemoScene.execute("a photo of a red banana in a room", TARGET, 3)
