"""Concept Guidance: LEDITS++'s masks and sum in float64, along edit-friendly noise maps too, and what it refuses."""

from __future__ import annotations

import nodes
import pytest
import torch
from comfy.model_base import ModelType
from comfy.model_patcher import ModelPatcher
from comfy.samplers import sampler_object
from torch import Tensor

from flows import FLOWS
from palimpsest.guidance.concepts import Concept
from palimpsest.host.branch.concepts import KEY, attach_concept
from palimpsest.inversion.flow_edit import edit_image
from palimpsest.inversion.replay import invert_edit_friendly
from palimpsest.inversion.run import Guidance, invert, resample
from palimpsest.inversion.virtual import invert_virtually, schedule
from palimpsest.nodes.concepts import ConceptGuidance
from reference import explicit, in_float64
from test_composition import attach, edit
from test_ddim import relative
from tiny import WIDTH, Tiny, conditioning, execute, rows_of, tiny_model

CFG = 3.0
EMPTY = conditioning(7)
WORDS = (2, 3, 6)


def concept(seed: int = 8, scale: float = 5.0, quantile: float = 0.6, start: float = 0.0, end: float = 1.0) -> Concept:
    columns = torch.zeros(77)
    columns[list(WORDS)] = 1
    return Concept(conditioning(seed), EMPTY, columns, scale, start, end, quantile)


def each(prompt: list, images: Tensor) -> list:
    """The prompt once for every one of the images."""
    return [[prompt[0][0].expand(len(images), -1, -1), {}]]


def guided(tiny: Tiny, *concepts: Concept) -> ModelPatcher:
    model = tiny.model
    for one in concepts:
        model = attach_concept(model, one)
    return model


class Reference:
    """The paper's guidance of a model in float64."""

    def __init__(self, tiny: Tiny) -> None:
        self.tiny = tiny
        self.unet, self.predict = in_float64(tiny.model)

    def noise(self, x: Tensor, sigma: Tensor, prompt: list) -> tuple[Tensor, Tensor]:
        """The predicted noise, and the words' map [b, 8, 8], the mean over heads and layers of that size."""
        maps: list[Tensor] = []

        def attend(q: Tensor, k: Tensor, v: Tensor, options: dict) -> Tensor:
            q, k, v = (t.unflatten(-1, (options["n_heads"], -1)).transpose(1, 2) for t in (q, k, v))
            own = explicit(q, k)
            if q.shape[2] == 64:
                maps.append(own[..., list(WORDS)].sum(-1).mean(1).unflatten(-1, (8, 8)))
            return (own @ v).transpose(1, 2).flatten(2)

        blocks = [(name, i) for name in ("input", "middle", "output") for i in range(12)]
        options = {"patches_replace": {"attn2": dict.fromkeys(blocks, attend)}}
        return self.predict(x, sigma, each(prompt, x), options), torch.stack(maps).mean(0)

    def mask(self, difference: Tensor, attended: Tensor, quantile: float) -> Tensor:
        weights = torch.tensor([[(-((i - 1) ** 2 + (j - 1) ** 2) / 0.5) for j in range(3)] for i in range(3)]).double()
        weights = weights.exp() / weights.exp().sum()
        b, height, width = attended.shape
        smooth = torch.zeros_like(attended)
        for i in range(-1, 2):
            for j in range(-1, 2):
                rows = [abs(y + i) if y + i < height else 2 * height - 2 - y - i for y in range(height)]
                columns = [abs(x + j) if x + j < width else 2 * width - 2 - x - j for x in range(width)]
                smooth += weights[i + 1, j + 1] * attended[:, rows][:, :, columns]
        masks = []
        for values in (smooth, difference.abs().sum(1)):
            least = torch.stack([image.flatten().quantile(quantile) for image in values])
            masks.append(values >= least.view(b, 1, 1))
        return (masks[0] & masks[1])[:, None].double()

    def eps(self, x: Tensor, sigma: Tensor, step: int, concepts: tuple[Concept, ...], cfg: float = CFG) -> Tensor:
        negative, _ = self.noise(x, sigma, self.tiny.negative)
        e = negative + cfg * (self.noise(x, sigma, self.tiny.target)[0] - negative)
        empty, _ = self.noise(x, sigma, EMPTY)
        for one in concepts:
            if one.start <= step / self.tiny.steps < one.end:
                own, attended = self.noise(x, sigma, one.conditioning)
                e = e + one.scale * self.mask(own - empty, attended, one.quantile) * (own - empty)
        return e

    def euler(self, *concepts: Concept) -> Tensor:
        sigmas = self.tiny.sigmas.double()
        x = self.tiny.trajectory.states[0].double()
        for step, sigma in enumerate(sigmas[:-1]):
            x = x + (sigmas[step + 1] - sigma) * self.eps(x, sigma, step, concepts)
        return self.tiny.model.model.process_latent_out(x)


@pytest.mark.parametrize("prediction", [ModelType.EPS, ModelType.V_PREDICTION])
def test_the_guidance_is_the_papers(prediction: ModelType) -> None:
    """One that is added in a part of the run, and one that is taken away."""
    tiny = Tiny(model=tiny_model(prediction), batch=2)
    concepts = concept(end=0.8), concept(9, -3.0, 0.3, start=0.2)
    expected = Reference(tiny).euler(*concepts)
    assert relative(tiny.sample(guided(tiny, *concepts), cfg=CFG).double(), expected) < 1e-5
    for fewer in ((), concepts[:1], concepts[1:]):
        assert relative(tiny.sample(guided(tiny, *fewer), cfg=CFG).double(), expected) > 0.005


def test_it_edits_along_edit_friendly_noise_maps(tiny: Tiny) -> None:
    """The sampler's step of DDPM with its maps; at scale 0 the image comes back."""
    prompts = Guidance(tiny.target, tiny.negative, CFG)
    trajectory, sampler = invert_edit_friendly(tiny.model, prompts, tiny.image, tiny.sigmas, 1.0, 0)
    tiny.follow(trajectory)
    reference, sigmas = Reference(tiny), tiny.sigmas.double()
    x = trajectory.states[0].double()
    for step, (sigma, below) in enumerate(zip(sigmas[:-1], sigmas[1:], strict=True)):
        kept = (below / sigma) ** 2
        denoised = x - sigma * reference.eps(x, sigma, step, (concept(),))
        x = denoised + kept * (x - denoised) + sampler.maps[step].double()
    expected = tiny.model.model.process_latent_out(x)
    edited = tiny.sample(guided(tiny, concept()), cfg=CFG, sampler=sampler)
    assert relative(edited.double(), expected) < 1e-5
    assert relative(tiny.sample(tiny.model, cfg=CFG, sampler=sampler), tiny.image) < 1e-5
    assert relative(edited, tiny.image) > 0.005


@pytest.mark.parametrize("first", [True, False])
def test_it_edits_without_inversion(tiny: Tiny, first: bool) -> None:
    """In either order with Virtual Inversion its part is one of the difference that moves the image."""
    sigmas = schedule(tiny.model, "simple", 4, 0.6)
    model, trajectory = invert_virtually(
        guided(tiny, concept()) if first else tiny.model, tiny.source, tiny.image, sigmas
    )
    model = model if first else attach_concept(model, concept())
    edited = resample(model, trajectory, Guidance(tiny.target, tiny.negative, CFG), sampler_object("euler"))
    reference, levels = Reference(tiny), sigmas.double()
    image, moved = trajectory.states[-1].double(), 0.0
    for i, (sigma, below) in enumerate(zip(levels[:-1], levels[1:], strict=True)):
        source = trajectory.states[i].double()
        target = source + moved
        of_source = source - sigma * reference.noise(source, sigma, tiny.source)[0]
        difference = target - sigma * reference.eps(target, sigma, 0, (concept(),)) - of_source
        moved = below / sigma * moved + (1 - below / sigma) * difference
    expected = tiny.model.model.process_latent_out(image + moved)
    assert relative(edited.double(), expected) < 1e-4


def test_quantile_0_guides_everywhere_and_1_almost_nowhere() -> None:
    difference, attended = torch.randn(2, 4, 8, 8), torch.rand(2, 8, 8)
    everywhere, hardly = concept(quantile=0.0), concept(quantile=1.0)
    assert torch.equal(everywhere.guided(difference, attended), 5.0 * difference)
    assert hardly.mask(difference, attended).sum((1, 2, 3)).max() <= 1


def test_every_image_has_its_own_mask() -> None:
    difference, attended = torch.randn(2, 4, 8, 8), torch.rand(2, 8, 8)
    both = concept().mask(difference * torch.tensor([1.0, 9.0]).view(2, 1, 1, 1), attended)
    assert torch.equal(both, torch.cat([concept().mask(difference[i : i + 1], attended[i : i + 1]) for i in range(2)]))
    assert 0 < both[0].sum() < 64 * 0.4 + 1


def test_what_a_step_costs(tiny: Tiny) -> None:
    """Two rows for each concept: with it and without."""
    model, rows = rows_of(guided(tiny, concept(end=0.4), concept(9)))
    tiny.sample(model, cfg=CFG)
    assert rows == [2, 2, 2] * 2 + [2, 2] * 3


@pytest.mark.parametrize("kind", ["swap", "pnp", "masactrl"])
def test_edits_stand_beside_it(tiny: Tiny, kind: str) -> None:
    """In either order, and both have their part."""
    edited = attach(tiny.model, tiny.trajectory, edit(kind))
    both = tiny.sample(attach_concept(edited, concept()), cfg=CFG)
    other_way = tiny.sample(attach(guided(tiny, concept()), tiny.trajectory, edit(kind)), cfg=CFG)
    assert relative(both, other_way) < 1e-5
    for model in (edited, guided(tiny, concept())):
        assert relative(tiny.sample(model, cfg=CFG), both) > 0.005


def test_edits_without_inversion_stand_before_and_behind_it(tiny: Tiny) -> None:
    """The concept is asked for where the target is, not where the sampler believes it to be."""

    def sampled(model: ModelPatcher) -> Tensor:
        prompts, latent = (tiny.target, tiny.negative), {"samples": tiny.image}
        return nodes.KSampler().sample(model, 0, 5, CFG, "euler", "simple", *prompts, latent, 0.8)[0]["samples"]

    edited = edit_image(tiny.model, tiny.source, tiny.image)
    both = sampled(attach_concept(edited, concept()))
    assert torch.equal(both, sampled(edit_image(guided(tiny, concept()), tiny.source, tiny.image)))
    assert relative(both, sampled(edited)) > 0.005


def test_at_scale_0_the_node_hands_on_its_model(demo: tuple) -> None:
    model, clip, _ = demo
    (same,) = execute(ConceptGuidance, model=model, clip=clip, scale=0.0)
    assert same is model


def test_the_node_marks_all_words_of_the_concept(demo: tuple) -> None:
    model, clip, _ = demo
    (found,) = execute(ConceptGuidance, model=model, clip=clip, concept="a blue car", scale=-2.0, threshold=0.7)
    (one,) = found.model_options["transformer_options"][KEY]
    assert one.columns.nonzero().flatten().tolist() == [1, 2, 3]
    assert (one.scale, one.quantile) == (-2.0, 0.7)


def test_what_cannot_be_is_refused(tiny: Tiny, demo: tuple) -> None:
    model, clip, _ = demo
    with pytest.raises(ValueError, match="The concept of Concept Guidance is empty: type what to add"):
        execute(ConceptGuidance, model=model, clip=clip, concept="  ")
    with pytest.raises(ValueError, match="is to end at 0.2 but starts at 0.5"):
        execute(ConceptGuidance, model=model, clip=clip, start=0.5, end=0.2)
    with pytest.raises(ValueError, match=r"This MODEL \(Flux\) is no UNet, but Concept Guidance reads layers"):
        attach_concept(FLOWS["Flux"].make(), concept())
    (found,) = execute(ConceptGuidance, model=tiny.model, clip=clip)
    with pytest.raises(ValueError, match=r"another node's guidance \(Concept Guidance\)"):
        invert(guided(tiny, concept()), Guidance(tiny.source), tiny.image, tiny.sigmas)
    with pytest.raises(ValueError, match=f"embeddings of 128 channels but the prompt beside it has {WIDTH}"):
        tiny.sample(found)
