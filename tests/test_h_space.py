"""H-space: directions of features, their files, and Asyrp's asymmetric step against the paper's formula in float64."""

from __future__ import annotations

from pathlib import Path

import comfy.k_diffusion.sampling
import comfy.model_management
import comfy.samplers
import folder_paths
import pytest
import torch
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
from palimpsest.host.branch.asymmetric import KEY, attach_moves
from palimpsest.host.branch.call import CHUNKS, slice_of
from palimpsest.host.branch.source import attach, attach_blend
from palimpsest.host.run.model import identity
from palimpsest.host.run.sampler import OwnSampler, Run
from palimpsest.host.unet.patches import with_middle
from palimpsest.inversion.run import Guidance, invert
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
MIDDLE = (64, 4, 4)  # of the tiny UNet


def direction(tiny: Tiny, seed: int = 5, size: tuple[int, int, int] = MIDDLE) -> HDirection:
    deltas = torch.randn(tiny.steps, *size, generator=torch.Generator().manual_seed(seed))
    return HDirection(deltas, tiny.sigmas[:-1].clone(), identity(tiny.model))


def moving(tiny: Tiny, scale: float = 1.0, start: float = 0.0, end: float = 1.0, seed: int = 5) -> ModelPatcher:
    return attach_moves(tiny.model, Moves(direction(tiny, seed), scale, start, end))


def each(prompt: list, images: Tensor) -> list:
    """The prompt once for every one of the images."""
    return [[prompt[0][0].expand(len(images), -1, -1), {}]]


def paper(tiny: Tiny, scale: float, start: float, end: float, cfg: float = CFG, eta: float = 0.0) -> Tensor:
    """Asyrp in float64, as its authors write it: z' = sqrt(a') P(e~) + sqrt(1 - a' - v) e + sqrt(v) n, P the predicted
    image; v is 0, or for DDPM's noise eta^2 (1 - a') / (1 - a) (1 - a / a').
    """
    _, predict = in_float64(tiny.model)
    draw = comfy.k_diffusion.sampling.default_noise_sampler(tiny.noise, seed=0)
    sigmas, deltas = tiny.sigmas.double(), direction(tiny).deltas.double()
    x = tiny.trajectory.states[0].double()
    for step, (sigma, below) in enumerate(zip(sigmas[:-1], sigmas[1:], strict=True)):

        def noise(prompt: list, delta: Tensor | None = None, x: Tensor = x, sigma: Tensor = sigma) -> Tensor:
            options = {} if delta is None else with_middle({}, lambda h, options: h + delta)
            return predict(x, sigma, each(prompt, x), options)

        negative = noise(tiny.negative)
        e = moved = negative + cfg * (noise(tiny.target) - negative)
        if start <= step / tiny.steps < end:
            moved = negative + cfg * (noise(tiny.target, scale * deltas[step]) - negative)
        a, a_next = 1 / (1 + sigma**2), 1 / (1 + below**2)
        z = a.sqrt() * x
        v = eta**2 * (1 - a_next) / (1 - a) * (1 - a / a_next)
        z = a_next.sqrt() * (z - (1 - a).sqrt() * moved) / a.sqrt() + (1 - a_next - v).sqrt() * e
        if eta:
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


def test_the_step_with_noise_is_the_papers(tiny: Tiny) -> None:
    """The paper adds noise in the last steps; `euler_ancestral` does in all."""
    expected = paper(tiny, 2.0, 0.0, 0.6, eta=1.0)
    assert relative(tiny.sample(moving(tiny, 2.0, 0.0, 0.6), sampler="euler_ancestral").double(), expected) < 1e-5
    assert relative(paper(tiny, 2.0, 0.0, 0.6), expected) > 0.02


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
    target.
    """

    def __init__(self, deltas: Tensor) -> None:
        self.deltas = deltas

    def walk(self, run: Run) -> Tensor:
        x = run.latent.clone()
        for step, sigma, sigma_next in run.steps():

            def move(h: Tensor, options: dict, step: int = step) -> Tensor:
                chunks, h = options.get(CHUNKS, options["cond_or_uncond"]), h.clone()
                h[slice_of(h, chunks, chunks.index(0))] += self.deltas[step]
                return h

            denoised = run.denoise(x, sigma)
            options = with_middle(run.model_options["transformer_options"], move)
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

    expected = tiny.sample(edited(tiny.model), cfg=CFG, sampler=Asymmetric(moves.scale * moves.direction.deltas))
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
    with pytest.raises(ValueError, match="whose middle block is 4 x 8, but here it is 4 x 4"):
        tiny.sample(wide)
    flow = FLOWS["Flux"].make()
    with pytest.raises(ValueError, match=r"This MODEL \(Flux\) has no middle block of a UNet, which Apply H Space"):
        attach_moves(flow, Moves(direction(tiny), 1.0, 0.0, 1.0))
    with pytest.raises(ValueError, match="is to end at 0.2 but starts at 0.5"):
        execute(ApplyHSpaceDirection, model=tiny.model, h_direction=direction(tiny), start=0.5, end=0.2)


def test_a_moved_model_is_not_inverted(tiny: Tiny) -> None:
    with pytest.raises(ValueError, match=f"another node's guidance \\({KEY}\\)"):
        invert(moving(tiny), Guidance(tiny.source), tiny.image, tiny.sigmas)


# --- directions ------------------------------------------------------------------------------------------------------


def features(tiny: Tiny, states: Tensor, prompt: list) -> Tensor:
    """[n, c, h, w] in float64: the mean output of the middle block at each of tiny's sigmas."""
    unet, predict = in_float64(tiny.model)
    seen: list[Tensor] = []
    unet.middle_block[-1].register_forward_hook(lambda module, inputs, h: seen.append(h.mean(0)))
    for state, sigma in zip(states, tiny.sigmas[:-1].double(), strict=False):
        predict(state.double(), sigma, each(prompt, state), {})
    return torch.stack(seen)


def test_trajectories_give_the_difference_of_mean_features() -> None:
    tiny = Tiny(batch=3)
    other = invert(tiny.model, Guidance(tiny.target), tiny.image.flip(2)[:2] + 1, tiny.sigmas)
    inputs = {"model": tiny.model, "source": tiny.trajectory, "target": other}
    (found,) = execute(HSpaceDirectionFromTrajectories, **inputs)
    expected = features(tiny, other.states, tiny.target) - features(tiny, tiny.trajectory.states, tiny.source)
    assert found.deltas.shape == (tiny.steps, *MIDDLE)
    assert relative(found.deltas.double(), expected) < 1e-4
    assert torch.equal(found.sigmas, tiny.sigmas[:-1])
    back = direction_of_trajectories(tiny.model, other, tiny.trajectory)
    assert torch.equal(back.deltas, -found.deltas)


def test_trajectories_of_one_image_give_nothing(tiny: Tiny) -> None:
    found = direction_of_trajectories(tiny.model, tiny.trajectory, tiny.trajectory)
    assert not found.deltas.any()


def test_trajectories_that_do_not_fit_are_refused(tiny: Tiny) -> None:
    shorter = Tiny(steps=4).trajectory
    with pytest.raises(ValueError, match="trajectories of 5 and 4 steps from sigma .*: make both along one schedule"):
        direction_of_trajectories(tiny.model, tiny.trajectory, shorter)
    wide = tiny.trajectory._replace(states=torch.cat([tiny.trajectory.states] * 2, -1))
    with pytest.raises(ValueError, match="latents of 8 x 8 and 16 x 8: scale the images to one size"):
        direction_of_trajectories(tiny.model, tiny.trajectory, wide)
    with pytest.raises(ValueError, match="already edited"):
        direction_of_trajectories(attach(tiny.model, tiny.trajectory, swap()), tiny.trajectory, tiny.trajectory)


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
    found = direction(tiny)
    execute(SaveHSpaceDirection, h_direction=found, filename_prefix="cats")
    (loaded,) = LoadHSpaceDirection.execute("cats_00001_.safetensors [output]").result
    assert torch.equal(loaded.deltas, found.deltas)
    assert torch.equal(loaded.sigmas, found.sigmas)
    assert loaded.model.matches(found.model)
    assert torch.equal(tiny.sample(attach_moves(tiny.model, Moves(loaded, 1.0, 0.0, 1.0))), tiny.sample(moving(tiny)))


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
        direction_of_trajectories(tiny.model, tiny.trajectory, tiny.trajectory)
