"""Trajectories as objects and as files."""

from __future__ import annotations

from pathlib import Path

import folder_paths
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from palimpsest.host.files.trajectory import Trajectory
from palimpsest.nodes.trajectory import LoadTrajectory, SaveTrajectory
from tiny import Tiny, tiny_model


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("input", "output"):
        (tmp_path / name).mkdir()
        monkeypatch.setattr(folder_paths, f"{name}_directory", str(tmp_path / name))
    return tmp_path


def same(one: Trajectory, other: Trajectory) -> bool:
    tensors = torch.equal(one.states, other.states) and torch.equal(one.sigmas, other.sigmas)
    (embedding, options), (other_embedding, other_options) = one.conditioning[0], other.conditioning[0]
    plain = {k: v for k, v in options.items() if not isinstance(v, torch.Tensor)}
    other_plain = {k: v for k, v in other_options.items() if not isinstance(v, torch.Tensor)}
    return (
        tensors
        and torch.equal(embedding, other_embedding)
        and plain == other_plain
        and one.model[:2] == other.model[:2]
    )


def test_save_and_load_through_the_nodes(tiny: Tiny, folders: Path) -> None:
    options = {"pooled_output": torch.randn(1, 8), "width": 64, "hooks": None}
    trajectory = tiny.trajectory._replace(conditioning=[[tiny.source[0][0], options]])
    SaveTrajectory.execute(trajectory, "folder/image")
    loaded, noise, sigmas = LoadTrajectory.execute(tiny.model, "folder/image_00001_.safetensors [output]").result
    assert same(loaded, trajectory._replace(conditioning=[[tiny.source[0][0], {"width": 64}]]))
    assert torch.equal(loaded.conditioning[0][1]["pooled_output"], options["pooled_output"])
    assert torch.equal(sigmas, tiny.sigmas)
    assert torch.equal(noise["samples"], tiny.noise)
    with pytest.raises(ValueError, match="made with another model"):
        LoadTrajectory.execute(tiny_model(seed=9), "folder/image_00001_.safetensors [output]")


def test_listed_files_load_and_others_are_refused(tiny: Tiny, folders: Path) -> None:
    tiny.trajectory.save(folders / "input" / "mine.safetensors")
    assert LoadTrajectory.define_schema().inputs[1].options == ["mine.safetensors"]
    assert LoadTrajectory.validate_inputs("mine.safetensors") is True
    (folders / "secret.safetensors").write_bytes(b"")
    for escape in ("../secret.safetensors", str(folders / "secret.safetensors"), "../secret.safetensors [output]"):
        assert "may not read" in LoadTrajectory.validate_inputs(escape)
    for escape in ("../image", str(folders / "image")):
        with pytest.raises(ValueError, match="may not write to"):
            SaveTrajectory.execute(tiny.trajectory, escape)
    assert "finds no file 'none.safetensors'" in LoadTrajectory.validate_inputs("none.safetensors")
    assert "may not read 'a zero'" in LoadTrajectory.validate_inputs("a\0zero")


@pytest.mark.parametrize(
    ("prefix", "sentence"),
    [
        ("x" * 300, r"Save Trajectory cannot write 'x{60}…' \(.*File name too long.*\): check filename_prefix"),
        (
            "x" * 300 + "/y",
            r"Save Trajectory cannot make the folder of 'x{60}…' \(File name too long\): choose another",
        ),
        ("/" + "y" * 3000, "Save Trajectory may not write to '/y{59}…': choose a name"),
        ("a\0zero", "Save Trajectory may not write to 'a zero': choose a name"),
    ],
)
def test_impossible_names_are_refused_in_a_sentence(tiny: Tiny, folders: Path, prefix: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        SaveTrajectory.execute(tiny.trajectory, prefix)
    assert not list(folders.rglob("*.*"))
    assert LoadTrajectory.validate_inputs("x" * 300) == (
        f"Load Trajectory finds no file '{'x' * 60}…': choose one from its list."
    )


def test_damaged_files_are_refused_in_a_sentence(tiny: Tiny, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    tiny.trajectory.save(path)
    whole, tensors = path.read_bytes(), {k: v.clone() for k, v in load_file(path).items()}
    with safe_open(path, "pt") as file:
        metadata = file.metadata()

    path.write_bytes(whole[:-100])
    with pytest.raises(ValueError, match=r"'x.safetensors' is not a readable safetensors file"):
        Trajectory.load(path)
    path.write_bytes(b"not a file")
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        Trajectory.load(path)
    save_file(tensors, path)
    with pytest.raises(ValueError, match="is no trajectory: choose a file written by Save Trajectory"):
        Trajectory.load(path)
    save_file({k: v for k, v in tensors.items() if k != "sigmas"}, path, metadata)
    with pytest.raises(ValueError, match="damaged trajectory: 'sigmas' is missing"):
        Trajectory.load(path)
    save_file(tensors | {"sigmas": tensors["sigmas"][:-1].clone()}, path, metadata)
    with pytest.raises(ValueError, match="states do not fit its sigmas"):
        Trajectory.load(path)
    save_file(tensors | {"sigmas": tensors["sigmas"].flip(0)}, path, metadata)
    with pytest.raises(ValueError, match="its sigmas do not fall"):
        Trajectory.load(path)
    save_file(tensors, path, metadata | {"conditioning": '["x"]'})
    with pytest.raises(ValueError, match="is a damaged trajectory"):
        Trajectory.load(path)
    save_file(tensors | {"states": tensors["states"] * torch.nan}, path, metadata)
    with pytest.raises(ValueError, match="NaN or infinite"):
        Trajectory.load(path)


def test_what_a_file_cannot_hold_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    trajectory = tiny.trajectory._replace(conditioning=[[tiny.source[0][0], {"control": object()}]])
    with pytest.raises(ValueError, match="holds 'control', which a file cannot"):
        trajectory.save(tmp_path / "x.safetensors")
    assert not list(tmp_path.iterdir())


def test_the_hosts_cache_can_weigh_it(tiny: Tiny) -> None:
    """The host counts CPU tensors in tuples; nearly all bytes of a trajectory are found that way."""
    found = sum(t.nbytes for t in tiny.trajectory if isinstance(t, torch.Tensor))
    assert found >= tiny.trajectory.states.nbytes
    assert isinstance(tiny.trajectory, tuple)
    assert tiny.trajectory.states.device.type == "cpu"


def test_sigmas_are_found_with_rounding_and_others_are_not(tiny: Tiny) -> None:
    for i, sigma in enumerate(tiny.sigmas.tolist()):
        assert tiny.trajectory.index(sigma * (1 + 1e-6)) == i
        assert tiny.trajectory.index(sigma * 1.003) is None
