"""PIE-Bench on any workflow and any number of ComfyUI servers, by its published metrics and by corrected ones.

The folder is laid out as published: `mapping_file.json` beside `annotation_images`. What is edited already is not
edited again, so that a run that was interrupted goes on where it was.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import comfy.clip_vision
import comfy.model_management
import comfy.sd
import folder_paths
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ..metrics.clip import clip_score
from ..metrics.pie import corrected, decoded_mask, published, with_edge
from ..nodes.networks import Missing, load_dino, load_lpips, text_embedding
from .filled import Template, read_workflow
from .jobs import Job, add_workflow_and_servers, claim, edit_all, edited_path, is_edited

TYPES = ("random", "change object", "add object", "delete object", "content", "pose", "colour", "material")
TYPES += ("background", "style")
COLUMNS = {  # as in the paper's table: title and factor
    "structure": ("structure ×10³", 1e3),
    "psnr": ("PSNR", 1),
    "lpips": ("LPIPS ×10³", 1e3),
    "mse": ("MSE ×10⁴", 1e4),
    "ssim": ("SSIM ×10²", 1e2),
    "clip_whole": ("CLIP whole", 1),
    "clip_edited": ("CLIP edited", 1),
}
Row = dict[str, Any]
Clip = tuple[comfy.sd.CLIP, comfy.clip_vision.ClipVisionModel]


@dataclass(frozen=True)
class Entry(Job):
    kind: int
    runs: Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", type=Path, required=True, metavar="FOLDER", help="with mapping_file.json")
    add_workflow_and_servers(parser)
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="pictures and table; default: pie-WORKFLOW")
    parser.add_argument("--clip", default="clip_l.safetensors", metavar="NAME", help="a whole CLIP in text_encoders")
    parser.add_argument("--clip-vision", default="clip_vision_l.safetensors", metavar="NAME", help="in clip_vision")


def run(arguments: argparse.Namespace) -> None:
    try:
        template = Template(read_workflow(arguments.workflow), arguments.decoder)
        entries, faults = read_entries(arguments.data)
        output = arguments.output or Path(f"pie-{arguments.workflow.stem}")
        claim(output, template)
        faults += edit_all(entries, template, arguments, output)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    judges, notes = load_judges(arguments.clip, arguments.clip_vision)
    rows = []
    for entry in tqdm(entries, "measuring", disable=None):
        if is_edited(output, entry):
            try:
                rows.append(measured(entry, output, judges))
            except ValueError as fault:
                faults.append(f"{entry.key}: {fault}")
    report(rows, faults, notes, output)


def read_entries(data: Path) -> tuple[list[Entry], list[str]]:
    """What can be edited, and a sentence for each entry that cannot."""
    mapping = json.loads((data / "mapping_file.json").read_text(encoding="utf-8"))
    if not isinstance(mapping, dict) or not all(isinstance(item, dict) for item in mapping.values()):
        raise ValueError(f"{data / 'mapping_file.json'} is no mapping of names to entries")
    entries, faults = [], []
    for key, item in mapping.items():
        try:
            entry = read_entry(key, item, data / "annotation_images")
            with Image.open(entry.image) as picture:
                decoded_mask(entry.runs, picture.height, picture.width)
        except FileNotFoundError:
            faults.append(f"{key}: its picture {item['image_path']} is not in {data / 'annotation_images'}")
        except KeyError as missing:
            faults.append(f"{key}: it has no {missing.args[0]}")
        except (ValueError, TypeError, OSError) as fault:
            faults.append(f"{key}: {fault}")
        else:
            entries.append(entry)
    return entries, faults


def read_entry(key: str, item: dict[str, Any], images: Path) -> Entry:
    source, target = (item[name].replace("[", "").replace("]", "") for name in ("original_prompt", "editing_prompt"))
    words = ", ".join(item["blended_word"].split())
    kind = int(item["editing_type_id"])
    if Path(key).name != key:
        raise ValueError("its name is no file name")
    if not 0 <= kind < len(TYPES):
        raise ValueError(f"its editing_type_id is {kind}, not 0 to {len(TYPES) - 1}")
    instruction = item.get("editing_instruction")  # some sets of this layout have none
    return Entry(key, images / item["image_path"], source, target, words, instruction, kind, item["mask"])


# --- measuring -------------------------------------------------------------------------------------------------------


def load_judges(clip: str, clip_vision: str) -> tuple[dict[str, Any], list[str]]:
    """The networks that are there, and a sentence for each that is not."""
    judges, notes = {}, []
    loaders = {"lpips": load_lpips, "dino": load_dino, "clip": lambda: load_clip(clip, clip_vision)}
    for name, load in loaders.items():
        try:
            judges[name] = load()
        except (Missing, ValueError) as fault:
            judges[name] = None
            notes.append(f"{name} is not measured: {str(fault).rstrip('.')}.")
    return judges, notes


def load_clip(text: str, vision: str) -> Clip:
    paths = []
    for folder, name in (("text_encoders", text), ("clip_vision", vision)):
        path = folder_paths.get_full_path(folder, name)
        if path is None:
            raise Missing(f"{name} is not in {folder_paths.get_folder_paths(folder)[0]}")
        paths.append(path)
    return comfy.sd.load_clip([paths[0]]), comfy.clip_vision.load(paths[1])


def measured(entry: Entry, output: Path, judges: dict[str, Any]) -> Row:
    """The values of an entry: those kept from before, or anew where another network is there. Raises ValueError."""
    kept = output / "edited" / f"{entry.key}.json"
    there = sorted(name for name, judge in judges.items() if judge is not None)
    if kept.is_file():
        row = json.loads(kept.read_text(encoding="utf-8"))
        if (row["networks"], row["edit"]) == (there, entry.fingerprint()):
            return row
    source, edited = (picture(path) for path in (entry.image, edited_path(output, entry)))
    if source.shape != edited.shape:
        sizes = [f"{image.shape[2]} x {image.shape[1]}" for image in (source, edited)]
        raise ValueError(f"its picture is {sizes[0]}, the edited one {sizes[1]} pixels")
    mask = decoded_mask(entry.runs, *source.shape[1:3])
    row = {"id": entry.key, "kind": entry.kind, "networks": there, "edit": entry.fingerprint()}
    device = comfy.model_management.get_torch_device()
    tensors = [each.to(device) for each in (source, edited, mask)]
    for name, metric in (("published", published), ("corrected", corrected)):
        row[name] = metric(*tensors, judges["lpips"], judges["dino"])
    if judges["clip"] is not None:
        row["published"] |= clip_values(edited, with_edge(mask), entry.target_prompt, *judges["clip"])
    part = kept.with_suffix(".part")
    part.write_text(json.dumps(row), encoding="utf-8")
    os.replace(part, kept)
    return row


def picture(path: Path) -> Tensor:
    with Image.open(path) as image:
        return torch.from_numpy(np.asarray(image.convert("RGB"), np.float32) / 255)[None]


def clip_values(edited: Tensor, mask: Tensor, prompt: str, clip: comfy.sd.CLIP, vision: Any) -> dict[str, float]:
    text = text_embedding(clip, prompt)
    shown = {"clip_whole": edited, "clip_edited": edited * mask[..., None]}
    return {name: float(clip_score(vision.encode_image(image)["image_embeds"], text)) for name, image in shown.items()}


# --- the table -------------------------------------------------------------------------------------------------------


def report(rows: list[Row], faults: list[str], notes: list[str], output: Path) -> None:
    text = "\n".join([*table(rows), "", *notes, *(f"failed: {fault}" for fault in faults)]) + "\n"
    (output / "table.md").write_text(text, encoding="utf-8")
    with (output / "values.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "type", *(f"{side} {name}" for side in ("published", "corrected") for name in COLUMNS)])
        for row in rows:
            values = [row[side].get(name, "") for side in ("published", "corrected") for name in COLUMNS]
            writer.writerow([row["id"], TYPES[row["kind"]], *values])
    print(text)
    print(f"{len(rows)} edits measured, {len(faults)} failures; pictures and values are in {output}")


def table(rows: list[Row]) -> list[str]:
    """Markdown: the means of all entries, as published and corrected, then of each type as published."""
    lines = ["| entries | metrics | " + " | ".join(title for title, _ in COLUMNS.values()) + " |"]
    lines.append("|---|---|" + "---|" * len(COLUMNS))
    groups = [(f"all {len(rows)}", rows, side) for side in ("published", "corrected")]
    for kind, name in enumerate(TYPES):
        of_type = [row for row in rows if row["kind"] == kind]
        groups += [(f"{name}, {len(of_type)}", of_type, "published")] if of_type else []
    for title, group, side in groups:
        cells = [cell([row[side].get(name, math.nan) for row in group], scale) for name, (_, scale) in COLUMNS.items()]
        lines.append(f"| {title} | {side} | {' | '.join(cells)} |")
    return lines


def cell(values: list[float], scale: float) -> str:
    known = [value for value in values if not math.isnan(value)]
    return f"{scale * sum(known) / len(known):.2f}" if known else "–"
