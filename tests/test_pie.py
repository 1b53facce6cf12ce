"""The PIE-Bench runner on a small set of the published layout, drawn here, through real servers."""

from __future__ import annotations

import argparse
import json
import math
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
import torchmetrics.functional.image as image
from PIL import Image

from example_workflows import EDITS, MEASURING, api_form
from host_server import HostServer
from palimpsest.benchmarks import jobs, pie
from palimpsest.benchmarks.farm import spread
from palimpsest.benchmarks.filled import DECODERS, SAVED, Template
from palimpsest.demo import scenes
from palimpsest.metrics.pie import corrected, decoded_mask, published, with_edge

# Source, target, what PIE-Bench calls the blended words, and its type of edit.
CAPTIONS = (
    ("a photo of a car on a street", "a photo of a [bus] on a street", "car bus", "1"),
    ("a photo of a red cup in a room", "a photo of a [green] cup in a room", "", "6"),
    ("a photo of a cat on a meadow", "a photo of a cat on a [beach]", "meadow beach", "8"),
)
WORKFLOW, DECODER = "edit-real-image", "8"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three entries that can be edited and five that cannot."""
    folder = tmp_path_factory.mktemp("pie")
    mapping = {}
    for i, (source, target, words, kind) in enumerate(CAPTIONS):
        drawn = [scenes.render(scenes.parse(text.replace("[", "").replace("]", ""), i)) for text in (source, target)]
        path = f"{kind}_type/1_artificial/{i}.png"
        (folder / "annotation_images" / path).parent.mkdir(parents=True)
        Image.fromarray((drawn[0] * 255).round().astype(np.uint8)).save(folder / "annotation_images" / path)
        mapping[f"00000000000{i}"] = {
            "image_path": path,
            "original_prompt": source,
            "editing_prompt": target,
            "editing_instruction": "make it so",
            "editing_type_id": kind,
            "blended_word": words,
            "mask": runs(scenes.changed(*drawn)),
        }
    good = mapping["000000000000"]
    mapping |= {
        "missing": good | {"image_path": "no/such.jpg"},
        "odd": good | {"mask": [1, 2, 3]},
        "outside": good | {"mask": [128 * 128, 5]},
        "bare": {"image_path": good["image_path"]},
        "../escaping": good,
    }
    (folder / "mapping_file.json").write_text(json.dumps(mapping))
    return folder


def runs(mask: np.ndarray) -> list[int]:
    flat = np.concatenate([[0], mask.flatten().astype(int), [0]])
    starts, ends = np.flatnonzero(np.diff(flat) == 1), np.flatnonzero(np.diff(flat) == -1)
    return [int(number) for pair in zip(starts, ends - starts, strict=True) for number in pair]


@pytest.fixture(scope="module")
def workflow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("workflow") / "edit.json"
    path.write_text(json.dumps(api_form(WORKFLOW, steps=3)))
    return path


@pytest.fixture
def without_pack() -> Iterator[str]:
    """A server that knows no node of the pack."""

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b'{"LoadImage": {}, "VAEDecode": {}}')

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Answer) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def bench(*arguments: object) -> None:
    parser = argparse.ArgumentParser()
    pie.add_arguments(parser)
    pie.run(parser.parse_args([str(argument) for argument in arguments]))


def test_bad_entries_and_servers_are_a_sentence_each(
    data: Path, workflow: Path, server: HostServer, without_pack: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "out"
    urls = ("http://127.0.0.1:9", without_pack, server.url)
    bench("--data", data, "--workflow", workflow, "--decoder", DECODER, "--output", out, "--servers", *urls)
    told = (out / "table.md").read_text()
    for sentence in (
        f"failed: missing: its picture no/such.jpg is not in {data / 'annotation_images'}",
        "failed: odd: its mask has 3 numbers, which are no pairs of start and length",
        "failed: outside: its mask has a run of 5 from 16384, outside of 128 x 128 pixels",
        "failed: bare: it has no original_prompt",
        "failed: ../escaping: its name is no file name",
        "failed: http://127.0.0.1:9 does not answer",
        f"failed: {without_pack} runs without CLIPTextEncode, Palimpsest",
        "lpips is not measured: squeezenet1_1-b8a52dc0.pth is not in",
    ):
        assert sentence in told
    assert "3 edits measured, 7 failures" in capsys.readouterr().out

    psnrs = []  # the table's, by hand
    for i in range(3):
        entry = json.loads((data / "mapping_file.json").read_text())[f"00000000000{i}"]
        paths = data / "annotation_images" / entry["image_path"], out / "edited" / f"00000000000{i}.png"
        before, after = (np.asarray(Image.open(path).convert("RGB")) / 255 for path in paths)
        assert np.abs(before - after).mean() > 0.01
        outside = np.ones(128 * 128)
        for start, length in np.reshape(entry["mask"], (-1, 2)):
            outside[start : start + length] = 0
        outside = outside.reshape(128, 128)
        outside[[0, -1]] = outside[:, [0, -1]] = 0
        error = ((before - after) ** 2 * outside[..., None]).mean()
        psnrs.append(-10 * math.log10(error))
    row = next(line for line in told.splitlines() if line.startswith("| all 3 | published |"))
    assert row.split("|")[4].strip() == f"{sum(psnrs) / 3:.2f}"


def test_an_interrupted_run_goes_on(
    data: Path, workflow: Path, server: HostServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def arguments(out: str) -> tuple:
        where = "--data", data, "--workflow", workflow, "--decoder", DECODER, "--servers", server.url
        return *where, "--output", tmp_path / out

    bench(*arguments("whole"))
    ran = []

    def interrupted(work: list, *others: object) -> Iterator:
        for done in spread(work[:1], *others):
            ran.append(done[0].key)
            yield done
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(jobs, "spread", interrupted)
        with pytest.raises(KeyboardInterrupt):
            bench(*arguments("twice"))
    first = tmp_path / "twice" / "edited" / f"{ran[0]}.png"
    written = first.stat().st_mtime_ns
    bench(*arguments("twice"))
    assert first.stat().st_mtime_ns == written
    for file in ("table.md", "values.csv"):
        assert (tmp_path / "twice" / file).read_text() == (tmp_path / "whole" / file).read_text()

    other = tmp_path / "other.json"
    other.write_text(json.dumps(api_form(WORKFLOW, steps=2)))
    with pytest.raises(SystemExit, match="holds the edits of another workflow"):
        bench(*arguments("twice"), "--workflow", other)


# --- what it is made of ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    sorted({*EDITS, MEASURING, "edit-photo"} - {"edit-generated-image", "h-space", "learn-edit", "pix2pix-zero"}),
)
def test_every_workflow_can_be_filled(name: str) -> None:
    """With a picture and prompts of any kind, and nothing of the demo's scene is left."""
    workflow = api_form(name)
    (decoder,) = (node_id for node_id, node in workflow.items() if node["class_type"] in DECODERS)
    filled = Template(workflow).filled("picture.png", "source words", "target words", "one, two", "make it so")
    text = json.dumps(filled)
    assert "PalimpsestDemoScene" not in text
    assert ("make it so" if name == "instruct" else "target words") in text
    assert [node["inputs"]["image"] for node in filled.values() if node["class_type"] == "LoadImage"] == ["picture.png"]
    output = 0 if workflow[decoder]["class_type"] == "VAEDecode" else 1
    assert filled[SAVED]["inputs"]["images"] == [decoder, output]
    links = [value[0] for node in filled.values() for value in node["inputs"].values() if isinstance(value, list)]
    assert set(links) <= set(filled)


def test_workflows_that_cannot_be_filled() -> None:
    with pytest.raises(ValueError, match="in the nodes 9, 10: name one by --decoder"):
        Template(api_form("edit-generated-image"))
    with pytest.raises(ValueError, match="has no Load Image"):
        Template(api_form("edit-generated-image"), "9")
    with pytest.raises(ValueError, match="where the target_prompt could go"):
        Template(api_form("pix2pix-zero"))
    with pytest.raises(ValueError, match="its instruction is empty"):
        Template(api_form("instruct")).filled("picture.png", "source words", "target words", instruction=" ")


def test_an_instruction_goes_through_the_hosts_own_conditioning() -> None:
    """As in ComfyUI's own workflow of InstructPix2Pix: encoder, InstructPixToPixConditioning, guider of two scales."""
    workflow = {
        "1": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "ip2p.safetensors"}},
        "2": {"class_type": "LoadImage", "inputs": {"image": "own.png"}},
        "3": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["1", 1], "text": "own"}},
        "4": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["1", 1], "text": ""}},
        "5": {
            "class_type": "InstructPixToPixConditioning",
            "inputs": {"positive": ["3", 0], "negative": ["4", 0], "vae": ["1", 2], "pixels": ["2", 0]},
        },
        "6": {
            "class_type": "DualCFGGuider",
            "inputs": {"model": ["1", 0], "cond1": ["5", 0], "cond2": ["5", 1], "negative": ["4", 0]},
        },
        "7": {"class_type": "SamplerCustomAdvanced", "inputs": {"guider": ["6", 0], "latent_image": ["5", 2]}},
        "8": {"class_type": "VAEDecode", "inputs": {"samples": ["7", 0], "vae": ["1", 2]}},
    }
    filled = Template(workflow).filled("picture.png", "source words", "target words", instruction="make it so")
    assert filled["3"]["inputs"]["text"] == "make it so"
    assert filled["4"]["inputs"]["text"] == ""
    assert filled["2"]["inputs"]["image"] == "picture.png"


def test_metrics_with_and_without_the_published_quirks() -> None:
    generator = torch.Generator().manual_seed(0)
    source = torch.rand(1, 40, 48, 3, generator=generator)
    edited = (source + 0.1 * torch.randn(source.shape, generator=generator)).clamp(0, 1)
    mask = decoded_mask([48 * 10 + 5, 900], 40, 48)
    assert mask.sum() == 900
    theirs, ours = published(source, edited, mask, None, None), corrected(source, edited, mask, None, None)
    outside = 1 - with_edge(mask)
    error = (((source - edited) ** 2)[0].mean(-1) * outside).double()
    assert theirs["mse"] == pytest.approx(float(error.mean()), rel=1e-6)
    share = float(outside.mean())
    measured = corrected(source, edited, with_edge(mask), None, None)
    assert theirs["psnr"] == pytest.approx(measured["psnr"] - 10 * math.log10(share), rel=1e-6)
    assert ours["mse"] == pytest.approx(float((source - edited).double()[0][mask == 0].pow(2).mean()), rel=1e-9)
    everything = decoded_mask([0, 40 * 48], 40, 48)
    assert all(math.isnan(value) for value in published(source, edited, everything, None, None).values())


def test_published_values_as_torchmetrics_gives_them() -> None:
    source, edited = torch.rand(2, 1, 40, 48, 3, generator=torch.Generator().manual_seed(0))
    mask = decoded_mask([500, 700], 40, 48)
    black = [(each * (1 - with_edge(mask))[..., None]).movedim(-1, 1) for each in (edited, source)]
    found = published(source, edited, mask, None, None)
    assert found["ssim"] == pytest.approx(
        float(image.structural_similarity_index_measure(*black, data_range=1.0)), rel=1e-4
    )
    assert found["psnr"] == pytest.approx(float(image.peak_signal_noise_ratio(*black, data_range=1.0)), rel=1e-5)
