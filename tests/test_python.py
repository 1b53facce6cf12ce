"""The Python API: the README's example runs as it stands, and gives what the nodes give."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import comfy.samplers
import numpy as np
import pytest
from comfy_extras.nodes_custom_sampler import SamplerCustom
from PIL import Image

import palimpsest
from palimpsest.nodes.inversion import DDIMInversion
from palimpsest.nodes.p2p import P2PAttentionController
from palimpsest.nodes.prompt import PromptEdit
from tiny import execute

README = Path(__file__).parents[1] / "README.md"


@pytest.mark.parametrize("name", palimpsest.API)
def test_every_name_is_there(name: str) -> None:
    assert getattr(palimpsest, name) is not None
    assert name in README.read_text(encoding="utf-8")


def test_other_names_are_not() -> None:
    with pytest.raises(AttributeError, match="no attribute 'NODE_CLASS_MAPPINGS'"):
        _ = palimpsest.NODE_CLASS_MAPPINGS


def test_the_example_gives_the_nodes_picture(demo: tuple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    (tmp_path / "edit.py").write_text(code, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    names = runpy.run_path("edit.py")

    model, clip, vae = demo
    source, target, edit, _ = execute(
        PromptEdit, clip=clip, source_prompt=names["SOURCE"], target_prompt=names["TARGET"]
    )
    image = {"samples": vae.encode(names["image"])}
    trajectory, noise, sigmas = execute(DDIMInversion, model=model, source=source, image=image, steps=20)
    inputs = {"model": model, "trajectory": trajectory, "prompt_edit": edit, "preset": "paper"}
    (edited,) = execute(P2PAttentionController, **inputs)
    euler = comfy.samplers.sampler_object("euler")
    latent = SamplerCustom.execute(edited, False, 0, 4.0, target, names["negative"], euler, sigmas, noise).result[0]
    picture = vae.decode(latent["samples"])[0].numpy()

    saved = np.asarray(Image.open("edited.png"))
    assert np.array_equal(saved, (picture.clip(0, 1) * 255).round().astype(np.uint8))
    assert np.abs(saved - names["image"][0].numpy() * 255).mean() > 2
