"""The sentences that refuse what cannot be edited: each names the offending value and what to change."""

from __future__ import annotations

from collections.abc import Collection
from inspect import signature

import torch
from comfy.model_base import IP2P, BaseModel
from comfy.model_patcher import ModelPatcher
from comfy.model_sampling import ModelSamplingDiscrete
from comfy.patcher_extension import WrappersMP
from comfy.samplers import KSAMPLER, CFGGuider, Sampler
from torch import Tensor

from ..dit.architectures import ARCHITECTURES, architecture_of
from ..files.conditioning import SEED
from ..files.trajectory import ModelIdentity, Trajectory
from ..layer import Layer
from .alone import ALIKE, apart
from .model import identity, is_flow, is_unet, prompt_width
from .sampler import OwnSampler, Run, function_name, settings
from .shortcuts import cache_on

# These take a noise sampler but draw nothing from it at their defaults.
NOISELESS = {"sample_res_multistep", "sample_res_multistep_cfg_pp"}
OWN_LATENT = {"sample_unipc": "uni_pc", "sample_sa_solver": "sa_solver"}  # step from another than the model sees
# KSampler and KSampler Advanced take the last sigma but one out of any schedule for these.
SHORTENED = {"sample_unipc": "uni_pc", "sample_unipc_bh2": "uni_pc_bh2"}
SAME = 0.02  # relative distance of two latents that are one, as other hardware computes it
NOISE_OFF = (
    "in KSampler Advanced or SamplerCustom with add_noise off (KSampler always adds noise), or in "
    "SamplerCustomAdvanced with DisableNoise"
)
OTHER_START = (
    "The sampler does not start from the trajectory's own noise: use Edit Sampler, or connect the noise latent that "
    f"came with this trajectory to latent_image, {NOISE_OFF}."
)
UNION = "MasaCtrl's union adds keys to an attention that this MODEL masks: switch union off."
WORDS = (
    "This MODEL masks its attention, whose words the edit reads apart from its image: remove the node that masks it, "
    "such as Apply Style Model."
)
RANGES = ("start_percent", "end_percent")
OURS = "palimpsest."  # before the node's display name, the key of wrappers that guide
NEGATIVES = "palimpsest.negatives"  # key of Negative Prompt Guidance's wrappers
# Where nodes stand between a sampler and what the UNet predicts: functions among the model's options, and wrappers.
GUIDANCE = (
    "sampler_calc_cond_batch_function",
    "sampler_cfg_function",
    "sampler_pre_cfg_function",
    "sampler_post_cfg_function",
)
GUIDING = (WrappersMP.PREDICT_NOISE, WrappersMP.CALC_COND_BATCH)


def check_unet(model: ModelPatcher, node: str) -> None:
    """Raises ValueError where `node` reads layers that the model lacks."""
    if not is_unet(model):
        kind = type(model.model.diffusion_model).__name__
        raise ValueError(
            f"This MODEL ({kind}) is no UNet, but {node} reads layers that SD1.x, SD2.x and SDXL alone have: use Flow "
            "Edit, MasaCtrl or PnP Feature Injector."
        )


def check_foreground(model: ModelPatcher) -> None:
    """Raises ValueError where MasaCtrl cannot keep foreground and background of two images apart."""
    if not is_unet(model):
        kind = type(model.model.diffusion_model).__name__
        raise ValueError(
            f"This MODEL ({kind}) is no UNet, and MasaCtrl's source_mask and target_mask are for SD1.x, SD2.x and SDXL "
            "alone: connect the mask of where to edit to mask."
        )


def check_decoder(model: ModelPatcher, block: int, node: str) -> None:
    """Raises ValueError for models without the output block before which `node` reads or moves features."""
    network = model.model.diffusion_model
    if not is_unet(model):
        raise ValueError(
            f"This MODEL ({type(network).__name__}) is no UNet, whose output blocks {node} needs: load an SD1.x, SD2.x "
            "or SDXL checkpoint, or edit with Flow Edit."
        )
    last = len(network.output_blocks) - 1
    if block > last:
        raise ValueError(
            f"{node} was given block {block}, but the output blocks of this MODEL are 0 to {last}: lower block."
        )


def check_direction(model: ModelPatcher, known: ModelIdentity, node: str) -> None:
    """Raises ValueError where the features that `node` moves were read from another model than this one."""
    own = identity(model)
    if not own.matches(known):
        raise ValueError(
            f"The h-space direction was made with another model ({known.name}, {known.prediction}) than the MODEL of "
            f"{node} ({own.name}, {own.prediction}): make it with this checkpoint."
        )


def check_h_size(h: Tensor, delta: Tensor) -> None:
    """Raises ValueError where features [rows, c, h, w] are of another size than what is to be added."""
    if h.shape[1:] != delta.shape:
        (_, *here), (_, *there) = h.shape[1:], delta.shape
        raise ValueError(
            f"The h-space direction was made of features of {there[0]} x {there[1]}, but here they are {here[0]} x "
            f"{here[1]}: make the direction from images of this size, and remove areas and tiling."
        )


def check_boost(node: str, end: float, boost: float) -> None:
    """Raises ValueError where noise is to come in before the edit is over: a step has the one or the other."""
    if boost < end:
        raise ValueError(
            f"{node} is to add noise from {boost:g} of the run on, but to edit until {end:g}: raise boost, or lower "
            "end."
        )


def check_readable(model: ModelPatcher, node: str) -> None:
    """Raises ValueError for models whose attention layers the edits do not reach."""
    network = model.model.diffusion_model
    if not is_unet(model) and architecture_of(network) is None:
        raise ValueError(
            f"This MODEL ({type(network).__name__}) is no UNet, and none of the flow models whose attention {node} can "
            f"read ({', '.join(sorted(known.__name__ for known in ARCHITECTURES))}): use Flow Edit, which reads none."
        )


def check_worded(model: ModelPatcher, node: str) -> None:
    """Raises ValueError where `node` reads words that do not stand before the image in one attention."""
    check_readable(model, node)
    network = model.model.diffusion_model
    if not is_unet(model) and architecture_of(network).image_first:
        raise ValueError(
            f"{node} cannot tell words in the attention of this MODEL ({type(network).__name__}): use Flow Edit, "
            "MasaCtrl or PnP Feature Injector, and Local Blend with a mask alone."
        )


def check_layout(model: ModelPatcher) -> None:
    """Raises ValueError where self-attention has no layers of its own to carry Local Blend's word maps."""
    if not is_unet(model):
        kind = type(model.model.diffusion_model).__name__
        raise ValueError(
            f"This MODEL ({kind}) is no UNet, and mask_from 'words and layout' of Local Blend is for SD1.x, SD2.x and "
            "SDXL alone: set mask_from to words."
        )


def check_unmasked(masked: bool, refused: str) -> None:
    """Raises ValueError where an attention of other keys than the model's own meets a mask made for these.

    refused: `UNION` or `WORDS`, what would take such keys.
    """
    if masked:
        raise ValueError(refused)


def check_same_model(model: ModelPatcher, trajectory: Trajectory) -> None:
    """Raises ValueError where the trajectory is another model's, or was made by another sampling of this one."""
    own, known = identity(model), trajectory.model
    if own.matches(known):
        return
    if own._replace(prediction=known.prediction).matches(known):
        raise ValueError(
            f"This MODEL's sampling ({own.prediction}) is not that of the trajectory ({known.prediction}): remove the "
            "ModelSampling node between inversion and sampler, or give DDIM Inversion the MODEL from behind it."
        )
    raise ValueError(
        f"The trajectory was made with another model ({known.name}, {known.prediction}) than the MODEL to edit: "
        "connect the same checkpoint or merge to both, or invert the image again."
    )


def check_latent(model: ModelPatcher, samples: Tensor) -> None:
    """Raises ValueError where a latent cannot be this model's image latent."""
    latent_format = model.get_model_object("latent_format")
    channels = latent_format.latent_channels
    if samples.ndim != 2 + latent_format.latent_dimensions or samples.shape[1] != channels:
        raise ValueError(
            f"The latent has shape {list(samples.shape)} but the MODEL takes {channels} channels: "
            "encode the image with the VAE that belongs to the MODEL."
        )
    if not torch.isfinite(samples).all():
        raise ValueError("The latent holds NaN or infinite values: check the image and the VAE Encode node before it.")


def check_width(model: ModelPatcher, conditioning: list, name: str) -> None:
    """Raises ValueError where the embeddings of a conditioning called `name` are not as wide as the model's prompts."""
    width = prompt_width(model)
    wrong = {embedding.shape[-1] for embedding, _ in conditioning} - {width}
    if width is not None and wrong:
        raise ValueError(
            f"{name} has embeddings of {min(wrong)} channels but this MODEL ({type(model.model).__name__}) takes "
            f"{width}: connect the CLIP that belongs to the MODEL to Prompt Edit or CLIP Text Encode."
        )


def check_noised(model: ModelPatcher, noise: Tensor, sigmas: Tensor) -> None:
    """Raises ValueError for a run that would begin at 0 whatever its latent, as a flow's does at sigma 1."""
    if is_flow(model) and sigmas[0] >= 1 and not noise.any():
        raise ValueError(
            "At sigma 1 a model that predicts a flow sees nothing of latent_image, and without added noise there is "
            "nothing else: switch add_noise on in Record Trajectory, or sample an inversion with Edit Sampler."
        )


def check_deterministic(sampler: Sampler, sigmas: Tensor) -> None:
    """Raises ValueError for samplers that draw fresh noise (ancestral, SDE): no trajectory fits their path."""
    if isinstance(sampler, KSAMPLER) and _draws_noise(sampler, sigmas):
        name = function_name(sampler).removeprefix("sample_")
        raise ValueError(
            f"The sampler '{name}' adds fresh noise at every step and cannot follow a trajectory: "
            "choose a deterministic one, such as euler, ddim or dpmpp_2m, in the sampler node."
        )


def _draws_noise(sampler: KSAMPLER, sigmas: Tensor) -> bool:
    """Whether fresh noise has a share in its steps along `sigmas`, at its settings."""
    given = settings(sampler)
    if "noise_sampler" not in given or function_name(sampler) in NOISELESS:
        return given.get("s_churn", 0) > 0
    if "tau_func" in given:  # SA-Solver: that share at each sigma
        share = given["tau_func"]
        return share is None or any(share(sigma) > 0 for sigma in sigmas[1:].tolist())
    if "noise_scaler" in given:  # ER-SDE, an ODE where this is linear
        scaler = given["noise_scaler"]
        return scaler is None or scaler(2.0) != 2 * scaler(1.0)
    return given.get("eta", 1.0) != 0


def check_source(conditioning: list) -> None:
    """Raises ValueError where a trajectory's source conditioning is more than one plain prompt."""
    if len(conditioning) != 1:
        raise ValueError(
            f"The trajectory's source conditioning has {len(conditioning)} entries, but edits need exactly one: invert "
            "with a single prompt, not with combined conditionings."
        )
    options = conditioning[0][1]
    found = [name for name in ("hooks", "area", "mask", *RANGES) if options.get(name) is not None]
    if found:
        raise ValueError(
            f"The trajectory's source conditioning carries '{found[0]}', but edits need a plain prompt: invert with "
            "Prompt Edit's source output as it is, and put LoRAs on the MODEL."
        )


def check_without_values(trajectory: Trajectory, node: str) -> None:
    """Raises ValueError for trajectories whose source reads other values than its prompt, which `node` cannot run."""
    if trajectory.values is not None:
        raise ValueError(
            f"{node} runs the source by its prompt alone, but this trajectory has values of Value Inversion: connect "
            "the trajectory that Value Inversion was given."
        )


def is_mixed(model: ModelPatcher) -> bool:
    """Whether Negative Prompt Guidance is on this model."""
    return NEGATIVES in model.wrappers.get(WrappersMP.CALC_COND_BATCH, {})


def check_unguided(model: ModelPatcher) -> None:
    """Raises ValueError for models whose guidance another node changed: a trajectory is guided by its cfg alone."""
    found = [name for name in GUIDANCE if model.model_options.get(name)]
    if is_mixed(model):
        found.append("Negative Prompt Guidance")
    elsewhere = model.model_options["transformer_options"].get("wrappers", {})
    for kind in GUIDING:
        keys = (*model.wrappers.get(kind, {}), *elsewhere.get(kind, {}))
        found += [key.removeprefix(OURS) if key else f"a {kind} wrapper" for key in keys]
    if found:
        raise ValueError(
            f"The MODEL to invert or record carries another node's guidance ({found[0]}), which bends the path: "
            "connect the MODEL from before that node, and use the node on the MODEL that edits."
        )


def check_every_call(model: ModelPatcher, node: str) -> None:
    """Raises ValueError for models of which another node leaves out calls: `node` needs the answer to each."""
    if (cache := cache_on(model)) is not None:
        raise ValueError(
            f"{node} needs every answer of the model, but {cache} leaves some out: connect the MODEL from before it."
        )


def check_attention(model: ModelPatcher, node: str) -> None:
    """Raises ValueError for models whose attention another node replaced: gradients are those of the host's own."""
    if model.model_options["transformer_options"].get("optimized_attention_override") is not None:
        raise ValueError(
            f"This MODEL carries another node's attention override, but {node} takes gradients, which need the host's "
            "own attention: connect the MODEL from before that node."
        )


def check_timesteps(model: ModelPatcher, preset: str) -> None:
    """Raises ValueError for models whose noise levels are no table of timesteps, by which `preset` names them."""
    if not isinstance(model.get_model_object("model_sampling"), ModelSamplingDiscrete):
        raise ValueError(
            f"{preset} tells the model timesteps of its training, which the sampling of this MODEL has none of: remove "
            "ModelSamplingContinuousEDM or ModelSamplingContinuousV from it, or set preset to custom."
        )


def check_one_gpu(model: ModelPatcher) -> None:
    """Raises ValueError for models that the host spreads over several GPUs."""
    if model.get_additional_models_with_key("multigpu"):
        raise ValueError("Palimpsest's edits run on one GPU: remove the MultiGPU node from this MODEL.")


def check_plain(conditioning: list, name: str, like: Tensor) -> None:
    """Raises ValueError where a conditioning is not one plain prompt as wide as `like`, the embedding beside it."""
    if len(conditioning) != 1:
        raise ValueError(
            f"{name} has {len(conditioning)} entries: connect one plain prompt, not combined conditionings."
        )
    ((embedding, options),) = conditioning
    if found := [key for key in ("hooks", "area", "mask", *RANGES) if options.get(key) is not None]:
        raise ValueError(f"{name} carries '{found[0]}': connect a plain prompt, straight from CLIP Text Encode.")
    if embedding.shape[-1] != like.shape[-1]:
        raise ValueError(
            f"{name} has embeddings of {embedding.shape[-1]} channels but the prompt beside it has {like.shape[-1]}: "
            "encode both with the CLIP that belongs to the MODEL."
        )


def check_no_mask(latent: dict, node: str) -> None:
    """Raises ValueError where a LATENT carries a noise mask, for which `node` has no use."""
    if latent.get("noise_mask") is not None:
        raise ValueError(
            f"The latent carries a noise mask, which {node} does not know: remove Set Latent Noise Mask, or encode "
            "without VAE Encode (for Inpainting), and confine the edit with Local Blend."
        )


def check_run(
    trajectory: Trajectory,
    guider: CFGGuider,
    noise: Tensor,
    latent: Tensor,
    sampler: Sampler,
    sigmas: Tensor,
    denoise_mask: Tensor | None,
) -> None:
    """Raises ValueError for a sampling run that cannot follow `trajectory`."""
    check_inverted(trajectory)
    check_deterministic(sampler, sigmas)
    check_same_model(guider.model_patcher, trajectory)
    _check_conditionings(guider)
    check_one_gpu(guider.model_patcher)
    if denoise_mask is not None:
        raise ValueError(
            "The latent to edit carries a noise mask, outside which it would stay noise: remove Set Latent Noise Mask."
        )
    shape = trajectory.states.shape[1:]
    if noise.shape[1:] != shape[1:] or shape[0] not in (1, len(noise)):
        raise ValueError(
            f"The sampler's latent has shape {list(noise.shape)} but the trajectory's is {list(shape)}: "
            "connect the noise latent that came with this trajectory."
        )
    own = guider.model_patcher.model.process_latent_in(latent)
    if (
        noise.any()
        and not is_flow(guider.model_patcher)
        and not isinstance(sampler, OwnSampler)
        and _distance(own, trajectory.states[0]) < SAME
    ):
        raise ValueError(OTHER_START)
    name = function_name(sampler)
    if name == "sample_dpm_2":
        raise ValueError(
            "The sampler 'dpm_2' calls the model between the sigmas of its schedule, where a trajectory has no state: "
            "choose euler, ddim or dpmpp_2m."
        )
    strangers = [sigma for sigma in sigmas[:-1].tolist() if trajectory.index(sigma) is None]
    if strangers and min(strangers) > trajectory.sigmas[0] and len(sigmas) - 1 - len(strangers) == trajectory.steps:
        raise ValueError(
            f"The sampler runs {len(sigmas) - 1} steps, of which the trajectory holds the last {trajectory.steps}, as "
            "one of DDIM Inversion with a strength below 1 does: use Edit Sampler, or connect the trajectory's SIGMAS "
            f"to SamplerCustom, or set start_at_step of KSampler Advanced to {len(strangers)}."
        )
    if strangers:
        raise ValueError(
            f"The sampler's schedule has sigma {strangers[0]:.4g}, which the trajectory of {trajectory.steps} steps "
            f"lacks: {_fitting_schedule(name)}."
        )


def check_inverted(trajectory: Trajectory) -> None:
    """Raises ValueError for the trajectory of Virtual Inversion: at every sigma the same image with the same noise."""
    (first, second, *_), image, (sigma, below, *_) = trajectory.states, trajectory.states[-1], trajectory.sigmas
    expected = image + (first - image) * (below / sigma)
    if trajectory.steps > 1 and _distance(second, expected) < 1e-5:
        raise ValueError(
            "The trajectory of Virtual Inversion is the image with noise on it, along which only that node's MODEL can "
            "be sampled: connect the model output of Virtual Inversion, or invert the image with DDIM Inversion."
        )


def check_states_known(virtual: bool, part: str) -> None:
    """Raises ValueError where `part` would read states of the source that are made only while the edit is sampled."""
    if virtual:
        raise ValueError(
            f"{part} reads the source's states, which Virtual Inversion and Flow Edit make only while they sample: "
            "remove it from this MODEL, or invert the image with DDIM Inversion and edit it by other nodes."
        )


def check_follows(node: str, sampler: Sampler, follows: bool) -> None:
    """Raises ValueError for samplers that make no edit of what `node` answers."""
    if not follows:
        name = function_name(sampler).removeprefix("sample_") or type(sampler).__name__
        raise ValueError(
            f"The sampler '{name}' mixes more into a step than the model's last answer, which {node} cannot turn into "
            "an edit: choose euler, ddim, lcm or euler_ancestral."
        )


def check_followed(trajectory: Trajectory, sigmas: Tensor) -> None:
    """Raises ValueError for a schedule at whose levels Flow Edit has no state of the source that it follows."""
    strangers = [sigma for sigma in sigmas[:-1].tolist() if trajectory.index(sigma) is None]
    if strangers:
        raise ValueError(
            f"The sampler's schedule has sigma {strangers[0]:.4g}, which the trajectory that Flow Edit follows lacks: "
            "connect the sigmas that came with it to SamplerCustom, or set the steps and scheduler of its inversion."
        )


def check_image_run(
    node: str,
    guider: CFGGuider,
    image: Tensor,
    noise: Tensor,
    latent: Tensor,
    sigmas: Tensor,
    denoise_mask: Tensor | None,
    needs_noise: bool,
) -> None:
    """Raises ValueError for a sampling run in which `node` cannot make an edit of `image` [1 or b, c, (t,) h, w]."""
    check_every_call(guider.model_patcher, node)
    _check_conditionings(guider)
    check_one_gpu(guider.model_patcher)
    model = guider.model_patcher.model
    if denoise_mask is not None and "denoise_mask" in signature(model.process_timestep).parameters:
        raise ValueError(
            f"Under a noise mask this MODEL ({type(model).__name__}) takes what is outside for free of noise, where "
            f"{node} has noise everywhere: remove Set Latent Noise Mask, and keep the rest by confine of Flow Edit."
        )
    own = guider.model_patcher.model.process_latent_in(latent)
    sampling = guider.model_patcher.get_model_object("model_sampling")
    if own.shape[1:] != image.shape[1:] or len(image) not in (1, len(own)) or _distance(own, image) > SAME:
        raise ValueError(f"The sampler's latent_image is not the image of {node}: connect that node's latent output.")
    if needs_noise and not noise.any():
        raise ValueError(
            f"The sampler adds no noise to the image, without which {node} changes nothing: switch add_noise on, or "
            "use KSampler."
        )
    first, last, top = float(sigmas[0]), float(sigmas[-1]), float(sampling.sigma_max)
    if first > 1.01 * top:
        raise ValueError(
            f"The sampler's schedule begins at sigma {first:.4g}, but this MODEL knows noise up to {top:.4g} alone: "
            f"connect the sigmas of {node}, or lower the scheduler's sigma_max."
        )
    if last > 1.01 * float(sampling.sigma_min):
        raise ValueError(
            f"The sampler stops at sigma {last:.4g}, but an edit by {node} is known at the end of a run alone: set "
            "end_at_step to the last step, and connect all of the sigmas."
        )


def check_two_latents(guider: CFGGuider) -> None:
    """Raises ValueError for runs whose negative prompt cannot move a latent of its own."""
    check_negative_runs(guider)
    negatives = guider.conds["negative"]
    limits = [name for name in ("gligen", *RANGES) if negatives[0].get(name) is not None]
    if len(negatives) > 1 or limits or is_mixed(guider.model_patcher):
        raise ValueError(
            "Cross Attention Guidance with two latents takes one plain negative prompt, without Negative Prompt "
            "Guidance, null text, GLIGEN, timestep ranges or a second prompt: connect one, or set latents to one."
        )


def check_negative_runs(guider: CFGGuider) -> None:
    """Raises ValueError where nothing is to be had from the negative prompt that moves a latent of its own."""
    if guider.cfg == 1 or not guider.conds.get("negative"):
        raise ValueError(
            "Cross Attention Guidance with two latents moves one of them by the negative prompt, which this run leaves "
            "out: raise cfg, and that of a CFG Override, or set latents to one."
        )


def check_unmixed(mixed: bool, needs: str) -> None:
    """Raises ValueError where another node mixes the prompts of a call. needs: who runs one by itself, and advice."""
    if mixed:
        raise ValueError(
            "Another node on this MODEL mixes what the prompts of a call attend to, as Normalized Attention Guidance "
            f"does, but {needs}."
        )


def check_same_answer(node: str, x: Tensor, first: Tensor, second: Tensor) -> None:
    """Raises ValueError where the model's two denoised estimates of x differ: what `node` does cannot be repeated."""
    difference = apart(x, first, second)
    if difference > ALIKE:
        raise ValueError(
            f"{node} needs a MODEL that repeats its answers, but two to one question are {difference:.1%} apart, as "
            "Token Merging, which draws at random, makes them: remove such a node from it."
        )


def check_whole_schedule(sigmas: Tensor, has_noise: bool, model: ModelPatcher) -> None:
    """Raises ValueError for a part of a schedule, along which Negative Prompt Guidance would run its own whole."""
    model_sampling = model.get_model_object("model_sampling")
    timesteps = model_sampling.timestep(sigmas[:2]).tolist()
    top = float(model_sampling.timestep(model_sampling.sigma_max[None]))
    # Schedules may begin one step below the top.
    begins = has_noise or len(sigmas) < 3 or 2 * timesteps[0] - timesteps[1] > 0.97 * top
    ends = sigmas[-1] <= model_sampling.sigma_min * 1.01
    if not (begins and ends):
        where = f"stops at sigma {float(sigmas[-1]):.4g}" if begins else f"begins at sigma {float(sigmas[0]):.4g}"
        raise ValueError(
            f"Negative Prompt Guidance counts its schedule along the sampler's steps, but this run {where}, in the "
            "middle of a longer one: connect the trajectory to it, or set its schedule to constant."
        )


def check_replay(node: str, trajectory: Trajectory, run: Run) -> None:
    """Raises ValueError for a run that the sampler which `node` made for `trajectory` cannot give the image back in."""
    check_same_model(run.guider.model_patcher, trajectory)
    check_every_call(run.guider.model_patcher, f"The sampler of {node}")
    own, seed = trajectory.conditioning[0][1], run.arguments["seed"]
    if "unclip_conditioning" in own and seed != own[SEED]:
        raise ValueError(
            f"unCLIPConditioning draws noise by the sampler's seed, and at {seed} the sampler of {node} cannot give "
            f"the image back: set noise_seed to {own[SEED]}."
        )
    sigmas, latent = run.sigmas, run.latent
    if run.denoise_mask is not None:
        raise ValueError(
            f"The latent carries a noise mask, which the sampler of {node} does not know: remove Set Latent Noise Mask."
        )
    own = trajectory.sigmas.to(sigmas)
    if len(sigmas) != len(own) or not torch.allclose(sigmas, own, rtol=1e-4):
        raise ValueError(
            f"The sampler of {node} runs {trajectory.steps} steps from sigma {float(own[0]):.4g}, but was given "
            f"{len(sigmas) - 1} from sigma {float(sigmas[0]):.4g}: use Edit Sampler, or connect the sigmas output of "
            "the same node."
        )
    start = trajectory.states[0].to(latent)
    fits = latent.shape[1:] == start.shape[1:] and len(start) in (1, len(latent))
    if not fits or (latent - start).norm() > 1e-3 * start.expand_as(latent).norm():
        raise ValueError(
            f"The sampler of {node} starts from its own noise, but latent_image is another latent: use Edit Sampler, "
            "or connect the noise output of the same node."
        )


def _fitting_schedule(name: str) -> str:
    """How a sampler of this function gets the schedule of a trajectory."""
    if name in SHORTENED:
        return (
            f"KSampler Advanced takes a sigma out of any schedule for '{SHORTENED[name]}', so choose euler there, or "
            "use Edit Sampler, or connect the trajectory's SIGMAS to SamplerCustom"
        )
    return (
        "use Edit Sampler, or connect the trajectory's SIGMAS to SamplerCustom, or give DDIM Inversion the schedule "
        "and steps of your KSampler Advanced"
    )


def _distance(x: Tensor, other: Tensor) -> float:
    """Of x [b, c, h, w] from `other` [1 or b, c, h, w], relative to that."""
    other = other.to(x)
    return float((x - other).norm() / other.expand_as(x).norm())


def _shared(x: Tensor, noise: Tensor) -> float:
    """How much of `noise` [1 or b, c, h, w] there is in x: near 0 where they have nothing to do with each other."""
    return float((x * noise).sum() / noise.expand_as(x).square().sum())


def _check_conditionings(guider: CFGGuider) -> None:
    positive = guider.conds.get("positive", [])
    if len(positive) != 1:
        raise ValueError(
            f"The guider {type(guider).__name__} has {len(positive)} positive conditionings, but an edit has one "
            "target: connect Prompt Edit's target output alone."
        )
    if any(positive[0].get(name) is not None for name in RANGES):
        raise ValueError("The target prompt is limited to a part of the run: remove its timestep range.")
    if positive[0].get("mask") is not None:
        raise ValueError(
            "The target prompt has a mask, outside which nothing would be sampled: remove Conditioning (Set Mask) from "
            "it, and connect the mask to Local Blend."
        )
    for name, entries in guider.conds.items():
        if any("area" in entry or entry.get("set_area_to_bounds") for entry in entries):
            raise ValueError(
                f"The {name} prompt is limited to an area, but edits need the whole image: remove the area, or "
                "set set_cond_area of Conditioning (Set Mask) to default."
            )


def check_start(x: Tensor, trajectory: Trajectory, index: int, sigmas: Tensor, adds_noise: bool) -> None:
    """Raises ValueError where a run along `sigmas` that begins with x at step `index` does not belong to the source.

    At step 0 it begins with the trajectory's own noise, later on with what a run from there has come to.
    """
    noise, state = (trajectory.states[i].to(x) for i in (0, index))
    if index > 0 and _distance(x, noise) < 1e-3:
        rest = trajectory.sigmas[index : index + len(sigmas)].to(sigmas)
        if len(rest) < len(sigmas) or not torch.allclose(sigmas[:-1], rest[:-1], rtol=1e-4):
            raise ValueError(
                f"The sampler runs {len(sigmas) - 1} steps and the trajectory has {trajectory.steps}, so it starts at "
                f"the sigma of step {index} but from the noise of step 0: give both the same steps, and set "
                "start_at_step to 0."
            )
        raise ValueError(
            f"The sampler starts at step {index} but from the noise of step 0: start at step 0 (start_at_step 0, "
            "denoise 1, all of SIGMAS), or connect the latent of a sampler that stopped there."
        )
    if _distance(x, state) < SAME:
        return
    if index == 0:
        raise ValueError(OTHER_START)
    if adds_noise or (trajectory.sigmas[index] >= 1 and _shared(x, state - trajectory.states[-1].to(x)) < 0.25):
        raise ValueError(
            f"The sampler starts at step {index} of the trajectory, but not with the noise that the source has there: "
            "start at step 0 from the noise latent that came with this trajectory, or connect the latent of a sampler "
            f"that stopped there with leftover noise, {NOISE_OFF}."
        )


def check_source_negative(negatives: list | None) -> None:
    """Raises ValueError where there is no one negative prompt to guide the source's prediction by."""
    count = len(negatives or ())
    if count != 1:
        raise ValueError(
            f"Flow Edit's source_cfg is guided by the sampler's negative prompt, but this run has {count}: connect one "
            "plain negative, or set source_cfg to 1."
        )


def check_source_ran(ran: bool) -> None:
    """Raises ValueError where the target's call has begun, but the source's, which it reads from, was left out."""
    if not ran:
        raise ValueError(
            "Another node on this MODEL left out the call of the source, which the edit reads from: remove that pack's "
            "cache, or take the host's EasyCache."
        )


def check_prompt_kept(tokens: int, kept: int) -> None:
    """Raises ValueError where `tokens` inside the model are not a prompt of `kept`, perhaps tiled."""
    if tokens % kept:
        raise ValueError(
            f"Another patch changed the prompt from {kept} to {tokens} tokens inside the model: "
            "remove it, or move it to a MODEL without Palimpsest's edits."
        )


def prompt_in_place(tokens: int, kept: int, padded: int) -> bool:
    """Whether `tokens` before the image are a prompt of `kept`, `padded` behind or cut short."""
    return 0 < tokens <= kept or tokens == padded


def check_prompt_in_place(tokens: int, kept: int, padded: int) -> None:
    """Raises ValueError where `tokens` before the image are another prompt than that."""
    if not prompt_in_place(tokens, kept, padded):
        raise ValueError(
            f"A prompt of {kept} tokens has {tokens} inside this MODEL, among which its words cannot be found: encode "
            "it with the CLIP that belongs to the MODEL, and remove patches that change prompts."
        )


def check_one_frame(x: Tensor) -> None:
    """Raises ValueError for latents of a video [b, c, t, h, w], where words have no place in every frame."""
    if x.ndim == 5 and x.shape[2] > 1:
        raise ValueError(
            f"Local Blend finds words in single pictures, but the latent has {x.shape[2]} frames: use a mask of your "
            "own without words."
        )


def check_same_length(source: int, target: int) -> None:
    """Raises ValueError where the tokens of two prompts, whose maps are to be compared, cannot be paired."""
    if source != target:
        raise ValueError(
            f"Cross Attention Guidance pairs the tokens of both prompts, but the source has {source} and the sampler's "
            f"positive {target}: make them of one length, or apply a direction made from short sentences."
        )


def check_positions_kept(positions: int, kept: int) -> None:
    """Raises ValueError where a layer in which words or masks have a place has other positions than its image."""
    if positions != kept:
        raise ValueError(
            f"Another patch changed a layer of {kept} positions to {positions}, where words are to be located or masks "
            "apply: remove token merging or HyperTile from this MODEL."
        )


def check_divided(result: Tensor, query: Tensor, layer: Layer) -> None:
    """Raises ValueError where another pack's self-attention cannot do with a part of the keys."""
    if result.shape != query.shape:
        raise ValueError(
            f"Another node replaces the self-attention of {layer.block} block {layer.number} by one that cannot look "
            "at a part of the image, as MasaCtrl's masks ask: set first_layer beyond that block, or remove the masks."
        )


def check_one_size(layer: Layer, known: Collection[Layer]) -> None:
    """Raises ValueError where a layer that is to be recorded has another size than at the steps before."""
    if layer not in known:
        raise ValueError(
            f"A node such as PatchModelAddDownscale changes {layer.block} block {layer.number} to "
            f"{layer.height} x {layer.width} during the run, but an attention store holds one size of a layer: edit "
            "this MODEL without an attention store."
        )


def check_stored(layer: Layer, stored: Collection[Layer]) -> None:
    """Raises ValueError where an attention store holds a layer at another size than it has in the edit."""
    if layer not in stored:
        raise ValueError(
            f"The attention store does not hold {layer.block} block {layer.number} at the {layer.height} x "
            f"{layer.width} positions that it has here: record it from a MODEL with the same nodes, or edit without it."
        )


def check_in_place(sampler: Sampler, node: str) -> None:
    """Raises ValueError for samplers that call the model with a copy of their own latent: `node` cannot change it."""
    name = function_name(sampler)
    found = [shown for start, shown in OWN_LATENT.items() if name.startswith(start)]
    if found:
        raise ValueError(
            f"{node} cannot change the latent inside the sampler '{found[0]}': choose euler, ddim or dpmpp_2m."
        )


def check_one_state(parts: list[str]) -> None:
    """Raises ValueError where a sampler of several states a step meets parts that know the trajectory's one alone."""
    if parts:
        raise ValueError(
            f"{parts[0]} knows one state of the source a step, but the sampler of EDICT Inversion has two: remove it "
            "from this MODEL, or invert with another node."
        )


def check_part(x: Tensor, state: Tensor) -> None:
    """Raises ValueError where the model is called on less than the whole image or batch."""
    if x.shape[1:] != state.shape[1:] or len(state) not in (1, len(x)):
        raise ValueError(
            f"The model is called on a part of shape {list(x.shape)} of the trajectory's {list(state.shape)}: remove "
            "context windows, tiling and areas."
        )


def check_all_images(x: Tensor, images: int) -> None:
    """Raises ValueError where the model is called on less than the batch, whose images have prompts in turn."""
    if len(x) != images:
        raise ValueError(f"The model is called on {len(x)} of {images} images: remove context windows from this MODEL.")


def check_pulled(noise: Tensor, image: Tensor, virtual: bool) -> None:
    """Raises ValueError for a run that Image Pull cannot draw to `image`. virtual: whether it edits from an image."""
    if virtual:
        raise ValueError(
            "Image Pull draws sampling to an image, which a MODEL of Flow Edit or Virtual Inversion does not leave but "
            "by its edit: remove Image Pull, and lower cfg or denoise, or raise Flow Edit's pull."
        )
    if image.shape[1:] != noise.shape[1:] or len(image) not in (1, len(noise)):
        raise ValueError(
            f"Image Pull's image has latents of shape {list(image.shape)} but the sampler's are {list(noise.shape)}: "
            "connect an image of the size that is sampled, and one or as many as the batch holds."
        )


def check_instructed(model: ModelPatcher, node: str, key: str) -> None:
    """Raises ValueError for models without channels for an image, and for those that were shown one under `key`."""
    if not isinstance(model.model, IP2P):
        raise ValueError(
            f"{node} shows the MODEL an image, for which this one ({type(model.model).__name__}) has no channels: load "
            "an InstructPix2Pix checkpoint, or Load Demo Instruct Model's."
        )
    if key in model.wrappers.get(WrappersMP.OUTER_SAMPLE, {}):
        raise ValueError(f"This MODEL already carries an {node}: one is enough, remove the other.")


def check_beside(node: str, noise: Tensor, image: Tensor) -> None:
    """Raises ValueError where the image to be shown beside a latent is of another size or number."""
    if image.shape[1:] != noise.shape[1:] or len(image) not in (1, len(noise)):
        raise ValueError(
            f"{node}'s image has latents of shape {list(image.shape)} but the sampler's are {list(noise.shape)}: "
            "connect the node's own latent to the sampler, and encode with the VAE that belongs to the MODEL."
        )


def check_guided_alone(node: str, guider: CFGGuider) -> None:
    """Raises ValueError for guiders of more prompts than a positive and a negative, which combine them by themselves.

    The pack's own further prompts have keys of ours.
    """
    others = [name for name in guider.conds if name not in ("positive", "negative") and not name.startswith(OURS[:-1])]
    if others:
        raise ValueError(
            f"The guider {type(guider).__name__} combines a prompt '{others[0]}' by itself, but {node} guides from the "
            "positive and the negative alone: use CFGGuider or a KSampler."
        )


def check_judged(node: str, virtual: bool) -> None:
    """Raises ValueError for a run in which `node` sees no noisy image. virtual: whether it edits from an image."""
    if virtual:
        raise ValueError(
            f"{node} looks at an image under noise, which a MODEL of Flow Edit or Virtual Inversion does not sample: "
            f"remove {node}, or invert with DDIM Inversion."
        )


def check_boosted(node: str, virtual: bool) -> None:
    """Raises ValueError for a run whose steps `node` cannot add noise to. virtual: whether it edits from an image."""
    if virtual:
        raise ValueError(
            f"{node} is to add noise by boost, which a MODEL of Flow Edit or Virtual Inversion does not sample: set "
            "boost to 1."
        )


def check_one_model(model: BaseModel, guider: CFGGuider, node: str) -> None:
    """Raises ValueError where a guider runs a prompt that reads from the source on a model of its own."""
    if model is not guider.inner_model:
        raise ValueError(
            f"The guider {type(guider).__name__} runs a prompt on another checkpoint than the MODEL to edit, and "
            f"{node} knows the source in that one alone: connect the same checkpoint to both, or use CFGGuider."
        )
