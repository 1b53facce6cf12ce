"""The recipes of `bench truth` and `bench steps`: every inversion with every editor, and edits without inversion.

All take a batch of demo edits to edited latents; what each costs is counted.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property, partial
from typing import NamedTuple

import comfy.samplers
import comfy.utils
import numpy as np
import torch
from comfy.model_patcher import ModelPatcher
from comfy.samplers import KSAMPLER, Sampler
from nodes import InpaintModelConditioning
from torch import Tensor
from torch.nn.functional import max_pool2d

from ..attention.local_blend import LocalBlend
from ..attention.masactrl import MasaCtrl
from ..attention.p2p import PRESETS as P2P_PRESETS
from ..attention.p2p import Window
from ..attention.pnp import PlugAndPlay
from ..demo import scenes
from ..demo.clip import load_clip
from ..demo.edits import Edit
from ..demo.instructions import said
from ..demo.model import load_inpaint
from ..guidance.clip_guidance import ClipGuidance, direction
from ..guidance.cross_attention import CrossAttentionGuidance
from ..guidance.instruct import Instruct
from ..guidance.proximal import INVERSION, Proximal
from ..guidance.rf_inversion import ImagePull
from ..guidance.uni_edit import UniEdit
from ..host.branch.blocks import last_layers, layout_blocks
from ..host.branch.guide import attach_guide
from ..host.branch.guided import attach_rule
from ..host.branch.instructed import attach_instruction
from ..host.branch.judged import NoisedClip, attach_judge
from ..host.branch.pulled import attach_pull
from ..host.branch.source import attach, attach_blend
from ..host.files.trajectory import DPMPP_2M, Trajectory
from ..host.run.cost import Cost, metered
from ..host.run.model import is_unet, noise_latent
from ..inversion.diffedit import RunRegion, difference_mask
from ..inversion.diffedit import Settings as Differences
from ..inversion.flow_edit import edit_image, edit_trajectory
from ..inversion.null_text import Settings as NullText
from ..inversion.null_text import null_text
from ..inversion.replay import invert_edict, invert_edit_friendly, invert_obelm, invert_turbo_edit
from ..inversion.run import (
    UNI_INV,
    Guidance,
    Refinement,
    as_trajectory,
    ddim_sigmas,
    invert,
    karras_sigmas,
    record,
    resample,
)
from ..inversion.value_inversion import Settings as Values
from ..inversion.value_inversion import value_inversion
from ..inversion.virtual import PRESETS, invert_virtually, schedule
from ..inversion.visii import Settings as Visii
from ..inversion.visii import visii
from .edits import directed, encode, local_blend, one_edit, prompt_edit, prompt_to_prompt


class Inverted(NamedTuple):
    """What an inversion hands to the editors: the MODEL, the source's states, the negative and the edit's sampler.

    followed: where null text's negatives lead, beside the trajectory that they were fitted to.
    """

    model: ModelPatcher
    trajectory: Trajectory
    negative: list
    sampler: Sampler
    followed: Trajectory | None = None


class Spent(NamedTuple):
    """Rows of the network, and seconds."""

    rows: float = 0.0
    seconds: float = 0.0


def together(one: Spent, other: Spent) -> Spent:
    return Spent(one.rows + other.rows, one.seconds + other.seconds)


def spending(cost: Cost, work: Callable) -> tuple:
    """What `work` returns, and what it cost."""
    rows, began = sum(cost.rows), time.perf_counter()
    result = work()
    return result, Spent(sum(cost.rows) - rows, time.perf_counter() - began)


class Correction(NamedTuple):
    """How the guided source is brought back to the inversion: which share of the distance, at every which step."""

    share: float = 1.0
    every: int = 1


class Batch:
    """Some edits and what they share: encoded prompts, the inversions that were asked for, and what they cost."""

    def __init__(self, loaded: tuple, cases: Sequence[Edit], arguments: argparse.Namespace, steps: int) -> None:
        model, self.clip, self.vae = loaded
        self.cases, self.arguments, self.cfg, self.steps = cases, arguments, arguments.cfg, steps
        self.model, self.cost = metered(model)
        self.sigmas = ddim_sigmas(model, steps)
        self.source, self.target = (
            [encode(self.clip, [getattr(case, side).caption for case in cases])] for side in ("source", "target")
        )
        self.negative = [encode(self.clip, [""])]
        self.latent = self.vae.encode(torch.from_numpy(np.stack([scenes.render(case.source) for case in cases])))
        self.edits = [prompt_edit(self.clip, case, "auto") for case in cases]
        self._inverted: dict[str, tuple[Inverted, Spent]] = {}

    def inverted(self, name: str) -> tuple[Inverted, Spent]:
        if name not in self._inverted:
            before = self.inverted(UPON[name])[1] if name in UPON else Spent()
            made, spent = spending(self.cost, lambda: INVERSIONS[name](self))
            self._inverted[name] = made, together(before, spent)
        return self._inverted[name]

    def noise(self) -> Tensor:
        generator = torch.Generator().manual_seed(self.arguments.seed)
        return torch.randn(self.latent.shape, generator=generator)

    @cached_property
    def inpaint(self) -> tuple:
        model, clip, vae = load_inpaint()
        return metered(model, self.cost)[0], clip, vae

    @cached_property
    def moved(self) -> list:
        return [[directed(self.clip, self.cases, self.source[0][0]), {}]]


def euler() -> Sampler:
    return comfy.samplers.sampler_object("euler")


def ddim(batch: Batch) -> Inverted:
    trajectory = invert(batch.model, Guidance(batch.source), batch.latent, batch.sigmas)
    return Inverted(batch.model, trajectory, batch.negative, euler())


def second_order(batch: Batch) -> Inverted:
    trajectory = invert(batch.model, Guidance(batch.source), batch.latent, batch.sigmas, solver=DPMPP_2M)
    return Inverted(batch.model, trajectory, batch.negative, comfy.samplers.sampler_object(DPMPP_2M))


def uni_inv(batch: Batch) -> Inverted:
    trajectory = invert(batch.model, Guidance(batch.source), batch.latent, batch.sigmas, solver=UNI_INV)
    return Inverted(batch.model, trajectory, batch.negative, euler())


def uni_inv_in_part(batch: Batch) -> Inverted:
    """The last 0.7 of the schedule, without a prompt; the source's is the edit's negative (arXiv 2504.13109)."""
    sigmas = batch.sigmas[-round(0.7 * batch.steps) - 1 :]
    trajectory = invert(batch.model, Guidance(batch.negative), batch.latent, sigmas, solver=UNI_INV)
    return Inverted(batch.model, trajectory, batch.source, euler())


def drifting(batch: Batch) -> Inverted:
    noise = noise_latent(batch.model, batch.inverted(DDIM)[0].trajectory)
    guidance = Guidance(batch.source, batch.negative, batch.cfg)
    trajectory, _ = record(batch.model, guidance, euler(), batch.sigmas, torch.zeros_like(noise), noise, seed=0)
    return Inverted(batch.model, trajectory, batch.negative, euler())


def fixed_point(batch: Batch) -> Inverted:
    refinement = Refinement(iterations=3, average=1)
    trajectory = invert(batch.model, Guidance(batch.source), batch.latent, batch.sigmas, refinement)
    return Inverted(batch.model, trajectory, batch.negative, euler())


def negative_prompt(batch: Batch) -> Inverted:
    return batch.inverted(DDIM)[0]._replace(negative=batch.source)


def null_texts(batch: Batch) -> Inverted:
    pivot = batch.inverted(DDIM)[0].trajectory
    settings = NullText(cfg=batch.cfg)
    negative, followed = null_text(batch.model, pivot, batch.negative, settings, checkpointing=False)
    return Inverted(batch.model, pivot, negative, euler(), followed)


def null_text_of_source(batch: Batch) -> Inverted:
    return Inverted(batch.model, batch.inverted(NULL_TEXT)[0].followed, batch.negative, euler())


def fitted_values(batch: Batch) -> Inverted:
    pivot = batch.inverted(DDIM)[0].trajectory
    settings = Values(cfg=batch.cfg, inner_steps=30)
    trajectory = value_inversion(batch.model, pivot, batch.negative, settings, checkpointing=False)
    return Inverted(batch.model, trajectory, batch.negative, euler())


def edit_friendly(batch: Batch) -> Inverted:
    sigmas, guidance = batch.sigmas[round(0.36 * batch.steps) :], Guidance(batch.source)
    trajectory, sampler = invert_edit_friendly(batch.model, guidance, batch.latent, sigmas, 1.0, batch.arguments.seed)
    return Inverted(batch.model, trajectory, batch.negative, sampler)


def edict(batch: Batch) -> Inverted:
    sigmas, guidance = batch.sigmas[round(0.2 * batch.steps) :], Guidance(batch.source)
    trajectory, sampler = invert_edict(batch.model, guidance, batch.latent, sigmas, 0.93)
    return Inverted(batch.model, trajectory, batch.negative, sampler)


def o_belm(batch: Batch) -> Inverted:
    sigmas = karras_sigmas(batch.model, batch.steps)[round(0.2 * batch.steps) :]
    trajectory, sampler = invert_obelm(batch.model, Guidance(batch.source), batch.latent, sigmas)
    return Inverted(batch.model, trajectory, batch.negative, sampler)


def turbo_edit(batch: Batch) -> Inverted:
    """The source's prompt is the negative: guidance is the paper's pseudo-guidance."""
    trajectory, sampler = invert_turbo_edit(batch.model, batch.source, batch.latent, batch.steps, batch.arguments.seed)
    return Inverted(batch.model, trajectory, batch.source, sampler)


def virtual(preset: str, batch: Batch) -> Inverted:
    """No inversion: the image with noise on it, on a MODEL that edits it already."""
    sampler, fresh = PRESETS[preset]
    sigmas = schedule(batch.model, "karras", batch.steps, batch.arguments.strength)
    seed = batch.arguments.seed
    model, trajectory = invert_virtually(batch.model, batch.source, batch.latent, sigmas, fresh, seed=seed)
    return Inverted(model, trajectory, batch.negative, comfy.samplers.sampler_object(sampler))


def corrected(correction: Correction, batch: Batch) -> Inverted:
    """The guided source, brought back to the inversion in part only (arXiv 2310.01506, section 5.3)."""
    trajectory, _ = guided_source(batch, correction)
    return Inverted(batch.model, trajectory, batch.negative, euler())


def target_too(batch: Batch) -> Inverted:
    """The difference between the inversion and the guided source is added to the target as well."""
    trajectory, differences = guided_source(batch, Correction())
    return Inverted(
        batch.model, trajectory, batch.negative, KSAMPLER(partial(walk, after=lambda x, i: x + differences[i]))
    )


def guided_source(batch: Batch, correction: Correction) -> tuple[Trajectory, list[Tensor]]:
    """The source sampled at the edit's guidance and corrected after its steps, and the differences it was short of."""
    pivot = batch.inverted(DDIM)[0].trajectory
    noise = noise_latent(batch.model, pivot)
    states, differences = [pivot.states[0]], []

    def correct(x: Tensor, step: int) -> Tensor:
        differences.append(pivot.states[step + 1] - x)
        share = correction.share if (step + 1) % correction.every == 0 else 0.0
        states.append(x + share * differences[-1])
        return states[-1]

    guider = Guidance(batch.source, batch.negative, batch.cfg).guider(batch.model)
    guider.sample(torch.zeros_like(noise), noise, KSAMPLER(partial(walk, after=correct)), batch.sigmas, seed=0)
    return as_trajectory(batch.model, Guidance(batch.source), states, batch.sigmas), differences


def walk(model, x: Tensor, sigmas: Tensor, extra_args: dict, callback, disable, after: Callable) -> Tensor:
    """Euler's method; `after` takes the state behind each step and gives it back changed."""
    for i in range(len(sigmas) - 1):
        denoised = model(x, sigmas[i] * x.new_ones(len(x)), **extra_args)
        x = after(x + (x - denoised) / sigmas[i] * (sigmas[i + 1] - sigmas[i]), i)
    return x


# --- editors ---------------------------------------------------------------------------------------------------------


def naive(batch: Batch, inverted: Inverted) -> tuple[ModelPatcher, list]:
    return inverted.model, batch.target


def p2p(batch: Batch, inverted: Inverted) -> tuple[ModelPatcher, list]:
    rule = prompt_to_prompt(batch.edits, 1.0, batch.arguments)
    if inverted.trajectory.values is not None:  # as P2P Attention Controller by default
        rule = replace(rule, shared=torch.cat([edit.shared() for edit in batch.edits]), values=Window(0.0, 0.5))
    return attach(inverted.model, inverted.trajectory, rule), batch.target


def unified(batch: Batch, inverted: Inverted) -> tuple[ModelPatcher, list]:
    """InfEdit's attention control (arXiv 2312.04965)"""
    rule = one_edit(batch.edits, 1.0, P2P_PRESETS["InfEdit"])
    return attach(inverted.model, inverted.trajectory, rule), batch.target


def blended(batch: Batch, inverted: Inverted) -> tuple[ModelPatcher, list]:
    model, target = p2p(batch, inverted)
    return attach_blend(model, inverted.trajectory, local_blend(batch.edits)), target


def blended_by_layout(batch: Batch, inverted: Inverted) -> tuple[ModelPatcher, list]:
    """The word maps carried by self-attention."""
    model, target = p2p(batch, inverted)
    return attach_blend(model, inverted.trajectory, local_blend(batch.edits, layout=True)), target


def diffedit(batch: Batch, inverted: Inverted) -> tuple[ModelPatcher, list]:
    """The new prompt where the two prompts predict different noise, the source elsewhere (arXiv 2210.11427)."""
    return masked(batch, inverted, inverted.model), batch.target


def p2p_masked(batch: Batch, inverted: Inverted) -> tuple[ModelPatcher, list]:
    model, target = p2p(batch, inverted)
    return masked(batch, inverted, model), target


def masked(batch: Batch, inverted: Inverted, model: ModelPatcher) -> ModelPatcher:
    """The source outside DiffEdit's mask, at the nodes' defaults."""
    blend = LocalBlend(None, 0, None, 0.3, 0.3, 0.0, 1, differing(batch), False)
    return attach_blend(model, inverted.trajectory, blend)


def differing(batch: Batch) -> Tensor:
    """DiffEdit's mask [b, h, w], at the node's defaults."""
    settings = Differences(0.5, 10, 3.0, batch.arguments.seed)
    return (difference_mask(batch.model, batch.source, batch.target, batch.latent, settings) > 0.3).float()


def proximal(batch: Batch, inverted: Inverted) -> tuple[ModelPatcher, list]:
    model, target = p2p(batch, inverted)
    return attach_rule(model, Proximal(0.4, 1.0, 0.6, INVERSION), inverted.trajectory), target


def pnp(batch: Batch, inverted: Inverted) -> tuple[ModelPatcher, list]:
    layout = tuple(layout_blocks(inverted.model.model.diffusion_model))
    rule = PlugAndPlay(layout[:1] if is_unet(inverted.model) else (), layout, 0.8, 0.5)
    return attach(inverted.model, inverted.trajectory, rule), batch.target


def masactrl(batch: Batch, inverted: Inverted) -> tuple[ModelPatcher, list]:
    rule = MasaCtrl(last_layers(inverted.model.model.diffusion_model, -1), 0.08, False, None)
    return attach(inverted.model, inverted.trajectory, rule), batch.target


def kv_edit(batch: Batch, inverted: Inverted) -> tuple[ModelPatcher, list]:
    """arXiv 2502.17363: what is outside the true mask is the source's, for attention too."""
    mask = true_mask(batch)[:, 0]
    rule = MasaCtrl(last_layers(inverted.model.model.diffusion_model, 0), 0.0, False, None, mask)
    model = attach(inverted.model, inverted.trajectory, rule)
    blend = LocalBlend(None, 0, None, 0.3, 0.3, 0.0, 1, mask, False)
    return attach_blend(model, inverted.trajectory, blend), batch.target


def uni_edit(batch: Batch, inverted: Inverted) -> tuple[ModelPatcher, list]:
    return attach_rule(inverted.model, UniEdit(1.0)), batch.target


def flow_edit_along(batch: Batch, inverted: Inverted) -> tuple[ModelPatcher, list]:
    """Flow Edit whose source is where the inversion had it, in place of under noise."""
    return edit_trajectory(inverted.model, inverted.trajectory), batch.target


def pix2pix_zero(batch: Batch, inverted: Inverted) -> tuple[ModelPatcher, list]:
    guide = CrossAttentionGuidance(0.3, 1.0, 64, False)
    return attach_guide(inverted.model, inverted.trajectory, guide, checkpointing=False), batch.moved


def image_pull(batch: Batch, inverted: Inverted) -> tuple[ModelPatcher, list]:
    pull = ImagePull(0.9, 0.0, 0.25, False)
    return attach_pull(inverted.model, inverted.trajectory.states[-1], pull), batch.target


def clip_guided(batch: Batch, inverted: Inverted) -> tuple[ModelPatcher, list]:
    """The new prompt, and beside it guidance by the demo CLIP, which reads the same (arXiv 2112.10741)."""
    return followed(batch, inverted), batch.target


def clip_alone(batch: Batch, inverted: Inverted) -> tuple[ModelPatcher, list]:
    """The source's prompt: only the CLIP reads the new one."""
    return followed(batch, inverted), batch.source


def followed(batch: Batch, inverted: Inverted) -> ModelPatcher:
    """At the node's defaults."""
    clip = load_clip()
    target, source = (clip.text([getattr(case, side).caption for case in batch.cases]) for side in ("target", "source"))
    rule = ClipGuidance(5.0, 0.0, 1.0, direction(target, source))
    return attach_judge(
        inverted.model, rule, NoisedClip(ModelPatcher(clip, inverted.model.load_device, torch.device("cpu")))
    )


DDIM, NULL_TEXT, VALUES = "DDIM", "null text", "values (StyleDiffusion)"
OF_FLOWS, OF_FLOWS_IN_PART = "Uni-Inv", "Uni-Inv of 0.7"
INVERSIONS: dict[str, Callable[[Batch], Inverted]] = {
    DDIM: ddim,
    "drifting DDIM": drifting,
    "fixed point": fixed_point,
    "negative prompt": negative_prompt,
    NULL_TEXT: null_texts,
    "edit friendly": edit_friendly,
    "EDICT": edict,
    "second order": second_order,
    "O-BELM": o_belm,
    OF_FLOWS: uni_inv,
}
EDITORS: dict[str, Callable[[Batch, Inverted], tuple[ModelPatcher, list]]] = {
    "naive": naive,
    "P2P": p2p,
    "P2P, blended": blended,
    "DiffEdit": diffedit,
    "P2P, DiffEdit's mask": p2p_masked,
    "P2P, proximal": proximal,
    "PnP": pnp,
    "MasaCtrl": masactrl,
    "pix2pix-zero": pix2pix_zero,
    "Flow Edit": flow_edit_along,
    "Image Pull": image_pull,
}
GRID = [(inversion, editor) for inversion in INVERSIONS for editor in EDITORS]
ABLATIONS: dict[str, Callable[[Batch], Inverted]] = {
    "DDIM, 0.4 of the correction": partial(corrected, Correction(share=0.4)),
    "DDIM, 0.8 of the correction": partial(corrected, Correction(share=0.8)),
    "DDIM, corrected every 2nd step": partial(corrected, Correction(every=2)),
    "DDIM, corrected every 5th step": partial(corrected, Correction(every=5)),
    "DDIM, corrected every 10th step": partial(corrected, Correction(every=10)),
    "DDIM, the target corrected too": target_too,
    "null text, of the source alone": null_text_of_source,
}
GRID += [(inversion, "P2P") for inversion in ABLATIONS]
VIRTUAL = {f"virtual {preset}": partial(virtual, preset) for preset in PRESETS}
EDITORS["InfEdit's control"] = unified  # for virtual inversion alone
GRID += [(inversion, editor) for inversion in VIRTUAL for editor in ("naive", "P2P", "PnP", "MasaCtrl")]
GRID += [("virtual InfEdit", "InfEdit's control")]
INVERSIONS |= ABLATIONS | VIRTUAL
INVERSIONS["TurboEdit"] = turbo_edit  # for few steps alone: `bench steps`
INVERSIONS[OF_FLOWS_IN_PART] = uni_inv_in_part
EDITORS |= {"CLIP guidance": clip_guided, "CLIP guidance alone": clip_alone}
GRID += [(DDIM, editor) for editor in ("CLIP guidance", "CLIP guidance alone")]
EDITORS |= {"KV-Edit, true mask": kv_edit, "UniEdit": uni_edit}  # of flows alone
INVERSIONS[VALUES] = fitted_values
EDITORS["P2P, blended by words and layout"] = blended_by_layout
GRID += [(VALUES, "P2P"), (DDIM, "P2P, blended by words and layout")]
UPON = dict.fromkeys(("drifting DDIM", "negative prompt", NULL_TEXT, VALUES, *ABLATIONS), DDIM)
UPON["null text, of the source alone"] = NULL_TEXT


def edit(batch: Batch, recipe: str) -> tuple[Tensor, Spent]:
    """The edited latents [b, c, h, w]. Raises ValueError where an inversion and an editor refuse each other."""
    if recipe in UNINVERTED:
        return spending(batch.cost, lambda: UNINVERTED[recipe](batch))
    inversion, editor = recipe.split(" + ")
    inverted, before = batch.inverted(inversion)

    def run() -> Tensor:
        model, target = EDITORS[editor](batch, inverted)
        return resample(model, inverted.trajectory, Guidance(target, inverted.negative, batch.cfg), inverted.sampler)

    latent, spent = spending(batch.cost, run)
    return latent, together(before, spent)


def img2img(batch: Batch, strength: float, model: ModelPatcher, mask: Tensor | None = None) -> Tensor:
    """The image noised to where the last steps begin, then sampled by the host; mask: as of Set Latent Noise Mask."""
    sigmas = batch.sigmas[round((1 - strength) * batch.steps) :]
    guider = Guidance(batch.target, batch.negative, batch.cfg).guider(model)
    return guider.sample(batch.noise(), batch.latent, euler(), sigmas, mask, seed=0).cpu()


MaskOf = Callable[[Batch], Tensor]


def sdedit(strength: float, batch: Batch, mask_of: MaskOf | None = None) -> Tensor:
    """arXiv 2108.01073"""
    return img2img(batch, strength, batch.model, mask_of and mask_of(batch))


def flow_edit(
    strength: float,
    batch: Batch,
    mask_of: MaskOf | None = None,
    fresh: bool = True,
    region: RunRegion | None = None,
) -> Tensor:
    """arXiv 2412.08629; region: where its own predictions differ."""
    mask = mask_of and mask_of(batch)
    model = edit_image(batch.model, batch.source, batch.latent, fresh, mask=mask, region=region)
    return img2img(batch, strength, model, mask)


def instruct(image_scale: float, batch: Batch) -> Tensor:
    """arXiv 2211.09800, by an instruction of the words that change; the noise is all that the image starts from."""
    return instructed(image_scale, batch, [encode(batch.clip, [said(case) for case in batch.cases])])


def learned(image_scale: float, batch: Batch) -> Tensor:
    """arXiv 2307.14331, by an instruction learned from the same edit of another scene."""
    found = []
    for case in batch.cases:
        before, after = (batch.vae.encode(torch.from_numpy(picture)[None]) for picture in another(case))
        found.append(visii(batch.model, before, after, batch.negative, Visii(), checkpointing=False).embedding)
    ((_, options),) = batch.negative
    return instructed(image_scale, batch, [[torch.cat(found), options]])


def another(case: Edit) -> list[np.ndarray]:
    """Pictures before and after the same edit of the same things laid out anew, elsewhere unless the place changes."""
    places, place = list(scenes.PLACES), case.source.place
    other = places[(places.index(place) + 1) % len(places)]
    moved = {"place": other} if case.target.place == place else {}
    captions = [replace(scene, **moved).caption for scene in (case.source, case.target)]
    return [scenes.render(scenes.parse(caption, seed=0)) for caption in captions]


def instructed(image_scale: float, batch: Batch, instructions: list) -> Tensor:
    model = attach_instruction(batch.model, batch.latent, Instruct(image_scale))
    guider = Guidance(instructions, batch.negative, batch.cfg).guider(model)
    return guider.sample(batch.noise(), torch.zeros_like(batch.latent), euler(), batch.sigmas, seed=0).cpu()


def differing_mask(batch: Batch) -> Tensor:
    """[b, 1, h, w]"""
    return differing(batch)[:, None]


def true_mask(batch: Batch) -> Tensor:
    """Where the one true answer differs from the source [b, 1, H, W], as if drawn by hand."""
    return torch.from_numpy(np.stack([case.mask() for case in batch.cases])).float()[:, None]


def inpainting(batch: Batch) -> Tensor:
    """The demo's inpainting checkpoint from pure noise, told the true mask, as GLIDE edits (arXiv 2112.10741)."""
    model, _, vae = batch.inpaint
    pictures = torch.from_numpy(np.stack([scenes.render(case.source) for case in batch.cases]))
    mask = max_pool2d(true_mask(batch), 9, 1, 4)[:, 0]  # what is half in the latent's position is in it
    positive, negative, latent = InpaintModelConditioning().encode(
        batch.target, batch.negative, pictures, vae, mask, noise_mask=True
    )
    guider = Guidance(positive, negative, batch.cfg).guider(model)
    hidden = latent["noise_mask"]
    return guider.sample(batch.noise(), latent["samples"], euler(), batch.sigmas, hidden, seed=0).cpu()


UNINVERTED: dict[str, Callable[[Batch], Tensor]] = {
    **{f"SDEdit at {strength:g}": partial(sdedit, strength) for strength in (0.4, 0.6, 0.8)},
    "SDEdit at 0.8, true mask": partial(sdedit, 0.8, mask_of=true_mask),
    **{f"Flow Edit at {strength:g}": partial(flow_edit, strength) for strength in (0.7, 0.9)},
    "Flow Edit at 0.9, one noise": partial(flow_edit, 0.9, fresh=False),
    "Flow Edit at 0.9, confined": partial(flow_edit, 0.9, region=RunRegion(0.3, 0.1)),
    "Flow Edit at 0.9, DiffEdit's mask": partial(flow_edit, 0.9, mask_of=differing_mask),
    "Flow Edit at 0.9, true mask": partial(flow_edit, 0.9, mask_of=true_mask),
}
FLOW_EDITORS = (
    "naive",
    "P2P",
    "P2P, blended",
    "PnP",
    "MasaCtrl",
    "KV-Edit, true mask",
    "Flow Edit",
    "Image Pull",
    "DiffEdit",
)
FLOW_GRID = [(OF_FLOWS, editor) for editor in FLOW_EDITORS] + [(OF_FLOWS_IN_PART, "UniEdit")]
RECIPES = {
    model: [*UNINVERTED, *(" + ".join(pair) for pair in pairs)]
    for model, pairs in {"unet": GRID, "few-step": GRID, "flow": FLOW_GRID}.items()
}
INSTRUCTED = {f"Instruct Guidance at {scale:g}": partial(instruct, scale) for scale in (1.0, 1.2, 1.5)}
INSTRUCTED["Learn Edit from Pair at 1.5"] = partial(learned, 1.5)
UNINVERTED |= INSTRUCTED
RECIPES["instruct"] = list(INSTRUCTED)
UNINVERTED["inpainting with the true mask"] = inpainting  # whose checkpoint is the UNet's, for many steps
RECIPES["unet"].insert(0, "inpainting with the true mask")
