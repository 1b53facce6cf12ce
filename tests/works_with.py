"""The host's nodes beside the edits: what each is to come to. The tests check it, and the help pages tell it."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import comfy.gligen
import comfy.samplers
import comfy_extras.nodes_hypernetwork as hypernetwork
import torch
from comfy.model_patcher import CoreModelPatcher, ModelPatcher
from comfy.samplers import CFGGuider
from comfy_api.latest import io
from comfy_api.torch_helpers import set_torch_compile_wrapper
from comfy_extras.nodes_apg import APG
from comfy_extras.nodes_attention_multiply import UNetCrossAttentionMultiply, UNetSelfAttentionMultiply
from comfy_extras.nodes_cfg import CFGNorm, CFGZeroStar
from comfy_extras.nodes_context_windows import ContextWindowsManualNode
from comfy_extras.nodes_custom_sampler import BasicGuider, CFGOverride, DualCFGGuider, DualModelGuider
from comfy_extras.nodes_differential_diffusion import DifferentialDiffusion
from comfy_extras.nodes_easycache import EasyCacheNode, LazyCacheNode
from comfy_extras.nodes_eps import EpsilonScaling, TemporalScoreRescaling
from comfy_extras.nodes_freelunch import FreeU, FreeU_V2
from comfy_extras.nodes_fresca import FreSca
from comfy_extras.nodes_hypertile import HyperTile
from comfy_extras.nodes_lumina2 import RenormCFG
from comfy_extras.nodes_mahiro import Mahiro
from comfy_extras.nodes_model_advanced import ModelSamplingContinuousEDM, ModelSamplingDiscrete, RescaleCFG
from comfy_extras.nodes_model_downscale import PatchModelAddDownscale
from comfy_extras.nodes_model_merging import ModelMergeSimple
from comfy_extras.nodes_nag import NAGuidance
from comfy_extras.nodes_pag import PerturbedAttentionGuidance
from comfy_extras.nodes_perpneg import PerpNeg, PerpNegGuider
from comfy_extras.nodes_sag import SelfAttentionGuidance
from comfy_extras.nodes_slg import SkipLayerGuidanceDiT, SkipLayerGuidanceDiTSimple
from comfy_extras.nodes_tcfg import TCFG
from comfy_extras.nodes_tomesd import TomePatchModel
from comfy_extras.nodes_torch_compile import skip_torch_compile_dict
from nodes import ConditioningSetArea, ConditioningSetMask, ConditioningSetTimestepRange, ControlNetApplyAdvanced
from torch import Tensor

from test_composition import controlnet, lora
from tiny import WIDTH, Tiny, conditioning, execute, tiny_model

EDITORS = {
    "PalimpsestP2PAttentionController": ("swap", "refine and reweight"),
    "PalimpsestPnPFeatureInjector": ("pnp",),
    "PalimpsestMasaCtrl": ("masactrl", "with masks"),
    "PalimpsestLocalBlend": ("local blend",),
}
"""The kinds of edit that each editor's help page speaks for, the usual one first."""


class Refused(NamedTuple):
    """sentence: what the error says, a regular expression. advice: what the help says of it."""

    sentence: str
    advice: str


@dataclass(frozen=True, eq=False)
class Row:
    """A node, or some of one family.

    model: puts it on a MODEL. sample: runs it otherwise, as part of a guider or a prompt.
    inversion: whether the trajectory is made with it ("with it"), without it ("before it"), or by whom it is refused;
    None where it is no node of a MODEL. store: whether an attention store gives the live result, or is refused, or why
    it is not compared. refused: by kind of edit, or for all kinds under "". acts: whether it changes the tiny samples.
    first: whether it has to stand before the edit, for it makes another model.
    """

    name: str
    model: Callable[[ModelPatcher], ModelPatcher] = lambda model: model
    sample: Callable[[Tiny, ModelPatcher], Tensor] = lambda tiny, model: tiny.sample(model)
    inversion: str | Refused | None = None
    store: str | Refused = "same result"
    refused: Mapping[str, Refused] = field(default_factory=dict)
    acts: bool = True
    first: bool = False

    def outcome(self, kind: str) -> Refused | None:
        return self.refused.get(kind, self.refused.get(""))


def node(kind: type[io.ComfyNode], **widgets) -> Callable[[ModelPatcher], ModelPatcher]:
    return lambda model: execute(kind, model=model, **widgets)[0]


# --- nodes that need more than widgets -------------------------------------------------------------------------------


def hypernetwork_of_the_tiny_model(model: ModelPatcher) -> ModelPatcher:
    generator = torch.Generator().manual_seed(12)
    parts = [
        {"0.weight": 0.1 * torch.randn(WIDTH, WIDTH, generator=generator), "0.bias": torch.zeros(WIDTH)}
        for _ in range(2)
    ]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "hypernetwork.pt"
        torch.save({WIDTH: parts}, path)
        patch = hypernetwork.load_hypernetwork_patch(str(path), 1.0)
    model = model.clone()
    model.set_model_attn1_patch(patch)
    model.set_model_attn2_patch(patch)
    return model


def compiled(model: ModelPatcher) -> ModelPatcher:
    """As TorchCompileModel does it, but for the code that it makes: the host's guards, kept by no compiler."""
    model = model.clone(disable_dynamic=True)
    set_torch_compile_wrapper(model, "eager", options={"guard_filter_fn": skip_torch_compile_dict})
    return model


def merged(model: ModelPatcher) -> ModelPatcher:
    return ModelMergeSimple().merge(model, tiny_model(seed=9), 0.7)[0]


def gligen() -> CoreModelPatcher:
    """A tiny random one, with a gated attention for each transformer of the tiny UNet."""
    generator = torch.Generator().manual_seed(13)
    widths = (32, 64, 64, 64, 64, 32, 32)
    gates = [comfy.gligen.GatedSelfAttentionDense(width, WIDTH, 4, width // 4) for width in widths]
    network = comfy.gligen.Gligen(gates, comfy.gligen.PositionNet(WIDTH, WIDTH), WIDTH)
    for parameter in network.parameters():
        parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
        if parameter.ndim == 0:  # the gates, closed where they are 0
            parameter.data.fill_(1.0)
    return CoreModelPatcher(network, load_device=torch.device("cpu"), offload_device=torch.device("cpu"))


def with_gligen(tiny: Tiny, model: ModelPatcher) -> Tensor:
    box = (conditioning(14, 1)[0][0][0], 4, 4, 2, 2)
    return tiny.sample(model, positive=[[tiny.target[0][0], {"gligen": ("position", gligen(), [box])}]])


def with_controlnet(tiny: Tiny, model: ModelPatcher) -> Tensor:
    control, _ = controlnet()
    hint = torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(15))
    positive, negative = ControlNetApplyAdvanced().apply_controlnet(
        tiny.target, tiny.negative, control, hint, 1.0, 0.0, 1.0
    )
    return tiny.sample(model, positive=positive, negative=negative)


# --- prompts, guiders, latents ---------------------------------------------------------------------------------------

LEFT = (torch.arange(8) < 3).float().expand(1, 8, 8)


def prompts(change: Callable[[list], list], which: str) -> Callable[[Tiny, ModelPatcher], Tensor]:
    return lambda tiny, model: tiny.sample(model, **{which: change(getattr(tiny, which_prompt(which)))})


def which_prompt(which: str) -> str:
    return {"positive": "target", "negative": "negative"}[which]


def masked(prompt: list, bounds: str = "default") -> list:
    return ConditioningSetMask().append(prompt, LEFT, bounds, 1.0)[0]


def regional(prompt: list) -> list:
    other = ConditioningSetMask().append(conditioning(6), 1 - LEFT, "default", 1.0)[0]
    return [*masked(prompt), *other]


def in_area(prompt: list) -> list:
    return ConditioningSetArea().append(prompt, 32, 32, 0, 0, 1.0)[0]


def in_the_first_half(prompt: list) -> list:
    return ConditioningSetTimestepRange().set_range(prompt, 0.0, 0.5)[0]


def both_halves(prompt: list) -> list:
    return [*in_the_first_half(prompt), *ConditioningSetTimestepRange().set_range(conditioning(6), 0.5, 1.0)[0]]


def guided(guider: Callable[[Tiny, ModelPatcher], CFGGuider]) -> Callable[[Tiny, ModelPatcher], Tensor]:
    def sample(tiny: Tiny, model: ModelPatcher) -> Tensor:
        sampler, zeros = comfy.samplers.sampler_object("euler"), torch.zeros_like(tiny.noise)
        return guider(tiny, model).sample(zeros, tiny.noise, sampler, tiny.sigmas, disable_pbar=True, seed=0)

    return sample


def dual_model(negative: Callable[[ModelPatcher], ModelPatcher]) -> Callable[[Tiny, ModelPatcher], Tensor]:
    return guided(
        lambda tiny, model: DualModelGuider.execute(
            model, tiny.target, 4.0, model_negative=negative(model), negative=tiny.negative
        ).result[0]
    )


dual_cfg = guided(
    lambda tiny, model: DualCFGGuider.execute(
        model, tiny.target, conditioning(6), tiny.negative, 4.0, 2.0, "regular"
    ).result[0]
)
perp_neg = guided(
    lambda tiny, model: PerpNegGuider.execute(model, tiny.target, tiny.negative, conditioning(6), 4.0, 1.0).result[0]
)
basic = guided(lambda tiny, model: BasicGuider.execute(model, tiny.target).result[0])


def three_images(tiny: Tiny, model: ModelPatcher) -> Tensor:
    return tiny.sample(model, noise=tiny.noise.repeat(3, 1, 1, 1))


def with_noise_mask(tiny: Tiny, model: ModelPatcher) -> Tensor:
    return tiny.sample(model, noise_mask=LEFT[:, None])


# --- the table -------------------------------------------------------------------------------------------------------

WITH, BEFORE = "the MODEL with it", "the MODEL before it"
GUIDES = Refused("carries another node's guidance", BEFORE)
WHOLE_LAYERS = Refused("remove token merging or HyperTile from this MODEL", "remove it, or the masks")
CACHES = Refused("leaves some out", BEFORE)

ROWS = (
    Row("FreeU", node(FreeU), inversion=WITH),
    Row("FreeU_V2", node(FreeU_V2), inversion=WITH),
    Row(
        "HyperTile",
        lambda model: HyperTile.execute(model, 32, 1, 0, False)[0],
        inversion=WITH,
        refused={"with masks": WHOLE_LAYERS},
    ),
    Row(
        "TomePatchModel",
        node(TomePatchModel),
        inversion=WITH,
        store="its random draws differ",
        refused={"with masks": WHOLE_LAYERS},
    ),
    Row(
        "PatchModelAddDownscale (Kohya Deep Shrink)",
        node(PatchModelAddDownscale, block_number=1),
        inversion=WITH,
        store=Refused("edit this MODEL without an attention store", "edit without one"),
    ),
    Row("LoraLoader, LoraLoaderModelOnly", lora, inversion=WITH),
    Row("HypernetworkLoader", hypernetwork_of_the_tiny_model, inversion=WITH),
    Row("ModelMergeSimple", merged, inversion=WITH, first=True),
    Row("UNetSelfAttentionMultiply", node(UNetSelfAttentionMultiply, q=1.5, out=0.8), inversion=WITH),
    Row("UNetCrossAttentionMultiply", node(UNetCrossAttentionMultiply, q=1.5, out=0.8), inversion=WITH),
    Row(
        "ModelSamplingDiscrete (v_prediction, zsnr)",
        lambda model: ModelSamplingDiscrete().patch(model, "v_prediction", True)[0],
        inversion=WITH,
        first=True,
    ),
    Row(
        "ModelSamplingContinuousEDM (eps)",
        lambda model: ModelSamplingContinuousEDM().patch(model, "eps", 20.0, 0.03)[0],
        inversion=WITH,
        first=True,
    ),
    Row("PerturbedAttentionGuidance", node(PerturbedAttentionGuidance), inversion=GUIDES),
    Row("Self-Attention Guidance", node(SelfAttentionGuidance), inversion=GUIDES),
    Row("Normalized Attention Guidance", node(NAGuidance), inversion=BEFORE),
    Row("SkipLayerGuidanceDiT", node(SkipLayerGuidanceDiT), inversion=GUIDES, acts=False),
    Row("SkipLayerGuidanceDiTSimple", node(SkipLayerGuidanceDiTSimple), inversion=GUIDES, acts=False),
    Row("RescaleCFG", lambda model: RescaleCFG().patch(model, 0.7)[0], inversion=GUIDES),
    Row("RenormCFG", node(RenormCFG), inversion=GUIDES),
    Row("CFGZeroStar", node(CFGZeroStar), inversion=GUIDES),
    Row("CFGNorm", node(CFGNorm), inversion=GUIDES),
    Row("CFG Override", node(CFGOverride, cfg=2.0), inversion=GUIDES),
    Row("Adaptive Projected Guidance", node(APG), inversion=GUIDES),
    Row("Tangential Damping CFG", node(TCFG), inversion=GUIDES),
    Row("FreSca", node(FreSca, freq_cutoff=2), inversion=GUIDES),
    Row("Positive-Biased Guidance", node(Mahiro), inversion=GUIDES),
    Row("Epsilon Scaling", node(EpsilonScaling, scaling_factor=1.05), inversion=GUIDES),
    Row("TSR - Temporal Score Rescaling", node(TemporalScoreRescaling), inversion=GUIDES),
    Row("Perp-Neg", lambda model: PerpNeg.execute(model, conditioning(6), 1.0).result[0], inversion=GUIDES),
    Row("TorchCompileModel", compiled, inversion=BEFORE, acts=False),
    Row("EasyCache", node(EasyCacheNode, start_percent=0.0, end_percent=1.0, reuse_threshold=3.0), inversion=CACHES),
    Row("LazyCache", node(LazyCacheNode, start_percent=0.0, end_percent=1.0, reuse_threshold=3.0), inversion=CACHES),
    Row(
        "Context Windows (Manual)",
        node(ContextWindowsManualNode, context_length=2, context_overlap=0),
        three_images,
        inversion=BEFORE,
        refused={
            "": Refused("called on 2 of 3 images: remove context windows", "remove it, or make the window longer")
        },
    ),
    Row("Apply ControlNet", sample=with_controlnet),
    Row("GLIGENTextBoxApply", sample=with_gligen),
    Row("Conditioning (Combine), negative", sample=prompts(lambda prompt: prompt + conditioning(6), "negative")),
    Row(
        "Conditioning (Combine), target",
        sample=prompts(lambda prompt: prompt + conditioning(6), "positive"),
        refused={"": Refused("has 2 positive conditionings", "connect one prompt")},
    ),
    Row("Conditioning (Set Mask), negative", sample=prompts(regional, "negative")),
    Row(
        "Conditioning (Set Mask), mask bounds",
        sample=prompts(lambda prompt: masked(prompt, "mask bounds"), "negative"),
        refused={"": Refused("The negative prompt is limited to an area", "set set_cond_area to default")},
    ),
    Row(
        "Conditioning (Set Mask), target",
        sample=prompts(masked, "positive"),
        refused={"": Refused("The target prompt has a mask", "remove it, and use Local Blend")},
    ),
    Row(
        "Conditioning (Set Area)",
        sample=prompts(in_area, "negative"),
        refused={"": Refused("The negative prompt is limited to an area", "remove it")},
    ),
    Row("ConditioningSetTimestepRange, negative", sample=prompts(both_halves, "negative")),
    Row(
        "ConditioningSetTimestepRange, target",
        sample=prompts(in_the_first_half, "positive"),
        refused={"": Refused("The target prompt is limited to a part of the run", "remove it")},
    ),
    Row("Basic Guider", sample=basic),
    Row("Perp-Neg Guider", sample=perp_neg),
    Row("Dual CFG Guider", sample=dual_cfg),
    Row("Dual Model CFG Guider, one checkpoint", sample=dual_model(lambda model: model), acts=False),
    Row(
        "Dual Model CFG Guider, two checkpoints",
        sample=dual_model(lambda model: tiny_model(seed=9)),
        refused={
            kind: Refused("on another checkpoint than the MODEL to edit", "connect one checkpoint to both")
            for kind in ("pnp", "masactrl", "with masks")
        },
    ),
    Row(
        "Differential Diffusion, Set Latent Noise Mask",
        node(DifferentialDiffusion),
        with_noise_mask,
        inversion=BEFORE,
        refused={"": Refused("The latent to edit carries a noise mask", "remove them, and use Local Blend")},
    ),
)


# --- the help --------------------------------------------------------------------------------------------------------


def told(refused: Refused | None, otherwise: str = "") -> str:
    return otherwise if refused is None else f"refused: {refused.advice}"


def help_section(page: str) -> str:
    """The part of an editor's help page that tells what it works with."""
    lines = [
        "## Works with",
        "",
        "Checked for each node by the pack's tests, before and behind this one: both do all their work, or a sentence",
        "says what to change. Store: what comes of it with an attention store. Invert: the MODEL to invert and record",
        "with.",
        "",
    ]
    for row in ROWS:
        usual, *special = EDITORS[page]
        edit = told(row.outcome(usual), "works where it comes first" if row.first else "works")
        for kind in special:
            if row.outcome(kind) != row.outcome(usual):
                edit += f"; {kind}: {told(row.outcome(kind), 'works')}"
        sentences = [edit]
        if row.outcome(usual) is None:
            sentences.append(f"Store: {row.store if isinstance(row.store, str) else told(row.store)}")
        if row.inversion is not None:
            inversion = row.inversion.advice if isinstance(row.inversion, Refused) else row.inversion
            sentences.append(f"Invert: {inversion}")
        lines.append(f"- {row.name}: {'. '.join(sentences)}.")
    return "\n".join([*lines, "", ""])
