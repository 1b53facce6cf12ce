"""From two prompts to a MODEL that samples the edit: what Prompt Edit and P2P Attention Controller do."""

from __future__ import annotations

import math

from comfy.model_patcher import ModelPatcher
from comfy.sd import CLIP

from ..host.branch.source import attach
from ..host.files.conditioning import copied
from ..host.files.store import AttentionStore
from ..host.files.trajectory import Trajectory
from ..host.run.model import is_unet
from ..host.run.refusals import check_worded
from ..host.run.tokens import prompt_words
from .alignment import PromptEdit, resolve, same_prompt
from .p2p import NEVER, PRESETS, PromptToPrompt, Settings, Window
from .phrases import gains, windows


def rewrite(
    clip: CLIP, source_prompt: str, target_prompt: str, alignment: str = "auto"
) -> tuple[list, list, PromptEdit]:
    """The conditionings of the source and of the target prompt, and which words became which.

    alignment: "swap", "refine" or "auto". Raises ValueError where there is nothing to edit, or words do not fit it.
    """
    if clip is None:
        raise ValueError("Prompt Edit got no CLIP: the checkpoint holds no text encoder; load one with Load CLIP.")
    source, target = prompt_words(clip, source_prompt, "source"), prompt_words(clip, target_prompt, "target")
    if not source.texts:
        raise ValueError("The source prompt is empty: type what the image shows in Prompt Edit.")
    alignment = resolve(source, target, alignment)
    conditionings = [
        clip.encode_from_tokens_scheduled(clip.tokenize(prompt)) for prompt in (source_prompt, target_prompt)
    ]
    (source_embedding, _), (target_embedding, options) = (copied(conditioning)[0] for conditioning in conditionings)
    edit = PromptEdit(
        source, (target,), (alignment,), (source_embedding, target_embedding), options.get("pooled_output")
    )
    return *conditionings, edit


def prompt_to_prompt(
    model: ModelPatcher,
    trajectory: Trajectory,
    edit: PromptEdit,
    settings: Settings = PRESETS["paper"],
    reweight: str = "",
    word_schedule: str = "",
    store: AttentionStore | None = None,
    value_replace: float = 0.5,
) -> ModelPatcher:
    """A clone of `model` whose samples are the edited image.

    value_replace: until where in the run words of both prompts read the source's own values, where it has such.
    reweight and word_schedule: lines of words and numbers, as the inputs of P2P Attention Controller. Raises ValueError
    where the trajectory is of another prompt or model, or names words that are not there.
    """
    check_worded(model, PromptToPrompt.node)
    if not same_prompt(trajectory.conditioning[0][0], edit.embeddings[0]):
        raise ValueError(
            "The trajectory was made with another source prompt than this Prompt Edit's: connect Prompt Edit's "
            "source output to the node that made the trajectory."
        )
    lengths = [words.length for words in edit.targets]
    if not is_unet(model) and len({*lengths, edit.embeddings[1].shape[1]}) > 1:
        raise ValueError(
            f"The targets of Batch Prompt Edits have {', '.join(map(str, lengths))} tokens, but a flow model takes "
            "prompts of one length in one run: edit them one by one."
        )
    carry = edit.carry(settings.alignment)
    gain = gains(reweight, edit)
    if not reweight.strip():
        gain = gain + (settings.new_words - 1) * carry.own
    cross = windows(word_schedule, edit, settings.cross.start, settings.cross.end)
    self_positions = settings.self_max_side**2 if is_unet(model) else math.inf  # all layers are of one size
    shared, values = None, NEVER
    if trajectory.values is not None:
        shared, values = edit.shared(), Window(0.0, value_replace)
    rule = PromptToPrompt(carry, edit.embeddings[1], gain, cross, settings.self_, self_positions, shared, values)
    return attach(model, trajectory, rule, store)
