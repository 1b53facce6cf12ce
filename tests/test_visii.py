"""Visii: against its loss written out in float64, what it learns, and what it leaves as it was."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import comfy.utils
import folder_paths
import pytest
import torch
from comfy.model_base import ModelType
from comfy.model_management import InterruptProcessingException
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from palimpsest.demo import model as demo_model
from palimpsest.guidance.instruct import Instruct
from palimpsest.host.branch.instructed import attach_instruction
from palimpsest.host.files import conditioning as conditionings
from palimpsest.host.run.sampler import Run
from palimpsest.host.unet.gradients import gradients
from palimpsest.inversion import visii as visii_module
from palimpsest.inversion.visii import EVERY, LOOKS, Direction, Learned, LearningSampler, Settings, check_pair, visii
from palimpsest.nodes.visii import LearnEditFromPair
from reference import in_float64
from test_clip_guidance import clip_vision
from test_instruct import InstructConfig
from test_null_text import stopping
from tiny import Tiny, conditioning, execute, rows_of, tiny_model

EPS, V = ModelType.EPS, ModelType.V_PREDICTION
QUICK = Settings(updates=4, learning_rate=0.01, tokens=5)
BEFORE = 2  # calls that tell an unfinished run


@pytest.fixture(autouse=True)
def temp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(folder_paths, "temp_directory", str(tmp_path))
    return tmp_path / "palimpsest"


def tiny_of(kind: ModelType = EPS) -> Tiny:
    return Tiny(steps=1, model=tiny_model(kind, config=InstructConfig, in_channels=8))


@pytest.fixture
def tiny() -> Tiny:
    return tiny_of()


def pair(batch: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    before, after = (torch.randn(batch, 4, 8, 8, generator=generator) * 5 for _ in range(2))
    return before, after


def learned(
    tiny: Tiny,
    batch: int = 1,
    settings: Settings = QUICK,
    checkpointing: bool = True,
    direction: Direction | None = None,
) -> Learned:
    return visii(tiny.model, *pair(batch), tiny.source, settings, checkpointing, direction)


def seen(channels: int = 64) -> Direction:
    generator = torch.Generator().manual_seed(11)
    return Direction(*(torch.randn(shape, generator=generator) for shape in ((24,), (24, channels))))


class Flat:
    """The smallest VAE."""

    @staticmethod
    def encode(image: Tensor) -> Tensor:
        return image.movedim(-1, 1).repeat(1, 2, 1, 1)[:, :4]


Drawn = list[tuple[float, Tensor]]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Drawn:
    """Sigma and noise of every update."""
    found: Drawn = []
    own = LearningSampler.drawn

    def draw(self: LearningSampler, run: Run, update: int) -> tuple[float, Tensor]:
        found.append(own(self, run, update))
        return found[-1]

    monkeypatch.setattr(LearningSampler, "drawn", draw)
    return found


def objective(tiny: Tiny, batch: int) -> Callable[[Tensor, float, Tensor], Tensor]:
    """||eps - e(z_t, t, c_I, c)||^2 of an embedding at a sigma and noise, in float64."""
    unet, _ = in_float64(tiny.model)
    sampling = tiny.model.get_model_object("model_sampling")
    table, v = sampling.sigmas.double(), "V_PREDICTION" in [kind.__name__ for kind in type(sampling).__mro__]
    before, after = (latent.double() for latent in pair(batch))
    z = tiny.model.model.process_latent_in(after)

    def loss(embedding: Tensor, sigma: float, noise: Tensor) -> Tensor:
        noise = noise.double().clone()
        signal = (1 + sigma**2) ** -0.5  # sqrt(alpha_bar)
        z_t = signal * (z + sigma * noise)
        timestep = (table - sigma).abs().argmin().double().expand(batch).clone()
        output = unet(torch.cat([z_t, before], 1), timestep, embedding.expand(batch, -1, -1), transformer_options={})
        e = signal * (output + sigma * z_t) if v else output
        return (noise - e).square().mean()

    return loss


@pytest.mark.parametrize(
    ("kind", "batch", "direction"), [(EPS, 1, None), (EPS, 2, None), (EPS, 1, seen()), (V, 1, None), (V, 2, seen())]
)
def test_the_optimisation_is_the_papers(kind: ModelType, batch: int, direction: Direction | None, drawn: Drawn) -> None:
    """With Adam by hand; the first row stays. A look behind the last update keeps what was found."""
    tiny = tiny_of(kind)
    sampled: list[LearningSampler] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            visii_module, "LearningSampler", lambda *args: sampled.append(LearningSampler(*args)) or sampled[0]
        )
        patch.setattr(LearningSampler, "_look", lambda self, run, e, done: _take(self, e, done))
        found = learned(tiny, batch, direction=direction).embedding
    with gradients():
        loss_of = objective(tiny, batch)
        start = tiny.source[0][0].double().clone()
        values, first, second = start, torch.zeros_like(start), torch.zeros_like(start)
        for i, (sigma, noise) in enumerate(drawn, start=1):
            values.requires_grad_()
            loss = 4 * loss_of(values, sigma, noise)
            if direction is not None:
                change, said = direction.change.double(), direction.projection.double() @ values[0].mean(0)
                loss = loss - 0.1 * (change @ said / (change.norm() * said.norm()))
            (grad,) = torch.autograd.grad(loss / 4, values)
            grad[:, 0] = grad[:, QUICK.tokens + 1 :] = 0
            first, second = 0.9 * first + 0.1 * grad, 0.999 * second + 0.001 * grad**2
            moved = first / (1 - 0.9**i) / ((second / (1 - 0.999**i)).sqrt() + 1e-8)
            values = values.detach() - QUICK.learning_rate * moved
    assert len(drawn) == QUICK.updates
    kept = [0, *range(QUICK.tokens + 1, found.shape[1])]
    assert torch.equal(found[:, kept], tiny.source[0][0][:, kept])
    errors = (
        (found - values).abs().flatten().sort().values[:-20]
    )  # Adam divides what is nothing but rounding by its size
    assert errors.norm() < 1e-3 * (values - start).norm()


def _take(sampler: LearningSampler, embedding: Tensor, done: int) -> None:
    sampler.best, sampler.losses[done] = embedding.detach().clone(), 0.0


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", [EPS, V])
def test_gradients_are_those_of_finite_differences(
    kind: ModelType, checkpointing: bool, drawn: Drawn, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny, taken = tiny_of(kind), []
    step = torch.optim.Adam.step
    monkeypatch.setattr(
        torch.optim.Adam,
        "step",
        lambda self: taken.append(self.param_groups[0]["params"][0].grad.clone()) or step(self),
    )
    learned(tiny, 2, checkpointing=checkpointing)
    loss_of, start = objective(tiny, 2), tiny.source[0][0].double()
    generator = torch.Generator().manual_seed(5)
    for _ in range(3):
        direction = torch.randn(start.shape, generator=generator).double()
        direction[:, 0] = direction[:, QUICK.tokens + 1 :] = 0
        ahead, behind = (loss_of(start + move * direction, *drawn[0]) for move in (1e-4, -1e-4))
        assert float((taken[0] * direction).sum()) == pytest.approx(float(ahead - behind) / 2e-4, rel=1e-3)


def test_every_update_has_another_timestep(tiny: Tiny, drawn: Drawn) -> None:
    learned(tiny, settings=Settings(updates=50))
    sigmas = [sigma for sigma, _ in drawn]
    table = tiny.model.get_model_object("model_sampling").sigmas.tolist()
    assert sorted(table.index(sigma) for sigma in sigmas) == list(range(10, 1000, 20))
    assert sigmas != sorted(sigmas)


def test_the_instruction_of_the_lowest_loss_is_kept(tiny: Tiny) -> None:
    """At a rate that is too large it is the start itself."""
    found = learned(tiny, settings=Settings(updates=2 * EVERY + 5, learning_rate=0.01))
    assert [*found.losses] == [0, EVERY, 2 * EVERY, 2 * EVERY + 5]
    assert found.losses[found.at] == min(found.losses.values()) < found.losses[0]
    wild = learned(tiny, settings=Settings(updates=3, learning_rate=1.0))
    if wild.at == 0:
        assert torch.equal(wild.embedding, tiny.source[0][0])


def test_again_gives_the_same_bits_and_another_seed_others(tiny: Tiny) -> None:
    one, two, other = (learned(tiny, settings=QUICK._replace(seed=seed)) for seed in (0, 0, 2**64 - 1))
    assert torch.equal(one.embedding, two.embedding)
    assert not torch.equal(one.embedding, other.embedding)


def test_nothing_of_it_stays(tiny: Tiny) -> None:
    before, start = tiny.sample(tiny.model), tiny.source[0][0].clone()
    weights = {name: weight.clone() for name, weight in tiny.model.model.state_dict().items()}
    latents = pair()
    visii(tiny.model, *latents, tiny.source, QUICK, False)
    assert torch.equal(tiny.sample(tiny.model), before)
    assert torch.equal(tiny.source[0][0], start)
    assert tiny.source[0][1] == {}
    assert all(torch.equal(weight, weights[name]) for name, weight in tiny.model.model.state_dict().items())
    assert all(torch.equal(*both) for both in zip(latents, pair(), strict=True))


def test_a_run_goes_on_where_it_was_interrupted(tiny: Tiny, temp: Path) -> None:
    """In the third of its updates, with the best so far and the state of Adam."""
    with pytest.raises(InterruptProcessingException):
        visii(stopping(tiny.model, BEFORE + LOOKS + 2), *pair(), tiny.source, QUICK, False)
    assert len(list(temp.iterdir())) == 1
    counted, rows = rows_of(tiny.model)
    resumed = visii(counted, *pair(), tiny.source, QUICK, False)
    assert len(rows) == BEFORE + 2 + LOOKS
    assert not list(temp.iterdir())
    rows.clear()
    whole = visii(counted, *pair(), tiny.source, QUICK, False)
    assert len(rows) == BEFORE + 4 + 2 * LOOKS
    assert torch.equal(resumed.embedding, whole.embedding)
    assert resumed.losses == whole.losses


def test_a_clip_counts_up_to_half_a_cosine() -> None:
    """What it says of an embedding is that of the mean of its rows, whose gradient ends at 0.5."""
    change, across = torch.eye(24)[:2]
    for cosine in (-0.9, 0.3, 0.6):
        mean = cosine * change + (1 - cosine**2) ** 0.5 * across
        direction = Direction(3 * change, torch.eye(24))
        with gradients():
            embedding = torch.stack([mean + across, mean - across])[None].requires_grad_()
            agreed = direction.agreement(embedding)
            (gradient,) = torch.autograd.grad(agreed, embedding)
        assert float(agreed) == pytest.approx(min(cosine, 0.5))
        assert bool(gradient.any()) == (cosine < 0.5)


def test_progress_rises_with_every_update(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", lambda value, total, *_, **__: seen.append((value, total)))
    learned(tiny)
    assert sorted(set(seen)) == seen
    assert seen[-1] == (QUICK.updates, QUICK.updates)


def test_the_node_learns_what_a_file_keeps(tiny: Tiny, tmp_path: Path) -> None:
    image = torch.rand(1, 8, 8, 3, generator=torch.Generator().manual_seed(1))
    start = [[tiny.source[0][0], {"pooled_output": torch.ones(1, 8)}]]
    asked = {"model": tiny.model, "before": image, "after": 1 - image, "vae": Flat, "start": start, "updates": 3}
    (found,) = execute(LearnEditFromPair, **asked)
    assert torch.equal(found[0][1]["pooled_output"], torch.ones(1, 8))
    assert "concat_latent_image" not in found[0][1]
    conditionings.save(found, tmp_path / "kept.safetensors")
    kept = conditionings.load(tmp_path / "kept.safetensors")
    assert torch.equal(kept[0][0], found[0][0])
    picture = torch.zeros(1, 4, 8, 8)
    edited = tiny.sample(attach_instruction(tiny.model, picture, Instruct(1.5)), kept)
    assert torch.isfinite(edited).all()


def test_the_node_takes_both_halves_of_a_clip(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the pair's pictures it takes the way between their means."""
    _, clip, _ = demo_model.load()
    weight = clip.cond_stage_model.clip_l.transformer.text_projection.weight
    vision, given = clip_vision(len(weight)), []

    def note(*args: object) -> Learned:
        given.append(args[-1])
        return Learned(tiny.source[0][0], {0: 1.0})

    monkeypatch.setattr("palimpsest.nodes.visii.visii", note)
    before, after = torch.rand(2, 2, 40, 32, 3, generator=torch.Generator().manual_seed(1))
    asked = {"model": tiny.model, "before": before, "after": after, "vae": Flat, "start": tiny.source}
    execute(LearnEditFromPair, **asked, clip=clip, clip_vision=vision)
    execute(LearnEditFromPair, **asked)
    first, last = (vision.encode_image(pictures)["image_embeds"] for pictures in (before, after))
    assert torch.allclose(given[0].change, (last - first).mean(0), atol=1e-5)
    assert torch.equal(given[0].projection, weight)
    assert given[1] is None
    with pytest.raises(ValueError, match="needs both halves of a CLIP, but clip_vision is not connected"):
        execute(LearnEditFromPair, **asked, clip=clip)
    with pytest.raises(
        ValueError, match="clip of Learn Edit from Pair makes 128 numbers of a prompt and clip_vision 24"
    ):
        execute(LearnEditFromPair, **asked, clip=clip, clip_vision=clip_vision(24))


def test_refusals(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    before, sound = pair()

    def refused(
        sentence: str,
        model: ModelPatcher = tiny.model,
        start: list = tiny.source,
        after: Tensor = sound,
        direction: Direction | None = None,
    ) -> None:
        with pytest.raises(ValueError, match=sentence):
            visii(model, before, after, start, QUICK, True, direction)

    ((embedding, _),) = tiny.source
    refused(r"shows the MODEL an image, for which this one .BaseModel. has no channels", tiny_model())
    refused(
        "carries another node's guidance .Instruct Guidance.",
        attach_instruction(tiny.model, before, Instruct(1.5)),
    )
    refused("The start of Learn Edit from Pair has 2 entries", start=tiny.source * 2)
    refused("The start of Learn Edit from Pair has 0 entries", start=[])
    refused("The start of Learn Edit from Pair carries 'mask'", start=[[embedding, {"mask": torch.ones(1, 8, 8)}]])
    refused("The start of Learn Edit from Pair carries 'gligen'", start=[[embedding, {"gligen": ()}]])
    refused("has embeddings of 32 channels but this MODEL", start=[[embedding[..., :32], {}]])
    refused("holds 2 prompts, but one instruction is learned", start=conditioning(1, batch=2))
    refused("the MODEL takes 4 channels", after=torch.zeros(1, 16, 8, 8))
    refused("The latent holds NaN", after=torch.full((1, 4, 8, 8), float("nan")))
    refused(
        "clip of Learn Edit from Pair has tokens of 32 channels, but this MODEL's prompts have 64",
        direction=Direction(torch.ones(24), torch.ones(24, 32)),
    )
    monkeypatch.setattr(LearningSampler, "drawn", lambda self, run, update: (1.0, run.latent * float("nan")))
    refused("came to NaN or infinite values at update 1 of 4, with learning_rate 0.01")


def test_pictures_that_make_no_pair_are_refused() -> None:
    with pytest.raises(ValueError, match="given 2 in before but 3 in after: connect as many"):
        check_pair(torch.zeros(2, 8, 8, 3), torch.zeros(3, 8, 8, 3))
    with pytest.raises(ValueError, match="images of 16 x 8 in before but of 8 x 8 in after"):
        check_pair(torch.zeros(1, 8, 16, 3), torch.zeros(1, 8, 8, 3))
