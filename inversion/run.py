"""Image to trajectory on the host: DDIM inversion and that of second order, recording a sampling run; an edit's run."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import comfy.model_management
import comfy.utils
import latent_preview
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from comfy.sample import prepare_noise
from comfy.samplers import CFGGuider, Sampler, calculate_sigmas, sampler_object
from torch import Tensor

from ..host.branch.source import KEY, STATE, check_same_states
from ..host.branch.virtual import virtual_of
from ..host.files.conditioning import SEED, copied
from ..host.files.trajectory import DPMPP_2M, EULER, Trajectory, sigma_index
from ..host.run.alone import Conds, mixes_prompts
from ..host.run.model import (
    add_outermost,
    check_noise_predicted,
    fitting,
    identity,
    is_flow,
    start_of,
)
from ..host.run.refusals import (
    check_deterministic,
    check_every_call,
    check_inverted,
    check_latent,
    check_noised,
    check_same_answer,
    check_same_model,
    check_unguided,
    check_unmixed,
    check_width,
)
from ..host.run.sampler import OwnSampler, Run
from .ddim import first_noise, leading_sigmas, step_up
from .dpm_solver import Evaluation, multistep
from .fixed_point import fixed_point_step
from .regularise import regularised
from .uni_inv import uni_inv_step


class Guidance(NamedTuple):
    """The conditionings of a run and its guidance scale; without `negative` only cfg 1 has a meaning."""

    positive: list
    negative: list | None = None
    cfg: float = 1.0

    def guider(self, model: ModelPatcher) -> CFGGuider:
        guider = CFGGuider(model)
        conds = {"positive": self.positive, "negative": self.negative}
        guider.inner_set_conds({name: cond for name, cond in conds.items() if cond is not None})
        guider.set_cfg(self.cfg)
        return guider


class Refinement(NamedTuple):
    """What DDIM inversion does beyond its plain step: fixed-point iterations, and regularisation of its noise.

    average: how many of the last predictions of a step are averaged. The weights are those of the losses, 0 for none.
    """

    iterations: int = 0
    average: int = 1
    autocorrelation: float = 0.0
    kl: float = 0.0


PLAIN = Refinement()
UNI_INV = "uni-inv"
DIVERGED = 10  # times as large as predicted noise, which is about 1


class InversionSampler(OwnSampler):
    """Walks up the sigmas it is given, from the image to the noise, and keeps every state. Made anew for each run."""

    def __init__(self, refinement: Refinement) -> None:
        self.refinement = refinement
        self.states: list[Tensor] = []

    def walk(self, run: Run) -> Tensor:
        iterations, average, *weights = self.refinement
        generator = torch.Generator().manual_seed(0)  # the same shifts whenever the node runs again

        def regularise(eps: Tensor) -> Tensor:
            result = regularised(eps, *weights, generator)
            if not result.abs().max() < DIVERGED * (1 + eps.abs().max()) and torch.isfinite(eps).all():
                raise ValueError(
                    f"DDIM Inversion's regularisation diverges on this image with autocorrelation {weights[0]:g} and "
                    f"kl {weights[1]:g}: lower autocorrelation, then kl; the paper has 20 for both."
                )
            return result

        x = run.latent
        self.states.append(x.to("cpu", torch.float32))
        for i, sigma, sigma_next in run.steps():
            x, denoised = fixed_point_step(x, sigma, sigma_next, run.denoise, iterations, average, regularise)
            self.states.append(x.to("cpu", torch.float32))
            run.report(i, denoised, x)
        return x


class MultistepInversionSampler(OwnSampler):
    """As InversionSampler, by the steps of `dpmpp_2m`. Made anew for each run.

    From sigma 0, which has no logarithm, the step is DDIM inversion's, and the next is of first order.
    """

    def __init__(self) -> None:
        self.states: list[Tensor] = []

    def walk(self, run: Run) -> Tensor:
        x, before = run.latent, None
        self.states.append(x.to("cpu", torch.float32))
        for i, sigma, sigma_next in run.steps():
            if sigma == 0:
                eps = first_noise(x, sigma, sigma_next, run.denoise)
                x, denoised = step_up(x, sigma, sigma_next, eps)
            else:
                denoised = run.denoise(x, sigma)
                now = Evaluation(sigma, denoised)
                x, before = multistep(x, now, sigma_next, before), now
            self.states.append(x.to("cpu", torch.float32))
            run.report(i, denoised, x)
        return x


class UniInversionSampler(OwnSampler):
    """As InversionSampler, by Uni-Inv (uni_inv.py). Made anew for each run."""

    def __init__(self, iterations: int) -> None:
        self.iterations = iterations
        self.states: list[Tensor] = []

    def walk(self, run: Run) -> Tensor:
        x, before = run.latent, None
        self.states.append(x.to("cpu", torch.float32))
        for i, sigma, sigma_next in run.steps():
            x, denoised, before = uni_inv_step(x, sigma, sigma_next, run.denoise, before, self.iterations)
            self.states.append(x.to("cpu", torch.float32))
            run.report(i, denoised, x)
        return x


def invert(
    model: ModelPatcher,
    guidance: Guidance,
    samples: Tensor,
    sigmas: Tensor,
    refinement: Refinement = PLAIN,
    solver: str = EULER,
) -> Trajectory:
    """Inversion of image latents [b, c, (t,) h, w] along falling `sigmas`, for the host's sampler `solver`.

    That is DDIM inversion for "euler", and a second-order kin for "dpmpp_2m" (dpm_solver.py). "uni-inv" is for euler
    too (uni_inv.py), and the only one for models that predict a flow. Raises ValueError for models, latents and
    settings that cannot be inverted.
    """
    samples = fitting(model, samples)
    check_inversion("DDIM Inversion", model, guidance, samples, flows=True)
    if is_flow(model) and solver == EULER:
        solver = UNI_INV
    if solver == UNI_INV:
        _check_settings(refinement, ("iterations",), UNI_INV)
        sampler = UniInversionSampler(refinement.iterations)
    elif solver == DPMPP_2M:
        if is_flow(model):
            raise ValueError(
                f"DDIM Inversion's solver {DPMPP_2M} is for models that predict noise or v, but this MODEL "
                f"({type(model.model).__name__}) predicts a flow: set solver to {UNI_INV}."
            )
        _check_settings(refinement, (), DPMPP_2M)
        sampler = MultistepInversionSampler()
    else:
        sampler = InversionSampler(refinement)
    sample(model, guidance, sampler, sigmas.flip(0), torch.zeros_like(samples), samples, seed=0)
    fit = DPMPP_2M if solver == DPMPP_2M else EULER
    return as_trajectory(model, guidance, sampler.states[::-1], sigmas)._replace(sampler=fit)


def _check_settings(refinement: Refinement, known: tuple[str, ...], solver: str) -> None:
    """Raises ValueError for refinements of DDIM inversion's steps that those of another solver do not have."""
    for name, value in refinement._asdict().items():
        if name not in known and value != (plain := getattr(PLAIN, name)):
            raise ValueError(
                f"DDIM Inversion's {name} {value:g} refines the steps of ddim, but its solver is {solver}: set {name} "
                f"to {plain:g}, or solver to ddim (euler) where the MODEL predicts noise or v."
            )


def check_inversion(node: str, model: ModelPatcher, guidance: Guidance, samples: Tensor, flows: bool = False) -> None:
    """Raises ValueError for models, latents and settings that `node` cannot invert, before anything is run.

    flows: whether it inverts models that predict a flow.
    """
    check_unedited(model, node)
    if not flows:
        check_noise_predicted(model, node)
    check_every_call(model, node)
    check_unguided(model)
    check_latent(model, samples)
    check_width(model, guidance.positive, f"The source prompt of {node}")
    if guidance.negative is not None:
        check_width(model, guidance.negative, f"The negative prompt of {node}")
    if guidance.cfg != 1 and guidance.negative is None:
        raise ValueError(f"{node} at cfg {guidance.cfg:g} needs the negative input: connect it, or set cfg to 1.")


def check_unedited(model: ModelPatcher, node: str) -> None:
    """Raises ValueError for models that an edit node patched."""
    if KEY in model.model_options["transformer_options"]:
        raise ValueError(
            f"{node} was given a MODEL that is already edited: connect the MODEL from before the edit nodes."
        )


def record(
    model: ModelPatcher, guidance: Guidance, sampler: Sampler, sigmas: Tensor, noise: Tensor, samples: Tensor, seed: int
) -> tuple[Trajectory, Tensor]:
    """Sample as the host does and keep the state at every sigma: the trajectory and the sampled latent.

    An edited model may be recorded too: its trajectory is the edited image's, for its maps or a further edit.

    noise and samples: [b, c, h, w] as the host's samplers take them. Raises ValueError for samplers that add noise.
    """
    if len(sigmas) < 2:
        raise ValueError("Record Trajectory was given no sigmas: set denoise to 1 in the scheduler node.")
    check_latent(model, samples)
    check_deterministic(sampler, sigmas)
    check_noised(model, noise, sigmas)
    check_every_call(model, "Record Trajectory")
    schedule = sigmas.cpu()
    states: dict[int, Tensor] = {}

    def keep(executor, x: Tensor, timestep: Tensor, model_options: dict, *args):
        if STATE in model_options["transformer_options"]:
            raise ValueError(
                "Record Trajectory keeps one state a step, but the sampler of EDICT Inversion and the MODEL of Virtual "
                "Inversion have two: choose euler, ddim or dpmpp_2m, and another MODEL."
            )
        index = sigma_index(schedule, float(timestep[0]))
        if index is not None:
            # The last call at a sigma is the one that starts its step.
            states[index] = x.to("cpu", torch.float32, copy=True)
        return executor(x, timestep, model_options, *args)

    model = model.clone()
    model.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, KEY, keep)
    result = sample(model, guidance, sampler, sigmas, noise, samples, seed)
    states[len(sigmas) - 1] = model.model.process_latent_in(result).to("cpu", torch.float32)
    if len(states) < len(sigmas):
        raise ValueError("The sampler did not visit every sigma of its schedule: choose euler, ddim or dpmpp_2m.")
    return as_trajectory(model, guidance, [states[i] for i in range(len(sigmas))], sigmas, seed), result


def sample(
    model: ModelPatcher, guidance: Guidance, sampler: Sampler, sigmas: Tensor, noise: Tensor, samples: Tensor, seed: int
) -> Tensor:
    """A source's sampling by `host_sample`. Raises ValueError where another node mixes the prompts of a call."""
    return host_sample(_unmixed(model), guidance, sampler, sigmas, noise, samples, seed)


def ddim_sigmas(model: ModelPatcher, steps: int) -> Tensor:
    """The schedule of the papers and of diffusers: [steps + 1] falling sigmas of the model's own table.

    Models that predict a flow have the host's "simple" in its place, which ends at sigma 0.
    """
    model_sampling = model.get_model_object("model_sampling")
    if is_flow(model):
        return calculate_sigmas(model_sampling, "simple", steps).cpu()
    return leading_sigmas(model_sampling.sigmas.cpu(), steps)


def karras_sigmas(model: ModelPatcher, steps: int) -> Tensor:
    """[steps + 1] falling sigmas whose steps grow evenly, from the model's largest to its smallest, which is not 0."""
    model_sampling = model.get_model_object("model_sampling")
    return calculate_sigmas(model_sampling, "karras", steps + 1)[:-1].cpu()


def resample(model: ModelPatcher, trajectory: Trajectory, guidance: Guidance, sampler: Sampler | None = None) -> Tensor:
    """What a run along the trajectory's sigmas makes of its noise: the latent [b, c, h, w] of SamplerCustom.

    sampler: where none is given, the one that the trajectory was inverted for. Several targets of one image start from
    its noise each. Raises ValueError for models and samplers that cannot follow the trajectory.

    The MODEL of Virtual Inversion starts from the image, with the same noise on it.
    """
    sampler = sampler or sampler_object(trajectory.sampler)
    check_same_model(model, trajectory)
    virtual, mask, seed = virtual_of(model), None, 0
    if virtual is None:
        check_inverted(trajectory)
        check_deterministic(sampler, trajectory.sigmas)
        noise, samples = start_of(model, trajectory)
    else:
        check_same_states(model, trajectory)
        samples, mask, seed = virtual.samples, virtual.mask, trajectory.conditioning[0][1][SEED]
        noise = prepare_noise(samples, seed)
    if len(samples) == 1:
        targets = max(len(embedding) for embedding, _ in guidance.positive)
        samples, noise = (t.repeat(targets, *[1] * (t.ndim - 1)) for t in (samples, noise))
    return host_sample(model, guidance, sampler, trajectory.sigmas, noise, samples, seed, mask)


def host_sample(
    model: ModelPatcher,
    guidance: Guidance,
    sampler: Sampler,
    sigmas: Tensor,
    noise: Tensor,
    samples: Tensor,
    seed: int,
    mask: Tensor | None = None,
) -> Tensor:
    """The host's sampling with progress and preview. Raises ValueError where it ends in NaN or infinite values."""
    callback = latent_preview.prepare_callback(model, len(sigmas) - 1)
    guider = guidance.guider(model)
    quiet = not comfy.utils.PROGRESS_BAR_ENABLED
    result = guider.sample(noise, samples, sampler, sigmas.clone(), mask, callback, quiet, seed)  # some write to them
    if not torch.isfinite(result).all():
        raise ValueError(
            "Sampling ended in NaN or infinite values: load the MODEL in fp32 or bf16 (weight_dtype)"
            + (", or lower cfg." if guidance.cfg > 1 else ".")
        )
    return result.to(comfy.model_management.intermediate_device())


def _unmixed(model: ModelPatcher) -> ModelPatcher:
    """A clone for one run. Its first call of several prompts raises ValueError where another node mixes them.

    An edit runs the source's prompt beside the target's negative, not beside that of the trajectory.
    """
    asked = False

    def calc_cond_batch(executor, base, conds: list, x: Tensor, timestep: Tensor, model_options: dict):
        nonlocal asked

        def ask(conds: Conds) -> list[Tensor]:
            return executor(base, conds, x, timestep, model_options)

        results = ask(conds)
        if not asked and sum(cond is not None for cond in conds) > 1:
            asked = True
            mixed = mixes_prompts(ask, conds, 0, x, results[0])
            check_unmixed(mixed, "an edit runs the source's alone: invert or record with the MODEL from before it")
        return results

    model = model.clone()
    add_outermost(model, WrappersMP.CALC_COND_BATCH, f"{KEY}.unmixed", calc_cond_batch)
    return model


def asked_twice(denoise: Callable[..., Tensor], node: str) -> Callable[..., Tensor]:
    """`denoise` for one run of `node`, at whose first call it raises ValueError where the model does not repeat itself.

    The price is one more evaluation of the model a run.
    """
    asked = False

    def denoise_alike(x: Tensor, *args, **kwargs) -> Tensor:
        nonlocal asked
        before = None if asked else denoise(x.clone(), *args, **kwargs)  # x itself may be moved by a guidance
        result = denoise(x, *args, **kwargs)
        if not asked:
            check_same_answer(node, x, before, result)
            asked = True
        return result

    return denoise_alike


def as_trajectory(
    model: ModelPatcher, guidance: Guidance, states: list[Tensor], sigmas: Tensor, seed: int = 0
) -> Trajectory:
    """The trajectory of a run's states [b, c, h, w] at each of `sigmas`.

    Its conditioning keeps the run's seed, by which the host draws the noise on unCLIP's images.
    """
    conditioning = [[embedding, options | {SEED: seed}] for embedding, options in copied(guidance.positive)]
    return Trajectory(torch.stack(states), sigmas.to("cpu", torch.float32, copy=True), conditioning, identity(model))
