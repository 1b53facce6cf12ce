"""`dev.py distil`: pairs of pictures to a network that the host's own nodes load and run."""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import folder_paths
import numpy as np
import pytest
import torch
from comfy_extras.nodes_upscale_model import ImageUpscaleWithModel, UpscaleModelLoader
from PIL import Image
from safetensors.torch import load_file

from palimpsest.benchmarks import distil
from palimpsest.benchmarks.distil import Pair, Training
from palimpsest.benchmarks.jobs import Job, edited_path

PAIRS, SIDE = 6, 32
OWN = ("--width", "4", "--batch", "2", "--rate", "1e-2")


def options(folder: Path, *more: object) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    distil.add_arguments(parser)
    where = ("--pairs", folder, "--output", folder / "edit.safetensors", *OWN, *more)
    return parser.parse_args([str(each) for each in where])


def save(pixels: np.ndarray, path: Path) -> None:
    Image.fromarray(pixels.astype(np.uint8)).save(path)


@pytest.fixture(autouse=True)
def _gradients() -> Iterator[None]:
    with torch.inference_mode(False), torch.enable_grad():
        yield


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """As `dev.py pairs` writes it; the edit is to exchange red and blue and to darken."""
    rng, lines = np.random.default_rng(0), []
    for number in range(PAIRS):
        coarse = rng.integers(0, 256, (SIDE // 8, SIDE // 8, 3)).repeat(8, 0).repeat(8, 1)
        names = {side: f"{number}-{side}.png" for side in ("input", "edited")}
        save(coarse, tmp_path / names["input"])
        save(coarse[..., ::-1] * 0.7, tmp_path / names["edited"])
        lines.append(json.dumps({f"{side}_file_name": name for side, name in names.items()} | {"instruction": "x"}))
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path


def training(folder: Path, name: str, resume: bool = False) -> Training:
    asked = options(folder)
    settings = {each: getattr(asked, each) for each in distil.SETTINGS}
    return Training(folder / f"{name}.safetensors", settings, SIDE, resume)


@pytest.fixture
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distil, "ROUND", 4)


def test_pairs_are_those_of_the_metadata(folder: Path) -> None:
    pairs = distil.read_pairs(folder, None)
    assert pairs[0] == Pair(folder / "0-input.png", folder / "0-edited.png")
    assert len(pairs) == PAIRS
    before, after = distil.read(pairs[0])
    assert torch.equal((after * 255).round(), ((before * 255).round() * 0.7).floor().flip(0))


def test_pairs_are_those_of_a_table_that_are_edited(folder: Path, capsys: pytest.CaptureFixture) -> None:
    (folder / "edited").mkdir()
    table = folder / "edits.csv"
    lines = [f"{number}-input.png,a cat,a dog,{number}" for number in range(4)] + ["gone.png,a cat,a dog,gone"]
    table.write_text("image,source_prompt,target_prompt,name\n" + "\n".join(lines) + "\n")
    for number in (0, 1, 3):
        job = Job(f"{number}", folder / f"{number}-input.png", "a cat" if number else "a fox", "a dog", None, None)
        shutil.copy(folder / f"{number}-edited.png", edited_path(folder, job))
        edited_path(folder, job).with_suffix(".sha256").write_text(job.fingerprint())
    pairs = distil.read_pairs(folder, table)
    assert pairs == [Pair(folder / f"{number}-input.png", folder / "edited" / f"{number}.png") for number in (1, 3)]
    told = capsys.readouterr().out
    assert f"left out: 0 is not edited in {folder}\n" in told  # it was, by other prompts
    assert f"left out: 2 is not edited in {folder}\n" in told
    assert f"left out: line 6: its picture gone.png is not in {folder}\n" in told


def test_what_an_autoencoder_cut_off_is_cut_off_before_too(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (45, 35, 3))
    pair = Pair(tmp_path / "before.png", tmp_path / "after.png")
    save(pixels, pair.before)
    save(pixels[2:42, 1:33], pair.after)  # as the host crops to multiples of 8
    before, after = distil.read(pair)
    assert torch.equal(before, after)
    assert after.shape == (3, 40, 32)


def test_what_is_held_out_is_not_learnt_from(folder: Path) -> None:
    pairs = distil.read_pairs(folder, None) * 5
    pairs = [Pair(Path(f"{i}"), pair.after) for i, pair in enumerate(pairs)]
    learnt, held_out = distil.divided(pairs, 0)
    assert (len(learnt), len(held_out)) == (27, 3)
    assert sorted([*learnt, *held_out]) == sorted(pairs)
    assert distil.divided(pairs, 1) != (learnt, held_out)


def test_the_loss_is_of_pixels_and_of_steps_between_them() -> None:
    made, wanted = torch.rand(2, 2, 3, 5, 7, dtype=torch.float64).unbind(0)
    error = (made - wanted).numpy()
    across, down = np.abs(error[..., 1:] - error[..., :-1]), np.abs(error[..., 1:, :] - error[..., :-1, :])
    assert distil.loss(made, wanted).item() == pytest.approx(np.abs(error).mean() + across.mean() + down.mean())


def test_steps_lower_the_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distil, "ROUND", 60)
    learnt, held_out = distil.divided(distil.read_pairs(folder, None), 0)
    trained = training(folder, "edit")
    before = trained.error(held_out)
    _, after = trained.round(learnt, held_out)
    assert trained.best == after < 0.8 * before


@pytest.mark.usefixtures("few_steps")
def test_a_resumed_training_ends_where_a_whole_one_does(folder: Path) -> None:
    learnt, held_out = distil.divided(distil.read_pairs(folder, None), 0)
    whole = training(folder, "whole")
    told = [whole.round(learnt, held_out) for _ in range(2)]
    first = training(folder, "parts").round(learnt, held_out)
    second = training(folder, "parts", resume=True)
    assert [first, second.round(learnt, held_out)] == told
    files = [load_file(folder / f"{name}.safetensors") for name in ("whole", "parts")]
    assert all(torch.equal(files[0][name], files[1][name]) for name in files[0])
    assert second.step == 8


@pytest.mark.usefixtures("few_steps")
def test_the_file_holds_what_did_best(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = training(folder, "edit")
    errors = iter([0.2, 0.3, 0.1])
    monkeypatch.setattr(trained, "error", lambda _: next(errors))
    learnt, held_out = distil.divided(distil.read_pairs(folder, None), 0)
    files = []
    for _ in range(3):
        trained.round(learnt, held_out)
        files.append(load_file(trained.output)["intro.weight"])
    assert torch.equal(files[0], files[1])
    assert not torch.equal(files[1], files[2])
    assert torch.equal(files[2], trained.average.intro.weight)


@pytest.mark.usefixtures("few_steps")
def test_the_host_s_own_nodes_run_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    learnt, held_out = distil.divided(distil.read_pairs(folder, None), 0)
    trained = training(folder, "edit")
    trained.round(learnt, held_out)
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "upscale_models", ([str(folder)], {".safetensors"}))
    image = torch.rand(2, 50, 70, 3)  # no multiple of anything
    with torch.inference_mode():
        (loaded,) = UpscaleModelLoader.execute("edit.safetensors").args
        (made,) = ImageUpscaleWithModel.execute(loaded, image).args
        own = torch.cat([trained.average(each).clamp(0, 1) for each in image.movedim(-1, 1).split(1)])
    assert loaded.scale == 1
    assert torch.equal(made.cpu(), own.movedim(1, -1).cpu())
    assert (made - image).abs().max() > 0


@pytest.mark.usefixtures("few_steps")
def test_the_command_ends_with_the_time_and_goes_on(folder: Path, capsys: pytest.CaptureFixture) -> None:
    distil.run(options(folder, "--minutes", "0.0001"))
    told = capsys.readouterr().out
    assert "5 pairs to learn from, 1 held out" in told
    assert "step 4: " in told
    assert "step 8: " not in told
    assert "the best so far" in told
    with pytest.raises(SystemExit, match="has been trained before: add --resume to go on, or name another --output"):
        distil.run(options(folder))
    with pytest.raises(SystemExit, match="began with --batch 2, not 3: name another --output"):
        distil.run(options(folder, "--resume", "--batch", "3"))
    distil.run(options(folder, "--resume", "--minutes", "0.0001"))
    assert "step 8: " in capsys.readouterr().out
    save(np.zeros((SIDE, SIDE, 3)), folder / "0-edited.png")
    with pytest.raises(SystemExit, match="began with other pairs: name another --output"):
        distil.run(options(folder, "--resume"))


def refused(folder: Path, message: str, *more: object) -> None:
    with pytest.raises(SystemExit) as ended:
        distil.run(options(folder, *more))
    assert message in str(ended.value)


def test_folders_without_pairs_are_refused(folder: Path) -> None:
    (folder / "other").mkdir()
    refused(folder, "other has no metadata.jsonl: name a folder that dev.py pairs", "--pairs", folder / "other")
    (folder / "other" / "edited").mkdir()
    refused(folder, "is of dev.py batch, whose table says what", "--pairs", folder / "other")
    lines = (folder / "metadata.jsonl").read_text().splitlines()
    (folder / "metadata.jsonl").write_text(lines[0])
    refused(folder, "has 1 pairs of pictures: two are needed")
    (folder / "metadata.jsonl").write_text(f'{lines[0]}\n{{"file_name": "a.png"}}')
    refused(folder, "metadata.jsonl, line 2: it has to name input_file_name and edited_file_name")


def test_pictures_that_cannot_be_learnt_from_are_named(folder: Path) -> None:
    whole = (folder / "3-edited.png").read_bytes()
    (folder / "3-edited.png").write_bytes(whole[: len(whole) // 2])
    refused(folder, f"{folder / '3-edited.png'} cannot be read as a picture: ")
    (folder / "3-edited.png").unlink()
    refused(folder, f"{folder / '3-edited.png'} cannot be read as a picture: ")
    save(np.zeros((SIDE, 64, 3)), folder / "3-edited.png")
    refused(folder, f"{folder / '3-input.png'} and {folder / '3-edited.png'} are of different sizes, 32 x 32 and 64 x")


def test_outputs_that_cannot_be_written_are_refused(folder: Path) -> None:
    refused(folder, "edit.pth has to end in .safetensors", "--output", folder / "edit.pth")
    refused(folder, "is in no existing folder", "--output", folder / "no" / "edit.safetensors")
    refused(folder, "edit.training to resume from: leave --resume out", "--resume")
