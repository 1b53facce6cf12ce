"""The node that learns an edit from a picture before and after it."""

from __future__ import annotations

import comfy.model_management
from comfy.clip_vision import ClipVisionModel
from comfy.sd import CLIP
from comfy_api.latest import io, ui
from torch import Tensor

from ..host.run.cost import metered
from ..inversion.visii import NODE, Direction, Settings, check_pair, visii
from .networks import check_halves, text_projection
from .telling import HIDDEN, tell
from .widgets import seed_of

DEFAULT = Settings()


class LearnEditFromPair(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PalimpsestLearnEditFromPair",
            display_name=NODE,
            category="Palimpsest/guide",
            description=(
                "Visii: shows an InstructPix2Pix one picture before and after an edit and learns, by gradients, the "
                "instruction that says it. Behind Instruct Guidance it does the same edit to another picture."
            ),
            search_aliases=[
                "visii",
                "visual prompting",
                "visual instruction inversion",
                "before after pair",
                "learn instruction",
                "image analogy",
            ],
            inputs=[
                io.Model.Input(
                    "model", tooltip="An InstructPix2Pix checkpoint, without Instruct Guidance, or the demo's."
                ),
                io.Image.Input("before", tooltip="The picture before the edit. Several make a batch of examples."),
                io.Image.Input("after", tooltip="The same picture after it, of the same size; as many as before."),
                io.Vae.Input("vae", tooltip="The VAE that belongs to the MODEL."),
                io.Conditioning.Input(
                    "start", tooltip="The instruction to begin with: an empty prompt, or what you would have said."
                ),
                io.Int.Input(
                    "updates",
                    default=DEFAULT.updates,
                    min=1,
                    max=10000,
                    tooltip="How often the instruction is corrected. More fit the pair closer and take longer.",
                ),
                io.Float.Input(
                    "learning_rate",
                    default=DEFAULT.learning_rate,
                    min=0.00001,
                    max=1.0,
                    step=0.00001,
                    tooltip="How far one update goes. Too far, and the pair's own things come over with the edit.",
                ),
                io.Int.Input(
                    "tokens",
                    default=DEFAULT.tokens,
                    min=1,
                    max=1000,
                    tooltip="How many words long the instruction is. More say more, and also what only the pair has.",
                ),
                seed_of("Of the noise, and of the order of the noise levels."),
                io.Boolean.Input(
                    "checkpointing",
                    default=True,
                    advanced=True,
                    tooltip="Runs every block twice to save memory. Off is faster, where memory is plenty.",
                ),
                io.Clip.Input(
                    "clip",
                    optional=True,
                    tooltip="The whole CLIP that the MODEL's text encoder is of, from Load CLIP; for SD1.5 ViT-L/14.",
                ),
                io.ClipVision.Input(
                    "clip_vision",
                    optional=True,
                    tooltip="The picture half of that CLIP. With both, what it sees change counts too.",
                ),
            ],
            hidden=HIDDEN,
            outputs=[
                io.Conditioning.Output(
                    "instruction", tooltip="What was learned: the positive of a sampler behind Instruct Guidance."
                )
            ],
        )

    @classmethod
    def execute(
        cls,
        model,
        before,
        after,
        vae,
        start,
        updates,
        learning_rate,
        tokens,
        seed,
        checkpointing,
        clip=None,
        clip_vision=None,
    ) -> io.NodeOutput:
        check_pair(before, after)
        model, cost = metered(model)
        direction = _direction(before, after, clip, clip_vision)
        latents = vae.encode(before[..., :3]), vae.encode(after[..., :3])
        learned = visii(
            model, *latents, start, Settings(updates, learning_rate, tokens, seed), checkpointing, direction
        )
        ((_, options),) = start
        embedding = learned.embedding.to(comfy.model_management.intermediate_device())
        losses = learned.losses
        told = f"{cost.told}; loss {losses[0]:.4f}, then {losses[learned.at]:.4f} after update {learned.at}."
        if learned.at == 0:
            told += " No update made it lower, so this is the start: lower learning_rate, or raise updates."
        return tell(cls, [[embedding, {**options}]], ui=ui.PreviewText(told))


def _direction(
    before: Tensor, after: Tensor, clip: CLIP | None, clip_vision: ClipVisionModel | None
) -> Direction | None:
    if clip is None and clip_vision is None:
        return None
    if clip is None or clip_vision is None:
        missing = "clip" if clip is None else "clip_vision"
        raise ValueError(f"{NODE} needs both halves of a CLIP, but {missing} is not connected: connect both, or none.")
    projection = text_projection(clip)
    check_halves(len(projection), clip_vision, NODE)
    seen = [clip_vision.encode_image(pictures[..., :3])["image_embeds"].mean(0) for pictures in (before, after)]
    return Direction(seen[1] - seen[0], projection)
