"""What a node hands out is its own: no host node that writes to it can change what a node of the pack keeps."""

from __future__ import annotations

from dataclasses import is_dataclass
from pathlib import Path

import comfy.samplers
import comfy.sd
import folder_paths
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from comfy.sd1_clip import SD1ClipModel, SD1Tokenizer
from comfy.supported_models_base import ClipTarget
from torch import Tensor

from palimpsest.demo.model import TEXT
from palimpsest.host.branch.source import attach
from palimpsest.host.run.sampler import OwnSampler
from palimpsest.nodes.extension import NODES
from palimpsest.nodes.inversion import DDIMInversion, RecordTrajectory
from palimpsest.nodes.maps import ALL
from palimpsest.nodes.null_text import EMPTY, SOURCE
from test_inject import masactrl
from tiny import WIDTH, Tiny, execute

PLAIN = {"LATENT", "SIGMAS", "CONDITIONING", "IMAGE", "MASK"}
KEPT = {"TRAJECTORY", "ATTENTION_STORE", "PROMPT_EDIT", "EDIT_DIRECTION", "H_DIRECTION", "SAMPLER", "MODEL"}


def storages(value: object) -> set[int]:
    """Where in memory the tensors within an output are."""
    if isinstance(value, Tensor):
        return {value.untyped_storage().data_ptr()}
    if isinstance(value, ModelPatcher):
        value = value.model_options["transformer_options"]
    elif is_dataclass(value) or isinstance(value, OwnSampler):
        value = vars(value)
    if isinstance(value, dict):
        value = [*value.values()]
    return set().union(*map(storages, value)) if isinstance(value, list | tuple) else set()


class Workflow:
    """Executes nodes, and knows what they kept, what they were given, and what they handed out."""

    def __init__(self) -> None:
        self.kept: dict[int, str] = {}
        self.plain: dict[int, str] = {}
        self.alive: list = []  # memory that is freed is used again
        self.executed: set[str] = set()

    def __call__(self, name: str, **inputs) -> tuple:
        node = next(node for node in NODES if node.GET_SCHEMA().node_id == f"Palimpsest{name}")
        result, schema = execute(node, **inputs), node.GET_SCHEMA()
        values = [(slot, inputs[slot.id]) for slot in schema.inputs if slot.id in inputs]
        for slot, value in [*values, *zip(schema.outputs, result, strict=True)]:
            kind = slot.get_io_type()
            group = self.plain if kind in PLAIN else self.kept if kind in KEPT else {}
            group |= dict.fromkeys(storages(value), f"{slot.id} of {schema.display_name}")
        self.alive.append((inputs, result))
        self.executed.add(schema.node_id)
        return result


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("input", "output"):
        (tmp_path / name).mkdir()
        monkeypatch.setattr(folder_paths, f"{name}_directory", str(tmp_path / name))


def narrow_clip() -> comfy.sd.CLIP:
    """The demo model's text encoder with random weights, as wide as the tiny UNet takes."""
    options = {"clip_l_model_config": TEXT | {"hidden_size": WIDTH}, "dtype": torch.float32}
    clip = comfy.sd.CLIP(ClipTarget(SD1Tokenizer, SD1ClipModel), model_options=options)
    generator = torch.Generator().manual_seed(0)
    for parameter in clip.cond_stage_model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    return clip


def test_no_output_shares_memory_with_what_is_kept(tiny: Tiny, folders: None) -> None:
    run, model, clip, image = Workflow(), tiny.model, narrow_clip(), {"samples": tiny.image}
    source, target, edit, _ = run("PromptEdit", clip=clip)
    *_, other, _ = run("PromptEdit", clip=clip, target_prompt="a photo of a sheep on a meadow")
    run("BatchPromptEdits", prompt_edits={"prompt_edit_1": edit, "prompt_edit_2": other})
    assert source[0][1]["pooled_output"] is not None
    trajectory, noise, sigmas = run("DDIMInversion", model=model, source=source, image=image, steps=2)
    run("DDIMInversion", model=model, source=source, image=image, steps=2, schedule="karras")
    run("EditFriendlyInversion", model=model, source=source, image=image, steps=2, cfg=1.0, skip=0.0)
    run("VirtualInversion", model=model, source=source, image={**image, "noise_mask": torch.ones(1, 1, 8, 8)})
    run("FlowEdit", model=model, source=source, image={**image, "noise_mask": torch.ones(1, 1, 8, 8)})
    run("FlowEdit", model=model, image=trajectory)
    run("EDICTInversion", model=model, source=source, image=image, steps=2, cfg=1.0, strength=1.0)
    run("OBELMInversion", model=model, source=source, image=image, steps=2, strength=1.0)
    euler = comfy.samplers.sampler_object("euler")
    made = {"positive": source, "negative": tiny.negative, "sampler": euler, "sigmas": sigmas, "latent_image": image}
    run("RecordTrajectory", model=model, **made)
    for start in (EMPTY, SOURCE):
        options = {"start_from": start, "inner_steps": 1}
        negative, *_ = run("NullTextInversion", model=model, trajectory=trajectory, empty=source, **options)
    run("ValueInversion", model=model, trajectory=trajectory, negative=source, inner_steps=1, map_side=8)
    run("SaveConditioning", conditioning=negative, filename_prefix="a")
    run("LoadConditioning", file="a_00001_.safetensors [output]")
    run("SaveTrajectory", trajectory=trajectory, filename_prefix="b")
    run("LoadTrajectory", model=model, file="b_00001_.safetensors [output]")
    store, *_ = run("RecordAttention", model=model, trajectory=trajectory, feature_replace=1.0, dtype="fp32")
    run("SaveAttentionStore", attention_store=store, filename_prefix="c")
    run("LoadAttentionStore", model=model, file="c_00001_.safetensors [output]")
    run("AttentionMaps", attention_store=store, prompt_edit=edit, layers=ALL)
    run("FeatureViewer", model=model, attention_store=store)
    direction, *_ = run("EditDirection", clip=clip)
    run("CombineEditDirections", direction_a=direction)
    run("ApplyEditDirection", conditioning=source, edit_direction=direction)
    run("SaveEditDirection", edit_direction=direction, filename_prefix="d")
    run("LoadEditDirection", file="d_00001_.safetensors [output]")
    short = {"latent_image": image, "images": 1, "steps": 2}
    (moves,) = run("HSpaceDirectionFromPrompts", model=model, clip=clip, **short)
    run("HSpaceDirectionFromTrajectories", model=model, source=trajectory, target=trajectory)
    run("ApplyHSpaceDirection", model=model, h_direction=moves)
    run("SaveHSpaceDirection", h_direction=moves, filename_prefix="e")
    run("LoadHSpaceDirection", file="e_00001_.safetensors [output]")
    mask = torch.ones(1, 8, 8)
    edited = {"model": model, "trajectory": trajectory}
    run("P2PAttentionController", **edited, prompt_edit=edit, attention_store=store)
    run("PnPFeatureInjector", **edited)
    run("MasaCtrl", **edited, source_mask=mask, target_mask=mask)
    run("LocalBlend", **edited, prompt_edit=edit, mask=mask)
    run("LocalBlendMask", **edited, edited=noise)
    run("DifferenceMask", model=model, source=source, image=image, target=tiny.target, noises=2)
    run("CrossAttentionGuidance", **edited)
    run("NegativePromptGuidance", **edited, empty=source)
    run("ProximalGuidance", **edited)
    run("UniEditGuidance", model=model)
    run("ImagePull", model=model, image=image)
    run("ConceptGuidance", model=model, clip=clip)
    run("NegativePromptGuider", model=model, positive=target, negative=source, empty=source)
    run("LoadDemoFlowModel")
    unet, clip, vae = run("LoadDemoModel")
    scene, *_ = run("DemoScene")
    source, target, *_ = run("PromptEdit", clip=clip)
    instructed, *_ = run("LoadDemoInstructModel")
    run("InstructGuidance", model=instructed, image=scene, vae=vae)
    run("LearnEditFromPair", model=instructed, before=scene, after=scene, vae=vae, start=source, updates=1)
    latent, pair = (
        {"samples": torch.zeros(1, 16, 16, 16)},
        "a photo of a cat in a room | a photo of a dog in a room | x",
    )
    run("MakeEditPairs", model=unet, clip=clip, vae=vae, latent=latent, captions=pair, samples=1, steps=1)
    run("LoadDemoInpaintModel")
    run("LoadDemoControlNet")
    (seen,) = run("LoadDemoCLIP")
    run("CLIPGuidance", model=unet, noised_clip=seen)
    found, *_ = run("DDIMInversion", model=unet, source=source, image=scene, vae=vae, steps=1)
    run("EditSampler", model=unet, trajectory=found, positive=target, vae=vae)
    run("EditMetrics", source=scene, edited=scene)
    assert run.executed == {node.GET_SCHEMA().node_id for node in NODES}
    assert len(run.kept) > 20
    assert [(run.plain[at], run.kept[at]) for at in run.plain.keys() & run.kept.keys()] == []


@pytest.mark.parametrize("edited", [True, False])
def test_uni_pc_changes_no_trajectory(tiny: Tiny, edited: bool) -> None:
    """It writes 0.001 over the 0 at the end of the schedule that it is given."""
    inputs = {"model": tiny.model, "source": tiny.source, "image": {"samples": tiny.image}, "steps": 4}
    trajectory, noise, sigmas = execute(DDIMInversion, **inputs, schedule="karras")
    run = {"noise": noise["samples"], "sigmas": sigmas}

    def edit(sampler: str) -> Tensor:
        return tiny.sample(attach(tiny.model, trajectory, masactrl(tiny)), sampler=sampler, **run)

    before = edit("euler")
    assert not torch.equal(edit("uni_pc") if edited else tiny.sample(tiny.model, sampler="uni_pc", **run), before)
    assert trajectory.sigmas[-1] == 0
    if edited:  # the host itself keeps what uni_pc wrote to the sigmas of a plain run
        assert torch.equal(edit("euler"), before)


def test_uni_pc_is_recorded_with_the_schedule_that_it_was_given(tiny: Tiny) -> None:
    inputs = {"model": tiny.model, "source": tiny.source, "image": {"samples": tiny.image}, "steps": 4}
    _, noise, sigmas = execute(DDIMInversion, **inputs, schedule="karras")
    given = sigmas.clone()
    trajectory, *_ = execute(
        RecordTrajectory,
        model=tiny.model,
        add_noise=False,
        positive=tiny.source,
        negative=tiny.negative,
        sampler=comfy.samplers.sampler_object("uni_pc"),
        sigmas=sigmas,
        latent_image=noise,
    )
    assert torch.equal(sigmas, given)
    assert torch.equal(trajectory.sigmas, given)
