"""Edits many pictures by a table of prompts, with any workflow and any number of ComfyUI servers.

The table is a CSV file with the columns image, source_prompt and target_prompt, one picture a line, found beside the
table. A column words holds those of Local Blend, a column instruction that of an InstructPix2Pix, a column name that of
the edited file; all three may be left out. What is edited already is not edited again, so that a run that was
interrupted goes on where it was.
"""

from __future__ import annotations

import argparse
import csv
import sys
from pathlib import Path

from PIL import Image

from .filled import Template, read_workflow
from .jobs import Job, add_workflow_and_servers, claim, edit_all, is_edited

NEEDED = ("image", "source_prompt", "target_prompt")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--table", type=Path, required=True, metavar="FILE", help=f"CSV with the columns {', '.join(NEEDED)}"
    )
    add_workflow_and_servers(parser)
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="default: batch-TABLE")


def run(arguments: argparse.Namespace) -> None:
    try:
        template = Template(read_workflow(arguments.workflow), arguments.decoder)
        jobs, unreadable = read_table(arguments.table)
        output = arguments.output or Path(f"batch-{arguments.table.stem}")
        claim(output, template)
        faults = unreadable + edit_all(jobs, template, arguments, output)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    for fault in faults:
        print(f"failed: {fault}")
    edited = sum(is_edited(output, job) for job in jobs)
    print(f"{edited} pictures edited, {len(faults)} failures; they are in {output / 'edited'}")
    if unreadable or edited < len(jobs):  # a server that was lost has cost time alone
        sys.exit(1)


def read_table(path: Path) -> tuple[list[Job], list[str]]:
    """What can be edited, and a sentence for each line that cannot. Raises ValueError where a column is missing."""
    jobs: dict[str, Job] = {}
    faults = []
    with path.open(encoding="utf-8-sig", newline="") as file:  # spreadsheets put a mark before UTF-8
        lines = csv.DictReader(file)
        missing = [name for name in NEEDED if name not in (lines.fieldnames or ())]
        if missing:
            raise ValueError(f"{path} has no column {missing[0]}: its first line has to name {', '.join(NEEDED)}")
        for line in lines:
            try:
                job = read_line(line, path.parent)
                if job.key in jobs:
                    raise ValueError(f"another line's picture is called {job.key} too: add a column name")
            except (ValueError, OSError) as fault:
                faults.append(f"line {lines.line_num}: {fault}")
            else:
                jobs[job.key] = job
    return list(jobs.values()), faults


def read_line(line: dict[str, str | None], folder: Path) -> Job:
    for name in NEEDED:
        if not (line[name] or "").strip():
            raise ValueError(f"its {name} is empty")
    image = folder / line["image"]
    if not image.is_file():
        raise ValueError(f"its picture {line['image']} is not in {folder}")
    with Image.open(image) as picture:
        picture.verify()
    key = (line.get("name") or "").strip() or image.stem
    if Path(key).name != key:
        raise ValueError(f"its name {key} is no file name")
    return Job(key, image, line["source_prompt"], line["target_prompt"], line.get("words"), line.get("instruction"))
