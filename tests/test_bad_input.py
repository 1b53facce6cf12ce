"""Bad input through the real server: one clear sentence each, no picture, and the server goes on."""

from __future__ import annotations

import io
from collections.abc import Callable

import pytest
from PIL import Image

from example_workflows import api_form
from host_server import HostServer, Prompt

STEPS = 4
SCENE, PROMPTS, INVERSION, CONTROLLER, SAMPLER, DECODER = "2", "4", "5", "6", "8", "9"


def changed(node: str, **inputs: object) -> Callable[[Prompt], None]:
    return lambda prompt: prompt[node]["inputs"].update(inputs)


def without(node: str, name: str) -> Callable[[Prompt], None]:
    return lambda prompt: prompt[node]["inputs"].pop(name)


def other_noise(prompt: Prompt) -> None:
    """The sampler starts from the noise of another image than the trajectory's."""
    prompt["30"] = {**prompt[SCENE], "inputs": {**prompt[SCENE]["inputs"], "seed": 99}}
    prompt["32"] = {**prompt[INVERSION], "inputs": {**prompt[INVERSION]["inputs"], "image": ["30", 0]}}
    prompt[SAMPLER]["inputs"]["latent_image"] = ["32", 1]


def foreign_latent(prompt: Prompt) -> None:
    """The demo's VAE gets what an SD1.5 model would draw."""
    prompt["33"] = {
        "class_type": "EmptyLatentImage",
        "inputs": {"width": 512, "height": 512, "batch_size": 1},
        "_meta": {"title": "Empty Latent Image"},
    }
    prompt[DECODER]["inputs"]["samples"] = ["33", 0]


def damaged_file(prompt: Prompt) -> None:
    prompt["40"] = {
        "class_type": "PalimpsestLoadTrajectory",
        "inputs": {"model": ["1", 0], "file": "damaged.safetensors [output]"},
        "_meta": {"title": "Load Trajectory"},
    }
    prompt[CONTROLLER]["inputs"]["trajectory"] = ["40", 0]


CASES: dict[str, tuple[Callable[[Prompt], object], str]] = {
    "empty prompt": (changed(PROMPTS, source_prompt=" "), "The source prompt is empty"),
    "reweight": (changed(CONTROLLER, reweight="moon:2"), "reweight of P2P Attention Controller names 'moon'"),
    "no number": (changed(CONTROLLER, reweight="dog:big"), "has 'dog:big', where 'big' is no number"),
    "no colon": (changed(CONTROLLER, reweight="dog"), "has 'dog' without a colon"),
    "schedule": (changed(CONTROLLER, word_schedule="dog:1.5"), "a schedule is one end or start-end"),
    "steps": (changed(SAMPLER, steps=STEPS + 1), f"which the trajectory of {STEPS} steps lacks"),
    "sampler": (changed(SAMPLER, sampler_name="euler_ancestral"), "'euler_ancestral' adds fresh noise"),
    "added noise": (changed(SAMPLER, add_noise="enable"), "does not start from the trajectory's own noise"),
    "other noise": (other_noise, "does not start from the trajectory's own noise"),
    "missing link": (without(CONTROLLER, "trajectory"), "Required input is missing, trajectory"),
    "wrong link": (changed(CONTROLLER, trajectory=[SCENE, 0]), "Return type mismatch"),
    "guidance": (changed(INVERSION, cfg=3.0), "DDIM Inversion at cfg 3 needs the negative input"),
    "scene": (
        changed(SCENE, caption="a photo of a red banana in a room"),
        "has 'banana' where it needs one of: cat, dog",
    ),
    "other VAE": (foreign_latent, "VAE decodes latents of 16 channels and 16 x 16, not of 4 channels and"),
    "damaged file": (damaged_file, "'damaged.safetensors' is not a readable safetensors file"),
}


def small_edit() -> Prompt:
    """edit-real-image with KSampler Advanced, which can be wired wrongly, in place of Edit Sampler."""
    prompt = api_form("edit-real-image", STEPS)
    edit = prompt[SAMPLER]["inputs"]
    linked = {name: edit[name] for name in ("model", "positive", "negative", "cfg")}
    euler = {"sampler_name": "euler", "scheduler": "ddim_uniform"}
    steps = {"steps": STEPS, "start_at_step": 0, "end_at_step": STEPS}
    noise = {"add_noise": "disable", "noise_seed": 0, "return_with_leftover_noise": "disable"}
    for node in prompt.values():
        decoded = {name: [DECODER, 0] for name, value in node["inputs"].items() if value == [SAMPLER, 1]}
        node["inputs"].update(decoded)
    prompt[SAMPLER] = {
        "class_type": "KSamplerAdvanced",
        "inputs": {**linked, **euler, **steps, **noise, "latent_image": [INVERSION, 1]},
        "_meta": {"title": "KSampler (Advanced)"},
    }
    prompt[DECODER] = {
        "class_type": "VAEDecode",
        "inputs": {"samples": [SAMPLER, 0], "vae": edit["vae"]},
        "_meta": {"title": "VAE Decode"},
    }
    return prompt


@pytest.mark.parametrize("case", CASES)
def test_one_clear_sentence(server: HostServer, case: str) -> None:
    (server.folder / "output" / "damaged.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}")
    prompt = small_edit()
    spoil, sentence = CASES[case]
    spoil(prompt)
    run = server.run(prompt)
    (error,) = run.errors
    assert sentence in error
    assert "\n" not in error
    assert "Traceback" not in error
    assert not run.images()
    assert not server.run(small_edit()).errors


def test_a_saved_trajectory_edits_as_the_fresh_one(server: HostServer) -> None:
    prompt = small_edit()
    prompt["50"] = {
        "class_type": "PalimpsestSaveTrajectory",
        "inputs": {"trajectory": [INVERSION, 0], "filename_prefix": "kept/image"},
        "_meta": {"title": "Save Trajectory"},
    }
    fresh = server.run(prompt)
    assert not fresh.errors
    loaded = small_edit()
    loaded[INVERSION] = {
        "class_type": "PalimpsestLoadTrajectory",
        "inputs": {"model": ["1", 0], "file": "kept/image_00001_.safetensors [output]"},
        "_meta": {"title": "Load Trajectory"},
    }
    loaded[SAMPLER]["inputs"]["latent_image"] = [INVERSION, 1]
    again = server.run(loaded)
    assert not again.errors
    first, second = (server.view(run.images()[0]) for run in (fresh, again))
    assert pixels(first) == pixels(second)


def pixels(png: bytes) -> bytes:
    return Image.open(io.BytesIO(png)).tobytes()
