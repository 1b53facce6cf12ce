"""DiffEdit's mask: against the formula in float64 and against diffusers, seeded, in few calls, and what it refuses."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from comfy.model_base import ModelType
from diffusers import AutoencoderKL, DDIMInverseScheduler, DDIMScheduler, StableDiffusionDiffEditPipeline
from torch import Tensor
from torch.nn.functional import interpolate, max_pool2d

from palimpsest.demo import scenes
from palimpsest.host.run import memory
from palimpsest.inversion.diffedit import Settings, difference_mask
from palimpsest.nodes.diffedit import DifferenceMask
from palimpsest.nodes.prompt import PromptEdit
from reference import in_float64
from tiny import Tiny, conditioning, execute, rows_of, tiny_model

SOURCE, TARGET = "a photo of a red car on a street", "a photo of a blue car on a street"
TIMESTEP = 481  # where the later 25 of 50 leading steps begin, as in diffusers by default
SETTINGS = Settings(noise_level=TIMESTEP / 999, noises=4, ratio=1.5, seed=7)


def found(tiny: Tiny, settings: Settings = SETTINGS, image: Tensor | None = None) -> Tensor:
    return difference_mask(tiny.model, tiny.source, tiny.target, tiny.image if image is None else image, settings)


@pytest.mark.parametrize("kind", [ModelType.EPS, ModelType.V_PREDICTION])
def test_equals_the_formula_in_float64(kind: ModelType) -> None:
    """Mean |eps - eps| over noises and channels, cut off at 1.5 times its mean over the image, in 0..1."""
    tiny = Tiny(model=tiny_model(kind), batch=2)
    _, predict = in_float64(tiny.model)
    sigma = tiny.model.get_model_object("model_sampling").sigmas[TIMESTEP].double()
    generator = torch.Generator().manual_seed(7)
    clean = tiny.model.model.process_latent_in(tiny.image).double()
    differences = []
    for _ in range(4):
        x = clean + sigma * torch.randn(clean.shape[1:], generator=generator)
        eps = [torch.cat([predict(row[None], sigma, prompt, {}) for row in x]) for prompt in (tiny.target, tiny.source)]
        differences.append((eps[0] - eps[1]).abs())
    strength = torch.stack(differences).mean((0, 2))
    most = 1.5 * strength.mean((1, 2))[:, None, None]
    expected = torch.minimum(strength, most) / most
    assert (found(tiny) - expected).abs().max() < 1e-5
    assert expected.std() > 0.1


class HostUNet(torch.nn.Module):
    """The tiny UNet as diffusers calls one."""

    config = SimpleNamespace(_diffusers_version="0.42.1", sample_size=8, in_channels=4)
    dtype, device = torch.float32, torch.device("cpu")

    def __init__(self, unet: torch.nn.Module) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, z: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, **_) -> SimpleNamespace:
        return SimpleNamespace(sample=self.unet(z, timestep.expand(len(z)).float(), encoder_hidden_states))


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_equals_diffusers(tiny: Tiny) -> None:
    """The same mask, which there is made with guidance and a negative: both fall out of it."""
    schedule = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
    schedule |= {"clip_sample": False, "set_alpha_to_one": False}
    pipeline = StableDiffusionDiffEditPipeline(
        vae=AutoencoderKL(latent_channels=4, norm_num_groups=1, block_out_channels=(4,)),
        text_encoder=None,
        tokenizer=None,
        unet=HostUNet(tiny.model.model.diffusion_model),
        scheduler=DDIMScheduler(**schedule),
        inverse_scheduler=DDIMInverseScheduler(**schedule),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    ((negative, _),) = conditioning(3)
    expected = pipeline.generate_mask(
        image=tiny.model.model.process_latent_in(tiny.image),
        target_prompt_embeds=tiny.target[0][0],
        target_negative_prompt_embeds=negative,
        source_prompt_embeds=tiny.source[0][0],
        source_negative_prompt_embeds=negative,
        num_maps_per_mask=4,
        mask_thresholding_ratio=1.5,
        generator=torch.Generator().manual_seed(7),
    )
    mask = found(tiny) > 0.5
    assert torch.equal(mask, torch.from_numpy(expected).bool())
    assert 0.1 < mask.float().mean() < 0.9


def test_images_are_alone_and_runs_the_same() -> None:
    """In a batch as alone, again the same bits, by another seed others; however many noises a call has memory for."""
    tiny = Tiny(batch=2)
    both = found(tiny)
    assert torch.equal(both, found(tiny))
    assert (both - found(tiny, SETTINGS._replace(seed=8))).abs().max() > 0.01
    for i in range(2):
        assert (both[i] - found(tiny, image=tiny.image[i : i + 1])[0]).abs().max() < 1e-4


def test_calls(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two rows a noise and no negative: in one call where it fits, else in as many as there are noises."""
    model, rows = rows_of(tiny.model)
    at_once = difference_mask(model, tiny.source, tiny.target, tiny.image, SETTINGS)
    assert rows == [8]
    rows.clear()
    monkeypatch.setattr(memory, "MARGIN", 1e12)
    split = difference_mask(model, tiny.source, tiny.target, tiny.image, SETTINGS)
    assert sum(rows) == 8
    assert len(rows) >= 4
    assert (split - at_once).abs().max() < 1e-4


@pytest.mark.parametrize("seed", range(4))
def test_the_demo_finds_what_changes(demo: tuple, seed: int) -> None:
    """At the defaults: most of what the right answer changes, in whole positions of the latent, and little else."""
    model, clip, vae = demo
    source, target, *_ = execute(PromptEdit, clip=clip, source_prompt=SOURCE, target_prompt=TARGET)
    drawn = [scenes.render(scenes.parse(text, seed)) for text in (SOURCE, TARGET)]
    image = torch.from_numpy(drawn[0])[None]
    inputs = {"model": model, "source": source, "target": target, "image": image, "vae": vae}
    (mask,) = execute(DifferenceMask, **inputs)
    assert mask.shape == (1, 128, 128)
    assert set(mask.unique().tolist()) == {0, 1}
    changed = max_pool2d(torch.from_numpy(scenes.changed(*drawn)).float()[None, None], 8)
    changed = interpolate(changed, (128, 128))[0] > 0
    mask = mask > 0
    assert float((mask & changed).sum() / (mask | changed).sum()) > 0.7

    (soft,) = execute(DifferenceMask, **inputs, threshold=0.0)
    assert torch.equal(soft > 0.3, mask)


def test_bad_input(tiny: Tiny) -> None:
    inputs = {"model": tiny.model, "source": tiny.source, "image": {"samples": tiny.image}, "target": tiny.target}
    cases = {
        "finds no difference between source and target anywhere": {"target": tiny.source},
        "was given an image but no vae": {"image": torch.zeros(1, 64, 64, 3)},
        "The latent carries a noise mask": {"image": {"samples": tiny.image, "noise_mask": torch.ones(1, 8, 8)}},
        "the MODEL takes 4 channels": {"image": {"samples": torch.zeros(1, 16, 8, 8)}},
        "The latent holds NaN": {"image": {"samples": tiny.image * torch.nan}},
    }
    for sentence, change in cases.items():
        with pytest.raises(ValueError, match=sentence):
            execute(DifferenceMask, **inputs | change)
