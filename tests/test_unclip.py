"""unCLIPConditioning: images beside the prompt, on which the host draws noise by the sampler's seed."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace

import comfy.samplers
import pytest
import torch
from comfy.model_base import ModelType
from comfy.model_patcher import ModelPatcher
from nodes import unCLIPConditioning

from palimpsest.host.branch.source import attach
from palimpsest.inversion.replay import invert_edict, invert_edit_friendly
from palimpsest.inversion.run import Guidance, record
from test_composition import Still, edit, stored
from test_ddim import relative
from tiny import Tiny, TinyConfig, conditioning, tiny_model

WIDTH = 16  # of the embedding of an image


class UnclipConfig(TinyConfig):
    noise_aug_config = {
        "noise_schedule_config": {"timesteps": 1000, "beta_schedule": "squaredcos_cap_v2"},
        "timestep_dim": WIDTH,
    }


def unclip_model() -> ModelPatcher:
    """As SD2.1-unCLIP is, but tiny and random."""
    changes = {"adm_in_channels": 2 * WIDTH, "num_classes": "sequential"}
    return tiny_model(ModelType.V_PREDICTION, config=UnclipConfig, **changes)


def with_image(prompt: list, seed: int) -> list:
    image = torch.randn(1, WIDTH, generator=torch.Generator().manual_seed(seed))
    return unCLIPConditioning().apply_adm(prompt, SimpleNamespace(image_embeds=image), 1.0, 0.3)[0]


@pytest.fixture(scope="module")
def unclip() -> Tiny:
    with torch.inference_mode():
        source, target = with_image(conditioning(1), 20), with_image(conditioning(2), 21)
        return Tiny(model=unclip_model(), source=source, target=target)


@pytest.mark.parametrize("seed", [0, 7])
@pytest.mark.parametrize("kind", ["swap", "pnp", "masactrl"])
def test_the_source_is_encoded_as_it_was_whatever_the_seed(kind: str, seed: int, unclip: Tiny) -> None:
    """4 to 10 % of the result hung on the sampler's seed."""
    live = unclip.sample(attach(unclip.model, unclip.trajectory, edit(kind)), seed=seed)
    kept = unclip.sample(attach(unclip.model, unclip.trajectory, edit(kind), stored(unclip.model, unclip)), seed=seed)
    plain = unclip.sample(unclip.model, seed=seed)
    assert relative(live, kept) < 1e-4
    assert relative(live, plain) > 0.1
    assert relative(unclip.sample(attach(unclip.model, unclip.trajectory, Still()), seed=seed), plain) < 1e-4


def test_a_recorded_run_is_read_as_it_ran(unclip: Tiny) -> None:
    """Whose seed is the user's."""
    guidance, euler = Guidance(unclip.source, unclip.negative, 4.0), comfy.samplers.sampler_object("euler")
    zeros = torch.zeros_like(unclip.noise)
    trajectory, _ = record(unclip.model, guidance, euler, unclip.sigmas, zeros, unclip.noise, seed=7)
    recorded = copy.copy(unclip)
    recorded.trajectory = trajectory
    read = [attach(unclip.model, trajectory, edit("swap"), store) for store in (None, stored(unclip.model, recorded))]
    live, kept = (unclip.sample(model, seed=3) for model in read)
    assert relative(live, kept) < 1e-4


@pytest.mark.parametrize("invert", [invert_edict, invert_edit_friendly])
def test_exact_inversions_ask_for_their_seed(invert, unclip: Tiny) -> None:
    """At another one the image came back 4 % off."""
    settings = {"mixing": 0.93} if invert is invert_edict else {"eta": 1.0, "seed": 5}
    guidance = Guidance(unclip.source, None, 1.0)
    trajectory, sampler = invert(unclip.model, guidance, unclip.image, unclip.sigmas, **settings)
    noise = unclip.model.model.process_latent_out(trajectory.states[0])

    def again(seed: int) -> torch.Tensor:
        return unclip.sample(unclip.model, unclip.source, cfg=1.0, sampler=sampler, noise=noise, seed=seed)

    assert relative(again(0), unclip.image) < 1e-6
    with pytest.raises(ValueError, match="at 7 the sampler of .* cannot give the image back: set noise_seed to 0"):
        again(7)


def test_files_cannot_hold_it(unclip: Tiny, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds 'unclip_conditioning', which a file cannot: invert without it"):
        unclip.trajectory.save(tmp_path / "x.safetensors")
