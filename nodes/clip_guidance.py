"""The node that guides sampling by what a CLIP sees in the picture."""

from __future__ import annotations

import torch
from comfy.clip_vision import ClipVisionModel
from comfy.model_patcher import ModelPatcher
from comfy.sd import CLIP, VAE
from comfy_api.latest import io
from torch import Tensor

from ..guidance.clip_guidance import ClipGuidance, direction
from ..host.branch.judged import NODE, Judge, NoisedClip, Pictures, attach_judge
from . import sockets
from .networks import check_halves, text_embedding
from .widgets import check_window, fraction


class ClipGuidanceNode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PalimpsestCLIPGuidance",
            display_name=NODE,
            category="Palimpsest/guide",
            description=(
                "GLIDE's CLIP guidance: each step moves the picture to where a CLIP sees more of the prompt in it, by "
                "a gradient. With Load Demo CLIP the CLIP looks through the noise; an ordinary one looks at the "
                "picture as far as it is known. For SD1.x, SD2.x and SDXL, edited or not, with any sampler."
            ),
            search_aliases=[
                "glide",
                "clip guided diffusion",
                "classifier guidance",
                "clip gradient",
                "gradient guidance",
            ],
            inputs=[
                io.Model.Input("model", tooltip="The model to sample with, edited or not."),
                io.String.Input(
                    "prompt",
                    default="a photo of a dog on a meadow",
                    tooltip="What the CLIP is to see. It may say something else than the prompt of the sampler.",
                ),
                io.Float.Input(
                    "scale",
                    default=5.0,
                    min=0.0,
                    max=1000.0,
                    step=0.1,
                    tooltip=(
                        "How strongly the picture follows the CLIP. Too high spoils it. GLIDE: 3; the demo CLIP: 5; "
                        "0 is off."
                    ),
                ),
                fraction("start", 0.0, "From where in the run on it is guided."),
                fraction("end", 1.0, "Until where in the run."),
                io.String.Input(
                    "instead_of",
                    default="",
                    tooltip=(
                        "What the CLIP sees now and is to see no more: the source prompt, for an edit. Only where the "
                        "two prompts differ is the picture then guided. Empty is GLIDE."
                    ),
                ),
                sockets.NoisedClip.Input(
                    "noised_clip", optional=True, tooltip="A CLIP that sees through noise: Load Demo CLIP."
                ),
                io.Clip.Input(
                    "clip", optional=True, tooltip="Or a whole ordinary CLIP, from Load CLIP, that reads the prompt."
                ),
                io.ClipVision.Input(
                    "clip_vision", optional=True, tooltip="The picture half of the same CLIP, from Load CLIP Vision."
                ),
                io.Vae.Input("vae", optional=True, tooltip="The model's VAE, by which an ordinary CLIP sees pictures."),
                io.Boolean.Input(
                    "checkpointing",
                    default=True,
                    optional=True,
                    advanced=True,
                    tooltip=(
                        "Compute each layer of an ordinary CLIP and of vae twice instead of keeping it: slower, for "
                        "less memory."
                    ),
                ),
            ],
            outputs=[io.Model.Output("model", tooltip="The model for any sampler.")],
        )

    @classmethod
    def execute(
        cls,
        model,
        prompt,
        scale,
        start,
        end,
        instead_of,
        noised_clip=None,
        clip=None,
        clip_vision=None,
        vae=None,
        checkpointing=True,
    ) -> io.NodeOutput:
        if scale == 0:
            return io.NodeOutput(model)
        check_window(NODE, start, end)
        prompts = [prompt, instead_of] if instead_of.strip() else [prompt]
        parts = {"clip": clip, "clip_vision": clip_vision, "vae": vae}
        judge, embeddings = _judge(prompts, noised_clip, parts, checkpointing)
        text = direction(*embeddings.split(1))
        return io.NodeOutput(attach_judge(model, ClipGuidance(scale, start, end, text), judge))


def _judge(
    prompts: list[str],
    noised_clip: ModelPatcher | None,
    parts: dict[str, CLIP | ClipVisionModel | VAE | None],
    checkpointing: bool,
) -> tuple[Judge, Tensor]:
    """Who looks, and the prompts' embeddings [b, n]."""
    missing = [name for name, part in parts.items() if part is None]
    if noised_clip is not None:
        if len(missing) < len(parts):
            raise ValueError(f"{NODE} looks by one CLIP: disconnect noised_clip, or clip, clip_vision and vae.")
        return NoisedClip(noised_clip), noised_clip.model.text(prompts)
    if missing:
        raise ValueError(
            f"{NODE} lacks {', '.join(missing)}: connect noised_clip from Load Demo CLIP, or all of clip, clip_vision "
            "and vae."
        )
    clip, clip_vision, vae = parts.values()
    text = torch.cat([text_embedding(clip, prompt) for prompt in prompts])
    check_halves(text.shape[1], clip_vision, NODE)
    return Pictures(vae, clip_vision, checkpointing), text
