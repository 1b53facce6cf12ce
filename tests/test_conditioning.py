"""Conditionings as files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from palimpsest.inversion.null_text import Settings, null_text
from palimpsest.nodes.conditioning import LoadConditioning, SaveConditioning
from test_trajectory import folders  # noqa: F401 (a fixture)
from tiny import Tiny, conditioning


def save_and_load(written: list) -> list:
    (kept,) = SaveConditioning.execute(written, "folder/prompt").result
    assert kept is written
    (read,) = LoadConditioning.execute("folder/prompt_00001_.safetensors [output]").result
    return read


def same(one: list, other: list) -> bool:
    def equal(a: object, b: object) -> bool:
        return torch.equal(a, b) and a.dtype == b.dtype if isinstance(a, torch.Tensor) else a == b

    pairs = [({"": e, **o}, {"": f, **p}) for (e, o), (f, p) in zip(one, other, strict=True)]
    return all(a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a) for a, b in pairs)


@pytest.mark.usefixtures("folders")
def test_entries_of_all_kinds_come_back() -> None:
    shared = torch.randn(1, 8)
    options = {"pooled_output": shared, "width": 64, "strength": 0.5, "prompt_type": "x", "flag": True}
    written = [
        [conditioning(1, batch=2)[0][0], options],
        [conditioning(2, tokens=154)[0][0].half(), {"pooled_output": shared, "start_percent": 0.25}],
    ]
    assert same(save_and_load(written), written)


@pytest.mark.usefixtures("folders")
def test_null_text_samples_the_same_bits_from_a_file(tiny: Tiny) -> None:
    negative, _ = null_text(tiny.model, tiny.trajectory, tiny.negative, Settings(inner_steps=1), True)
    loaded = save_and_load(negative)
    assert same(loaded, negative)
    fresh, again = (tiny.sample(tiny.model, tiny.source, each, cfg=7.5) for each in (negative, loaded))
    assert torch.equal(fresh, again)


@pytest.mark.usefixtures("folders")
def test_what_a_file_cannot_hold_is_refused(tmp_path: Path) -> None:
    for name, value in (("control", object()), ("area", (8, 8, 0, 0))):
        with pytest.raises(ValueError, match=f"The conditioning holds '{name}', which a file cannot"):
            SaveConditioning.execute([[torch.zeros(1, 77, 8), {name: value}]], "prompt")
    assert not list(tmp_path.rglob("*.safetensors"))
    with pytest.raises(ValueError, match="Save Conditioning may not write to '../prompt'"):
        SaveConditioning.execute(conditioning(1), "../prompt")


@pytest.mark.usefixtures("folders")
def test_other_files_are_refused_in_a_sentence(tiny: Tiny, tmp_path: Path) -> None:
    folder = tmp_path / "input"
    tiny.trajectory.save(folder / "trajectory.safetensors")
    (folder / "cut.safetensors").write_bytes(b"\x08\0\0\0")
    mark = {"format": "palimpsest.conditioning/1", "conditioning": "[{}]"}
    save_file({"conditioning.0.pooled_output": torch.zeros(1)}, folder / "damaged.safetensors", mark)
    for name, sentence in (
        ("trajectory", "is no conditioning: choose a file written by Save Conditioning"),
        ("cut", "is not a readable safetensors file"),
        ("damaged", "is a damaged conditioning: 'embedding' is missing or wrong"),
    ):
        with pytest.raises(ValueError, match=sentence):
            LoadConditioning.execute(f"{name}.safetensors")
    assert LoadConditioning.validate_inputs("damaged.safetensors") is True
    assert "may not read" in LoadConditioning.validate_inputs("../cut.safetensors")
    assert "Load Conditioning finds no file" in LoadConditioning.validate_inputs("none.safetensors")
