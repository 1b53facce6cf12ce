"""`dev.py batch`: a folder of pictures edited by a table, through the real server."""

from __future__ import annotations

import argparse
import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from example_workflows import api_form, ui_form
from host_server import HostServer
from palimpsest.benchmarks import batch
from palimpsest.benchmarks.jobs import as_png
from palimpsest.demo import scenes

SOURCE, TARGET, OTHER = (f"a photo of a red {thing} on a street" for thing in ("car", "bus", "house"))
HEAD = "image,source_prompt,target_prompt,name\n"


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """Two pictures that can be edited and five lines that cannot."""
    for seed, name in enumerate(("one", "two")):
        pixels = scenes.render(scenes.parse(SOURCE, seed))
        Image.fromarray((pixels * 255).round().astype(np.uint8)).save(tmp_path / f"{name}.png")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    path = tmp_path / "edits.csv"
    lines = [f"one.png,{SOURCE},{TARGET},", f"two.png,{SOURCE},{TARGET},starred"]
    lines += [f"three.png,{SOURCE},{TARGET},", f"one.png,{SOURCE},{TARGET},", f"one.png,{SOURCE},,"]
    lines += [f"one.png,{SOURCE},{TARGET},../up", f"broken.png,{SOURCE},{TARGET},"]
    path.write_text("\ufeff" + HEAD + "\n".join(lines) + "\n", encoding="utf-8")
    return path


def run(*arguments: object) -> None:
    parser = argparse.ArgumentParser()
    batch.add_arguments(parser)
    batch.run(parser.parse_args([str(argument) for argument in arguments]))


def test_a_table_is_edited(server: HostServer, table: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    workflow, out = tmp_path / "edit.json", tmp_path / "out"
    workflow.write_text(json.dumps(api_form("edit-real-image", steps=3)))
    where = ("--table", table, "--workflow", workflow, "--servers", server.url, "--output", out)
    with pytest.raises(SystemExit) as ended:
        run(*where)
    assert ended.value.code == 1
    told = capsys.readouterr().out
    for sentence in (
        f"failed: line 4: its picture three.png is not in {tmp_path}",
        "failed: line 5: another line's picture is called one too: add a column name",
        "failed: line 6: its target_prompt is empty",
        "failed: line 7: its name ../up is no file name",
        "failed: line 8: cannot identify image file",
        f"2 pictures edited, 5 failures; they are in {out / 'edited'}",
    ):
        assert sentence in told
    pictures = sorted((out / "edited").glob("*.png"))
    assert [path.name for path in pictures] == ["one.png", "starred.png"]
    source, edited = (np.asarray(Image.open(path)).astype(float) for path in (tmp_path / "one.png", pictures[0]))
    assert source.shape == edited.shape
    assert np.abs(source - edited).mean() > 1

    written = [path.stat().st_mtime_ns for path in pictures]
    table.write_text(HEAD + f"one.png,{SOURCE},{OTHER},\ntwo.png,{SOURCE},{TARGET},starred\n", encoding="utf-8")
    run(*where)
    again = [path.stat().st_mtime_ns for path in pictures]
    assert again[0] > written[0]  # its words changed
    assert again[1] == written[1]
    assert "2 pictures edited, 0 failures" in capsys.readouterr().out


def test_a_table_without_a_column_is_refused(table: Path, tmp_path: Path) -> None:
    workflow = tmp_path / "edit.json"
    workflow.write_text(json.dumps(api_form("edit-real-image")))
    table.write_text("image,target_prompt\n", encoding="utf-8")
    with pytest.raises(SystemExit, match="has no column source_prompt: its first line has to name image, source_pr"):
        run("--table", table, "--workflow", workflow, "--output", tmp_path / "out")


def test_a_scheduler_that_is_not_there(table: Path, tmp_path: Path) -> None:
    workflow = tmp_path / "edit.json"
    workflow.write_text(json.dumps(api_form("edit-real-image")))
    where = ("--table", table, "--workflow", workflow, "--output", tmp_path / "out")
    with pytest.raises(SystemExit, match="error: --scheduler nowhere://here is no scheduler of Dask that answers"):
        run(*where, "--scheduler", "nowhere://here")


@pytest.mark.parametrize("text", [json.dumps(ui_form("edit-real-image")), "{}", "[1]", "no json"])
def test_another_workflow_file_is_refused(table: Path, tmp_path: Path, text: str) -> None:
    workflow = tmp_path / "edit.json"
    workflow.write_text(text, encoding="utf-8")
    sentence = "is no JSON file" if text == "no json" else r"is no workflow in the API format: save it by File, Export"
    with pytest.raises(SystemExit, match=sentence):
        run("--table", table, "--workflow", workflow, "--output", tmp_path / "out")


def test_photographs_are_turned_as_they_were_taken() -> None:
    photo = Image.fromarray(np.arange(6, dtype=np.uint8).reshape(2, 3) * 40)
    exif = photo.getexif()
    exif[0x0112] = 6  # to be turned right by a quarter
    file = io.BytesIO()
    photo.save(file, "PNG", exif=exif)
    turned = np.asarray(Image.open(io.BytesIO(as_png(Image.open(file))))).astype(int)[..., 0]
    assert turned.tolist() == np.rot90(np.asarray(photo), -1).tolist()
