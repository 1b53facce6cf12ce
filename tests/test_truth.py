from __future__ import annotations

import argparse
import csv
from pathlib import Path

import comfy.samplers
import numpy as np
import pytest
import torch

from palimpsest.benchmarks import recipes, truth
from palimpsest.demo import model as demo_model
from palimpsest.demo import scenes, score
from palimpsest.demo.edits import EDITS, Edit
from palimpsest.demo.flow import load_flow
from palimpsest.demo.outcomes import Outcomes
from palimpsest.inversion.run import Guidance, ddim_sigmas

FEW = [
    "--edits",
    "3",
    "--batch",
    "2",
    "--steps",
    "4",
    "--only",
    "SDEdit at 0.6",
    "DDIM + naive",
    "EDICT + pix2pix-zero",
]
MEASURED = ("recipe", "case", "kind", "inside", "outside", "shown", "only", "rows", "refused")  # all but the seconds


def run(folder: Path, *more: str) -> None:
    parser = argparse.ArgumentParser()
    truth.add_arguments(parser)
    with torch.inference_mode():
        truth.run(parser.parse_args([*FEW, "--folder", str(folder), *more]))


def measured(folder: Path) -> list[tuple[str, ...]]:
    with (folder / "edits.csv").open(newline="") as file:
        return sorted(tuple(line[name] for name in MEASURED) for line in csv.DictReader(file))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("truth")
    run(folder)
    return folder


@torch.inference_mode()
def test_a_cell_is_what_the_host_and_plain_arithmetic_give(whole: Path) -> None:
    case = truth.draw_cases(3, seed=2026)[2]  # alone in its batch
    model, clip, vae = demo_model.load()
    before, after = (scenes.render(scene) for scene in (case.source, case.target))
    positive, negative = (clip.encode_from_tokens_scheduled(clip.tokenize(t)) for t in (case.target.caption, ""))
    noise = torch.randn((1, 16, 16, 16), generator=torch.Generator().manual_seed(2026))
    euler = comfy.samplers.sampler_object("euler")
    latent = (
        Guidance(positive, negative, 4.0)
        .guider(model)
        .sample(noise, vae.encode(torch.from_numpy(before)[None]), euler, ddim_sigmas(model, 4)[2:], seed=0)
    )
    error = (vae.decode(latent)[0].double().numpy() - after) ** 2
    changed = np.abs(before - after).max(-1) > 2 / 255
    row = next(row for row in measured(whole) if row[:2] == ("SDEdit at 0.6", "2"))
    assert row[2] == case.kind == EDITS[2]
    assert float(row[3]) == pytest.approx(-10 * np.log10(error[changed].mean()), abs=0.01)
    assert float(row[4]) == pytest.approx(-10 * np.log10(error[~changed].mean()), abs=0.01)
    assert float(row[7]) == 2 * 2  # two steps of two prompts


def test_rows_are_of_all_that_a_recipe_needs(whole: Path) -> None:
    rows = {row[0]: float(row[7]) for row in measured(whole)}
    assert rows["DDIM + naive"] == 4 + 4 * 2
    assert rows["drifting DDIM + naive"] == 4 + 5 * 2 + 4 * 2  # a recording asks the model once more


def test_a_run_goes_on_where_it_was_interrupted(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept, calls = truth.score, []

    def interrupted(*args) -> list[truth.Row]:
        calls.append(args)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return kept(*args)

    with monkeypatch.context() as patched:
        patched.setattr(truth, "score", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path)
    assert 0 < len(measured(tmp_path)) < len(measured(whole))
    run(tmp_path)
    assert measured(tmp_path) == measured(whole)
    assert (tmp_path / "table.md").read_text() == (whole / "table.md").read_text()


def test_results_of_other_settings_are_left_alone(whole: Path) -> None:
    before = measured(whole)
    with pytest.raises(SystemExit, match=r"holds results of other settings: steps 4 \(now 5\); name another --folder"):
        run(whole, "--steps", "5")
    assert measured(whole) == before


def test_what_refuses_each_other_is_told_in_the_table(whole: Path) -> None:
    table = (whole / "table.md").read_text()
    assert "- Refused: EDICT + pix2pix-zero: Cross Attention Guidance knows one state" in table
    assert "| SDEdit at 0.6 |" in table
    assert "| EDICT + pix2pix-zero |" not in table


def test_every_recipe_of_the_flow_model_runs_and_goes_on(tmp_path: Path) -> None:
    flow = ["--model", "flow", "--edits", "1", "--steps", "2"]
    run(tmp_path, *flow, "--only", "Uni-Inv")
    before = measured(tmp_path)
    run(tmp_path, *flow, "--only", "")
    rows = measured(tmp_path)
    assert set(before) < set(rows)
    assert {row[0] for row in rows} == set(recipes.RECIPES["flow"])
    assert [row for row in rows if row[-1]] == []  # none is refused
    spent = {row[0]: float(row[7]) for row in rows}
    assert spent["Uni-Inv + naive"] == 2 + 1 + 2 * 2
    assert spent["Uni-Inv + Flow Edit"] == 2 + 1 + 2 * 3
    assert spent["Flow Edit at 0.9, true mask"] == spent["Flow Edit at 0.9, one noise"] == 2 * 3


@torch.inference_mode()
def test_the_true_mask_leaves_the_rest_as_it_was(demo: tuple) -> None:
    parser = argparse.ArgumentParser()
    truth.add_arguments(parser)
    cases = truth.draw_cases(3, seed=2026)
    batch = recipes.Batch((load_flow(), *demo[1:]), cases, parser.parse_args([]), steps=4)
    changed = torch.nn.functional.max_pool2d(recipes.true_mask(batch), 24, 8, 8)  # a position of 8 pixels and around it
    kept = (changed == 0).expand_as(batch.latent)
    assert kept.any()
    for recipe in ("Flow Edit at 0.9, true mask", "SDEdit at 0.8, true mask"):
        moved = (recipes.UNINVERTED[recipe](batch) - batch.latent).abs()
        assert moved[kept].max() < 1e-5
        assert moved[~kept].mean() > 0.05


@pytest.mark.parametrize("case", truth.draw_cases(20, seed=1), ids=lambda case: case.kind)
def test_outcomes_are_told_apart(case: Edit) -> None:
    outcomes = Outcomes(case)
    before, after = (scenes.render(scene) for scene in (case.source, case.target))
    noisy = np.clip(after + 0.05 * np.random.default_rng(0).standard_normal(after.shape), 0, 1)
    assert outcomes.judge(after) == outcomes.judge(noisy) == (True, True)
    assert outcomes.judge(before) == (False, False)


def test_more_than_was_asked_for_is_seen() -> None:
    source, target, more = (
        scenes.parse(f"a photo of a {words}", seed=3)
        for words in ("red car on a street", "blue car on a street", "blue car on a beach")
    )
    outcomes = Outcomes(Edit("colour", source, target))
    assert outcomes.judge(scenes.render(more)) == (True, False)
    blot = scenes.render(target)
    blot[:24, :24] = (1, 0, 1)
    assert outcomes.judge(blot) == (True, False)
    assert score.agreement(outcomes.nearest(blot), target)["look"]
