"""`bench steps`: rows by arithmetic, the same numbers again, and differences that are those of the CSV."""

from __future__ import annotations

import argparse
import csv
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from palimpsest.benchmarks import steps

FEW = [
    "DDIM + naive",
    "DDIM + P2P",
    "O-BELM + naive",
    "edit friendly + P2P",
    "TurboEdit + naive",
    "virtual InfEdit + MasaCtrl",
]
ROWS = {  # of 4 steps: the inversion's, then the edit's
    "DDIM + naive": 4 + 4 * 2,
    "DDIM + P2P": 4 + 4 * 3,
    "O-BELM + naive": (3 + 1) + (2 + 1) * 2,  # 0.8 of the schedule; one call more each way, to see that they repeat
    "edit friendly + P2P": (3 + 1) + (3 + 1) * 3,  # 0.64 of it
    "TurboEdit + naive": (4 + 1) + (4 + 1) * 2,
    "virtual InfEdit + MasaCtrl": 4 * 3,
}


def run(folder: Path, *more: str) -> None:
    parser = argparse.ArgumentParser()
    steps.add_arguments(parser)
    arguments = ["--edits", "2", "--only", *FEW, "--folder", str(folder), "--steps", "4", *more]
    with torch.inference_mode():
        steps.run(parser.parse_args(arguments))


def lines(folder: Path) -> list[dict[str, str]]:
    with (folder / "edits.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("steps")
    run(folder)
    return folder


def test_rows_are_those_of_an_edit_with_its_inversion(whole: Path) -> None:
    assert {line["recipe"]: float(line["rows"]) for line in lines(whole)} == ROWS
    assert [line["steps"] for line in lines(whole)] == ["4"] * 2 * len(FEW)
    table = (whole / "table.md").read_text()
    for recipe, rows in ROWS.items():
        assert f"| {recipe} | 4 | {rows} | " in table
    assert (whole / "plot.png").stat().st_size > 0


def test_every_recipe_has_a_line() -> None:
    score = {"case": 0, "kind": "add", "inside": 20.0, "outside": 30.0, "shown": True, "only": True, "seconds": 1.0}
    rows = [steps.Row(recipe, n, **score, rows=3.0 * n) for recipe in steps.RECIPES for n in (4, 8)]
    for axes, height in zip(steps.plot(steps.grouped(rows)).axes, (20, 30, 100), strict=True):
        assert [line.get_label() for line in axes.lines] == steps.RECIPES
        assert all(line.get_xydata().tolist() == [[12, height], [24, height]] for line in axes.lines)


def test_a_run_goes_on_and_gives_the_same_numbers(whole: Path, tmp_path: Path) -> None:
    half = ["DDIM + P2P", "virtual InfEdit + MasaCtrl"]
    run(tmp_path, "--only", half[0])
    kept = lines(tmp_path)
    run(tmp_path, "4", "6", "--only", *half)
    now = lines(tmp_path)
    assert now[:2] == kept  # their seconds too
    assert [(line["recipe"], line["steps"]) for line in now[2:]] == [(half[1], "4")] * 2 + [
        (recipe, "6") for recipe in half for _ in range(2)
    ]
    wanted = [line | {"seconds": ""} for line in lines(whole) if line["recipe"] in half]
    assert [line | {"seconds": ""} for line in now if line["steps"] == "4"] == wanted
    with pytest.raises(SystemExit, match=r"holds results of other settings: cfg 3\.0 \(now 2\.0\)"):
        run(tmp_path, "--cfg", "2")


def test_the_second_table_is_of_differences_edit_by_edit(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "REFERENCE", ("DDIM + naive", 4))
    run(whole, "--rows", "13")
    table = (whole / "table.md").read_text().split("Beside DDIM + naive at 4 steps (12 rows, ")[1]
    assert "| DDIM + P2P |" not in table  # 16 rows
    of = {name: [line for line in lines(whole) if line["recipe"] == name] for name in FEW}
    ours, theirs = (of[name] for name in ("virtual InfEdit + MasaCtrl", "DDIM + naive"))
    cells = re.search(r"\| virtual InfEdit \+ MasaCtrl \| 4 \| 12 \| (.*) \|", table)[1].split(" | ")
    for field, cell in zip(("inside", "outside"), cells, strict=False):
        gaps = np.array([float(one[field]) - float(other[field]) for one, other in zip(ours, theirs, strict=True)])
        assert cell == f"{gaps.mean():+.2f} ± {abs(gaps[0] - gaps[1]) / 2:.2f}"
    seconds = [sum(float(line["seconds"]) for line in rows) for rows in (ours, theirs)]
    assert float(cells[3]) == pytest.approx(seconds[0] / seconds[1], abs=0.006)


def test_few_steps_beside_the_edit_of_another_folder(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steps, "REFERENCE", ("DDIM + naive", 4))
    few = ["--model", "few-step", "--cfg", "1", "--only", "virtual InfEdit + naive"]
    run(tmp_path, *few, "--beside", str(whole))
    table = (tmp_path / "table.md").read_text().split("Beside DDIM + naive at 4 steps (12 rows, ")[1]
    ours, theirs = lines(tmp_path), [line for line in lines(whole) if line["recipe"] == "DDIM + naive"]
    assert {float(line["rows"]) for line in ours} == {8}
    gaps = [float(one["outside"]) - float(other["outside"]) for one, other in zip(ours, theirs, strict=True)]
    assert f" {np.mean(gaps):+.2f} ± " in table
    with pytest.raises(SystemExit, match=r"holds no DDIM \+ naive at 4 steps of the same edits: other seed\."):
        run(tmp_path / "other", *few, "--beside", str(whole), "--seed", "1")
