"""H-space: directions of features, their files, and Asyrp's asymmetric step against the paper's formula in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import comfy.k_diffusion.sampling
import comfy.model_management
import comfy.samplers
import folder_paths
import pytest
import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from comfy.model_base import ModelType
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from comfy_extras.nodes_easycache import EasyCacheNode
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from flows import FLOWS
from palimpsest.guidance.h_features import direction_of_trajectories
from palimpsest.guidance.h_space import HDirection, Moves
from palimpsest.host.branch.asymmetric import attach_moves
from palimpsest.host.branch.call import CHUNKS, slice_of
from palimpsest.host.branch.source import attach, attach_blend
from palimpsest.host.run.model import identity
from palimpsest.host.run.sampler import OwnSampler, Run
from palimpsest.host.unet.patches import with_decoded
from palimpsest.inversion.run import Guidance, invert, resample
from palimpsest.inversion.virtual import invert_virtually, schedule
from palimpsest.nodes.h_space import (
    ApplyHSpaceDirection,
    HSpaceDirectionFromPrompts,
    HSpaceDirectionFromTrajectories,
    LoadHSpaceDirection,
    SaveHSpaceDirection,
)
from reference import in_float64
from test_composition import blend, edit
from test_ddim import relative
from test_source import swap
from tiny import Tiny, conditioning, execute, rows_of, tiny_model

CFG = 4.0
SIZES = [(64, 4, 4), (64, 4, 4), (64, 8, 8), (32, 8, 8)]  # of the tiny UNet, before each of its output blocks
MIDDLE = SIZES[0]


def direction(tiny: Tiny, seed: int = 5, block: int = 0, size: tuple[int, int, int] | None = None) -> HDirection:
    generator = torch.Generator().manual_seed(seed)
    deltas = torch.randn(tiny.steps, *(size or SIZES[block]), generator=generator)
    return HDirection(deltas, tiny.sigmas[:-1].clone(), identity(tiny.model), block)


def moving(
    tiny: Tiny,
    scale: float = 1.0,
    start: float = 0.0,
    end: float = 1.0,
    boost: float = 1.0,
    seed: int = 5,
    block: int = 0,
) -> ModelPatcher:
    return attach_moves(tiny.model, Moves(direction(tiny, seed, block), scale, start, end, boost))


def each(prompt: list, images: Tensor) -> list:
    """The prompt once for every one of the images."""
    return [[prompt[0][0].expand(len(images), -1, -1), {}]]


@contextmanager
def added(unet: UNetModel, block: int, delta: Tensor | None) -> Iterator[None]:
    """Within it, what the UNet's middle block gives, or its output block before `block`, is moved by delta."""
    layer = unet.output_blocks[block - 1][-1] if block else unet.middle_block[-1]
    hook = layer.register_forward_hook(lambda module, inputs, h: h if delta is None else h + delta)
    try:
        yield
    finally:
        hook.remove()


Draw = Callable[[float, float], Tensor]
"""Noise for the step from one sigma to the next."""


def drawn_by_the_sampler(tiny: Tiny) -> Draw:
    return comfy.k_diffusion.sampling.default_noise_sampler(tiny.noise, seed=0)


def drawn_by_us(tiny: Tiny) -> Draw:
    generator = torch.Generator().manual_seed(2)
    return lambda sigma, below: torch.randn(tiny.noise.shape, generator=generator)


def paper(
    tiny: Tiny,
    scale: float,
    start: float,
    end: float,
    boost: float = 1.0,
    draw: Draw | None = None,
    block: int = 0,
) -> Tensor:
    """Asyrp in float64, as its authors write it: z' = sqrt(a') P(e~) + sqrt(1 - a' - v) e + sqrt(v) n, P the predicted
    image; v is 0, and from boost on that of DDPM's noise, (1 - a') / (1 - a) (1 - a / a').
    """
    unet, predict = in_float64(tiny.model)
    sigmas, deltas = tiny.sigmas.double(), direction(tiny, block=block).deltas.double()
    x = tiny.trajectory.states[0].double()
    for step, (sigma, below) in enumerate(zip(sigmas[:-1], sigmas[1:], strict=True)):

        def noise(prompt: list, delta: Tensor | None = None, x: Tensor = x, sigma: Tensor = sigma) -> Tensor:
            with added(unet, block, delta):
                return predict(x, sigma, each(prompt, x), {})

        negative = noise(tiny.negative)
        e = moved = negative + CFG * (noise(tiny.target) - negative)
        if start <= step / tiny.steps < end:
            moved = negative + CFG * (noise(tiny.target, scale * deltas[step]) - negative)
        a, a_next = 1 / (1 + sigma**2), 1 / (1 + below**2)
        z = a.sqrt() * x
        noisy = step / tiny.steps >= boost
        v = (1 - a_next) / (1 - a) * (1 - a / a_next) if noisy else 0 * a
        z = a_next.sqrt() * (z - (1 - a).sqrt() * moved) / a.sqrt() + (1 - a_next - v).sqrt() * e
        if noisy:
            z = z + v.sqrt() * draw(sigma, below).double()
        x = z / a_next.sqrt()
    return tiny.model.model.process_latent_out(x)


@pytest.mark.parametrize("prediction", [ModelType.EPS, ModelType.V_PREDICTION])
@pytest.mark.parametrize("window", [(0.0, 1.0), (0.2, 0.8)])
def test_the_step_is_the_papers(prediction: ModelType, window: tuple[float, float]) -> None:
    tiny = Tiny(model=tiny_model(prediction), batch=2)
    expected = paper(tiny, 2.0, *window)
    plain = tiny.sample(tiny.model, cfg=CFG)
    for sampler in ("euler", "ddim"):
        assert relative(tiny.sample(moving(tiny, 2.0, *window), cfg=CFG, sampler=sampler).double(), expected) < 1e-5
    assert relative(plain.double(), expected) > 0.02


@pytest.mark.parametrize("block", [1, 2, 3])
def test_h_may_be_what_a_block_of_the_decoder_gives(tiny: Tiny, block: int) -> None:
    expected = paper(tiny, 0.5, 0.0, 0.6, block=block)
    assert relative(tiny.sample(moving(tiny, 0.5, 0.0, 0.6, block=block), cfg=CFG).double(), expected) < 1e-5
    assert relative(tiny.sample(tiny.model, cfg=CFG).double(), expected) > 0.02


def test_noise_in_all_steps_is_the_papers(tiny: Tiny) -> None:
    """As `euler_ancestral` adds it."""
    expected = paper(tiny, 2.0, 0.0, 0.6, 0.0, drawn_by_the_sampler(tiny))
    assert relative(tiny.sample(moving(tiny, 2.0, 0.0, 0.6), sampler="euler_ancestral").double(), expected) < 1e-5
    assert relative(paper(tiny, 2.0, 0.0, 0.6), expected) > 0.02


@pytest.mark.parametrize("prediction", [ModelType.EPS, ModelType.V_PREDICTION])
def test_noise_in_the_last_steps_is_the_papers(prediction: ModelType) -> None:
    """The quality boost, in samplers that add none, which the host seeds by 0 here."""
    tiny = Tiny(model=tiny_model(prediction), batch=2)
    expected = paper(tiny, 2.0, 0.0, 0.4, 0.6, drawn_by_us(tiny))
    for sampler in ("euler", "ddim"):
        boosted = tiny.sample(moving(tiny, 2.0, 0.0, 0.4, 0.6), cfg=CFG, sampler=sampler)
        assert relative(boosted.double(), expected) < 1e-5
    assert relative(tiny.sample(moving(tiny, 2.0, 0.0, 0.4), cfg=CFG).double(), expected) > 0.002


def test_where_the_sampler_adds_as_much_noise_none_is_added(tiny: Tiny) -> None:
    for sampler in ("euler_ancestral", "ddpm", "lcm"):
        plain, boosted = (moving(tiny, 2.0, 0.0, 0.4, boost) for boost in (1.0, 0.4))
        sampled = tiny.sample(boosted, sampler=sampler)
        assert relative(sampled, tiny.sample(plain, sampler=sampler)) < 1e-6
        assert relative(sampled, tiny.sample(tiny.model, sampler=sampler)) > 0.01


def test_noise_is_the_seeds(tiny: Tiny) -> None:
    model = moving(tiny, 2.0, 0.0, 0.4, 0.6)
    assert torch.equal(tiny.sample(model, seed=3), tiny.sample(model, seed=3))
    assert relative(tiny.sample(model, seed=4), tiny.sample(model, seed=3)) > 0.002
    assert torch.isfinite(tiny.sample(model, seed=2**64 - 1)).all()


def test_noise_is_not_for_the_steps_that_edit(tiny: Tiny) -> None:
    with pytest.raises(ValueError, match="to add noise from 0.4 of the run on, but to edit until 0.6: raise boost"):
        moving(tiny, 1.0, 0.0, 0.6, 0.4)
    with pytest.raises(ValueError, match="to add noise from 0.6 of the run on, but to edit until 0.8: raise boost"):
        attach_moves(moving(tiny, 1.0, 0.0, 0.4, 0.6), Moves(direction(tiny), 1.0, 0.0, 0.8))


def test_an_edit_without_inversion_moves_on_top_of_its_own(tiny: Tiny) -> None:
    """FlowEdit by one noise: d' = kept d + taken (D(x + d; target) - D(x; source)) + (D~ - D)."""
    sigmas = schedule(tiny.model, "simple", tiny.steps, 0.6)
    model, trajectory = invert_virtually(tiny.model, tiny.source, tiny.image, sigmas, False)
    found = direction(tiny)._replace(sigmas=sigmas[:-1])
    moved = attach_moves(model, Moves(found, 2.0, 0.0, 0.6))
    guidance = Guidance(tiny.target, tiny.negative, CFG)
    edited = tiny.model.model.process_latent_in(resample(moved, trajectory, guidance))

    unet, predict = in_float64(tiny.model)
    image = trajectory.states[-1].double()
    noise = (trajectory.states[0].double() - image) / sigmas[0]
    moved_by = torch.zeros_like(image)
    for step, (sigma, below) in enumerate(zip(sigmas[:-1].double(), sigmas[1:].double(), strict=True)):

        def clean(prompt: list, x: Tensor, delta: Tensor | None = None, sigma: Tensor = sigma) -> Tensor:
            with added(unet, 0, delta):
                return x - sigma * predict(x, sigma, prompt, {})

        source = image + sigma * noise
        target, kept = source + moved_by, below / sigma
        negative, positive = (clean(prompt, target) for prompt in (tiny.negative, tiny.target))
        apart = negative + CFG * (positive - negative) - clean(tiny.source, source)
        moved_by = kept * moved_by + (1 - kept) * apart
        if step / tiny.steps < 0.6:
            moved_by = moved_by + CFG * (clean(tiny.target, target, 2.0 * found.deltas[step].double()) - positive)
    assert relative(edited.double(), image + moved_by) < 1e-4
    assert relative(tiny.model.model.process_latent_in(resample(model, trajectory, guidance)), edited) > 0.01

    boosted = attach_moves(model, Moves(found, 2.0, 0.0, 0.4, 0.6))
    with pytest.raises(ValueError, match="is to add noise by boost, which a MODEL of Flow Edit or Virtual Inversion"):
        resample(boosted, trajectory, guidance)


def test_at_scale_0_the_node_hands_on_its_model(tiny: Tiny) -> None:
    (same,) = execute(ApplyHSpaceDirection, model=tiny.model, h_direction=direction(tiny), scale=0.0)
    assert same is tiny.model
    # Outside of the window nothing is moved either.
    assert torch.equal(tiny.sample(moving(tiny, 2.0, 0.95, 1.0)), tiny.sample(tiny.model))


def test_what_a_step_costs(tiny: Tiny) -> None:
    """One row more where it is applied, at any guidance."""
    for cfg, plain in ((CFG, 2), (1.0, 1)):
        model, rows = rows_of(moving(tiny, 1.0, 0.2, 0.6))
        tiny.sample(model, cfg=cfg)
        assert rows == [plain, plain, 1, plain, 1, plain, plain]


def test_two_directions_add_up(tiny: Tiny) -> None:
    both = attach_moves(moving(tiny, 1.0, seed=5), Moves(direction(tiny, 6), 0.5, 0.0, 1.0))
    summed = direction(tiny)._replace(deltas=direction(tiny, 5).deltas + 0.5 * direction(tiny, 6).deltas)
    once = attach_moves(tiny.model, Moves(summed, 1.0, 0.0, 1.0))
    assert relative(tiny.sample(both), tiny.sample(once)) < 1e-5
    assert relative(tiny.sample(both), tiny.sample(moving(tiny))) > 0.01


def test_directions_before_two_blocks_move_both(tiny: Tiny) -> None:
    """As one call with both moved, not as two moves of the answer added up."""
    one, other = direction(tiny), direction(tiny, 6, block=2)
    model = attach_moves(tiny.model, Moves(one, 2.0, 0.0, 1.0))
    model = attach_moves(model, Moves(other, 0.5, 0.0, 1.0))
    expected = tiny.sample(tiny.model, sampler=Asymmetric({0: 2.0 * one.deltas, 2: 0.5 * other.deltas}))
    assert relative(tiny.sample(model), expected) < 1e-5
    assert relative(tiny.sample(moving(tiny, 2.0)), expected) > 0.01


def test_a_finer_run_moves_less_at_each_step(tiny: Tiny) -> None:
    found = direction(tiny)
    halves = torch.cat([tiny.sigmas[:-1], tiny.sigmas[1:]]).sort(descending=True).values
    finer = torch.cat([halves[:1], (halves[:-1] + halves[1:]) / 2, halves[-1:]]).unique().flip(0)
    for sigmas, share in ((tiny.sigmas, 1.0), (finer, tiny.steps / (len(finer) - 1)), (tiny.sigmas[2:], 1.0)):
        assert found.share(sigmas) == pytest.approx(share)
        moved = Moves(found, 3.0, 0.0, 1.0).along(sigmas)
        for sigma, delta in zip(sigmas[:-1], moved, strict=True):
            nearest = (found.sigmas.log() - sigma.log()).abs().argmin()
            torch.testing.assert_close(delta, 3.0 * share * found.deltas[nearest])


class Asymmetric(OwnSampler):
    """Asyrp over whatever the model carries: asked twice at every step, the second time with h moved in the row of the
    target, before each block that there are deltas for.
    """

    def __init__(self, deltas: dict[int, Tensor]) -> None:
        self.deltas = deltas

    def walk(self, run: Run) -> Tensor:
        x = run.latent.clone()
        for step, sigma, sigma_next in run.steps():

            def move(delta: Tensor, h: Tensor, options: dict) -> Tensor:
                chunks, h = options.get(CHUNKS, options["cond_or_uncond"]), h.clone()
                h[slice_of(h, chunks, chunks.index(0))] += delta
                return h

            denoised = run.denoise(x, sigma)
            options = run.model_options["transformer_options"]
            for block, deltas in self.deltas.items():
                options = with_decoded(options, block, partial(move, deltas[step]))
            moved = run.denoise(x, sigma, model_options={**run.model_options, "transformer_options": options})
            x = moved + sigma_next / sigma * (x - denoised)
        return x


@pytest.mark.parametrize("kind", ["swap", "pnp", "masactrl", "blend"])
def test_edits_stand_beside_it(tiny: Tiny, kind: str) -> None:
    """The moved prediction reads from the source, and starts from the blended latent, as the other does."""
    moves = Moves(direction(tiny), 2.0, 0.0, 1.0)

    def edited(model: ModelPatcher) -> ModelPatcher:
        if kind == "blend":
            return attach_blend(model, tiny.trajectory, blend(4))
        return attach(model, tiny.trajectory, edit(kind))

    expected = tiny.sample(edited(tiny.model), cfg=CFG, sampler=Asymmetric({0: moves.scale * moves.direction.deltas}))
    for model in (attach_moves(edited(tiny.model), moves), edited(attach_moves(tiny.model, moves))):
        assert relative(tiny.sample(model, cfg=CFG), expected) < 1e-5
    for model in (edited(tiny.model), attach_moves(tiny.model, moves)):
        assert relative(tiny.sample(model, cfg=CFG), expected) > 0.005


# --- refusals --------------------------------------------------------------------------------------------------------


def test_samplers_with_other_steps_are_refused(tiny: Tiny) -> None:
    for name in ("dpmpp_2m", "heun"):
        with pytest.raises(ValueError, match=f"The sampler '{name}' mixes more into a step .* Apply H Space Direction"):
            tiny.sample(moving(tiny), sampler=name)


def test_caches_are_refused(tiny: Tiny) -> None:
    model = EasyCacheNode.execute(moving(tiny), 0.2, 0.15, 0.95, False).result[0]
    with pytest.raises(ValueError, match="Apply H Space Direction needs every answer of the model, but EasyCache"):
        tiny.sample(model)


def test_other_models_and_sizes_are_refused(tiny: Tiny) -> None:
    other = direction(tiny)._replace(model=identity(tiny_model(seed=1)))
    with pytest.raises(ValueError, match=r"made with another model \(BaseModel, .*: make it with this checkpoint"):
        attach_moves(tiny.model, Moves(other, 1.0, 0.0, 1.0))
    wide = attach_moves(tiny.model, Moves(direction(tiny, size=(64, 4, 8)), 1.0, 0.0, 1.0))
    with pytest.raises(ValueError, match="of features of 4 x 8, but here they are 4 x 4"):
        tiny.sample(wide)
    flow = FLOWS["Flux"].make()
    with pytest.raises(ValueError, match=r"This MODEL \(Flux\) is no UNet, whose output blocks Apply H Space"):
        attach_moves(flow, Moves(direction(tiny), 1.0, 0.0, 1.0))
    with pytest.raises(ValueError, match="was given block 4, but the output blocks of this MODEL are 0 to 3: lower"):
        direction_of_trajectories(tiny.model, tiny.trajectory, tiny.trajectory, 4)
    with pytest.raises(ValueError, match="is to end at 0.2 but starts at 0.5"):
        execute(ApplyHSpaceDirection, model=tiny.model, h_direction=direction(tiny), start=0.5, end=0.2)


def test_a_moved_model_is_not_inverted(tiny: Tiny) -> None:
    with pytest.raises(ValueError, match=r"another node's guidance \(Apply H Space Direction\)"):
        invert(moving(tiny), Guidance(tiny.source), tiny.image, tiny.sigmas)


# --- directions ------------------------------------------------------------------------------------------------------


def features(tiny: Tiny, states: Tensor, prompt: list, block: int = 0) -> Tensor:
    """[n, c, h, w] in float64: the mean output of the middle block, or of the output block before `block`, at each of
    tiny's sigmas.
    """
    unet, predict = in_float64(tiny.model)
    seen: list[Tensor] = []
    layer = unet.output_blocks[block - 1][-1] if block else unet.middle_block[-1]
    layer.register_forward_hook(lambda module, inputs, h: seen.append(h.mean(0)))
    for state, sigma in zip(states, tiny.sigmas[:-1].double(), strict=False):
        predict(state.double(), sigma, each(prompt, state), {})
    return torch.stack(seen)


@pytest.mark.parametrize("block", [0, 2])
def test_trajectories_give_the_difference_of_mean_features(block: int) -> None:
    tiny = Tiny(batch=3)
    other = invert(tiny.model, Guidance(tiny.target), tiny.image.flip(2)[:2] + 1, tiny.sigmas)
    inputs = {"model": tiny.model, "source": tiny.trajectory, "target": other, "block": block}
    (found,) = execute(HSpaceDirectionFromTrajectories, **inputs)
    sides = (other.states, tiny.target), (tiny.trajectory.states, tiny.source)
    target, source = (features(tiny, *side, block) for side in sides)
    expected = target - source
    assert found.deltas.shape == (tiny.steps, *SIZES[block])
    assert relative(found.deltas.double(), expected) < 1e-4
    assert torch.equal(found.sigmas, tiny.sigmas[:-1])
    back = direction_of_trajectories(tiny.model, other, tiny.trajectory, block)
    assert torch.equal(back.deltas, -found.deltas)


def test_trajectories_of_one_image_give_nothing(tiny: Tiny) -> None:
    found = direction_of_trajectories(tiny.model, tiny.trajectory, tiny.trajectory, 0)
    assert not found.deltas.any()


def test_trajectories_that_do_not_fit_are_refused(tiny: Tiny) -> None:
    shorter = Tiny(steps=4).trajectory
    with pytest.raises(ValueError, match="trajectories of 5 and 4 steps from sigma .*: make both along one schedule"):
        direction_of_trajectories(tiny.model, tiny.trajectory, shorter, 0)
    wide = tiny.trajectory._replace(states=torch.cat([tiny.trajectory.states] * 2, -1))
    with pytest.raises(ValueError, match="latents of 8 x 8 and 16 x 8: scale the images to one size"):
        direction_of_trajectories(tiny.model, tiny.trajectory, wide, 0)
    with pytest.raises(ValueError, match="already edited"):
        direction_of_trajectories(attach(tiny.model, tiny.trajectory, swap()), tiny.trajectory, tiny.trajectory, 0)


class Clip:
    """Conditionings by word, of different lengths, and what was asked for."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def tokenize(self, text: str) -> str:
        return text

    def encode_from_tokens_scheduled(self, text: str) -> list:
        self.asked.append(text)
        return conditioning(len(text), 154 if "long" in text else 77)


def test_prompts_give_the_difference_of_their_own_runs(tiny: Tiny) -> None:
    """Images of both kinds start from the same noise, the sentences are spread over them."""
    clip = Clip()
    inputs = {"source": "a\n\n bb ", "target": "long", "images": 3, "steps": tiny.steps, "cfg": CFG}
    latent = {"samples": torch.zeros(1, 4, 8, 8)}
    (found,) = execute(HSpaceDirectionFromPrompts, model=tiny.model, clip=clip, latent_image=latent, **inputs)
    assert clip.asked == ["a", "a", "bb", "long", "long", "long", ""]
    noise = torch.randn(3, 4, 8, 8, generator=torch.manual_seed(0))

    def mean(prompts: list[str]) -> Tensor:
        sums = []
        for text, start in zip(prompts, noise.split(1), strict=True):
            prompt, states = clip.encode_from_tokens_scheduled(text), []
            tiny.negative = clip.encode_from_tokens_scheduled("")
            model = tiny.model.clone()

            def keep(executor, x: Tensor, *args, states: list = states) -> Tensor:
                states.append(x.clone())
                return executor(x, *args)

            model.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, "test.states", keep)
            latent = tiny.model.model.process_latent_out(start * tiny.sigmas[0])
            tiny.sample(model, positive=prompt, cfg=CFG, noise=latent)
            sums.append(features(tiny, torch.stack(states), prompt))
        return torch.stack(sums).mean(0)

    expected = mean(["long"] * 3) - mean(["a", "a", "bb"])
    assert relative(found.deltas.double(), expected) < 1e-4


def test_an_empty_list_is_refused(tiny: Tiny) -> None:
    latent = {"samples": torch.zeros(1, 4, 8, 8)}
    with pytest.raises(ValueError, match="The target list of H Space Direction from Prompts is empty"):
        execute(HSpaceDirectionFromPrompts, model=tiny.model, clip=Clip(), latent_image=latent, target=" \n")


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("input", "output"):
        (tmp_path / name).mkdir()
        monkeypatch.setattr(folder_paths, f"{name}_directory", str(tmp_path / name))
    return tmp_path / "output"


def test_files_give_back_what_they_were_given(tiny: Tiny, folders: Path) -> None:
    found = direction(tiny, block=2)
    execute(SaveHSpaceDirection, h_direction=found, filename_prefix="cats")
    (loaded,) = LoadHSpaceDirection.execute("cats_00001_.safetensors [output]").result
    assert torch.equal(loaded.deltas, found.deltas)
    assert torch.equal(loaded.sigmas, found.sigmas)
    assert loaded.model.matches(found.model)
    moved = tiny.sample(attach_moves(tiny.model, Moves(loaded, 1.0, 0.0, 1.0)))
    assert torch.equal(moved, tiny.sample(moving(tiny, block=2)))


def test_damaged_files_are_refused(tiny: Tiny, folders: Path) -> None:
    found, path = direction(tiny), folders / "a.safetensors"
    for damaged, sentence in (
        (found._replace(deltas=found.deltas[1:]), "its differences do not fit its sigmas"),
        (found._replace(sigmas=found.sigmas.flip(0)), "its sigmas do not fall"),
        (found._replace(deltas=found.deltas / 0), "NaN or infinite"),
    ):
        damaged.save(path)
        with pytest.raises(ValueError, match=f"is a damaged h-space direction: .*{sentence}"):
            HDirection.load(path)
    found.save(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    save_file({name: t for name, t in load_file(path).items() if name != "sigmas"}, path, metadata)
    with pytest.raises(ValueError, match="is a damaged h-space direction: 'sigmas' is missing or wrong"):
        HDirection.load(path)


def test_a_direction_can_be_interrupted(tiny: Tiny) -> None:
    comfy.model_management.interrupt_current_processing()
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        direction_of_trajectories(tiny.model, tiny.trajectory, tiny.trajectory, 0)
