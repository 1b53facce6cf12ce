"""Pictures to be edited by a workflow on ComfyUI servers; what is edited already is left as it is."""

from __future__ import annotations

import argparse
import hashlib
import io
import json
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageOps
from tqdm import tqdm

from .farm import add_farm, farm, spread
from .filled import SAVED, Template
from .servers import Prompt
from .worker import edited


@dataclass(frozen=True)
class Job:
    """key: the edited file's name without its ending. words: those of Local Blend, None for the workflow's own.

    instruction: for InstructPix2Pix, of which other workflows have no need.
    """

    key: str
    image: Path
    source_prompt: str
    target_prompt: str
    words: str | None
    instruction: str | None

    def fingerprint(self) -> str:
        said = json.dumps([self.source_prompt, self.target_prompt, self.words, self.instruction])
        return hashlib.sha256(said.encode() + self.image.read_bytes()).hexdigest()


def add_workflow_and_servers(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workflow", type=Path, required=True, metavar="FILE", help="in the API format")
    parser.add_argument(
        "--decoder", metavar="ID", help="the node that decodes the edited picture, if there are several"
    )
    add_farm(parser)


def claim(output: Path, template: Template) -> None:
    """Makes the output folder of this workflow, or goes on in it. Raises ValueError where it is another one's."""
    fingerprint = hashlib.sha256(json.dumps(template.nodes, sort_keys=True).encode()).hexdigest()
    (output / "edited").mkdir(parents=True, exist_ok=True)
    stamp = output / "workflow.sha256"
    if not stamp.exists():
        stamp.write_text(fingerprint, encoding="utf-8")
    if stamp.read_text(encoding="utf-8") != fingerprint:
        raise ValueError(f"{output} holds the edits of another workflow: choose another --output, or delete it")


def edited_path(output: Path, job: Job) -> Path:
    return output / "edited" / f"{job.key}.png"


def is_edited(output: Path, job: Job) -> bool:
    """Whether this very picture was edited by these prompts."""
    stamp = edited_path(output, job).with_suffix(".sha256")
    return stamp.is_file() and stamp.read_text(encoding="utf-8") == job.fingerprint()


def edit_all(jobs: list[Job], template: Template, arguments: argparse.Namespace, output: Path) -> list[str]:
    """Edits what is not edited already; a sentence for each job and server that failed.

    arguments: those of add_farm. Raises ValueError where they are of no use.
    """

    def load(job: Job) -> tuple[str, bytes, Prompt, str]:
        name = f"palimpsest-{job.key}.png"
        prompt = template.filled(name, job.source_prompt, job.target_prompt, job.words, job.instruction)
        return name, as_png(Image.open(job.image)), prompt, SAVED

    jobs = [job for job in jobs if not is_edited(output, job)]
    if not jobs:
        return []
    faults = []
    with farm(template.nodes, arguments) as servers, tqdm(total=len(jobs), desc="editing", disable=None) as progress:
        for job, picture, fault in spread(jobs, servers, load, edited):
            if job is None:
                faults.append(fault)
                continue
            progress.update()
            if fault:
                faults.append(f"{job.key}: {fault}")
            else:
                edited_path(output, job).write_bytes(picture)
                edited_path(output, job).with_suffix(".sha256").write_text(job.fingerprint(), encoding="utf-8")
    return faults


def as_png(picture: Image.Image) -> bytes:
    """Turned as a camera says that it was held, as Load Image turns it."""
    file = io.BytesIO()
    ImageOps.exif_transpose(picture).convert("RGB").save(file, "PNG")
    return file.getvalue()
