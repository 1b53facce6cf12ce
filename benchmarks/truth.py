"""Every inversion with every editor on demo edits of all ten kinds, against their one true answer.

Scored are the error inside and outside of what the edit changes, whether the picture shows what was asked for, and
whether it shows that and nothing else. Results are kept edit by edit in a CSV file, by which a run goes on where it was
interrupted; tables, a plot and pictures are made of it. The flow model's recipes are those that flows take.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import comfy.samplers
import comfy.utils
import matplotlib
import numpy as np
from matplotlib.figure import Figure
from PIL import Image, ImageDraw
from tqdm import tqdm

from ..demo import edits as demo_edits
from ..demo import model as demo_model
from ..demo import scenes
from ..demo.edits import EDITS, Edit
from ..demo.flow import FLOW_WEIGHTS, load_flow
from ..demo.instruct import INSTRUCT_WEIGHTS, load_instruct
from ..demo.outcomes import Outcomes
from .edits import errors
from .picture import decode
from .recipes import RECIPES, Batch, Spent, edit

matplotlib.use("agg")


class Row(NamedTuple):
    """One edit by one recipe: decibels to the true answer, verdicts, and its share of what the batch cost."""

    recipe: str
    steps: int
    case: int
    kind: str
    inside: float
    outside: float
    shown: bool
    only: bool
    rows: float
    seconds: float
    refused: str = ""

    @classmethod
    def read(cls, line: dict[str, str]) -> Row:
        numbers = [float(line[name]) for name in ("inside", "outside", "rows", "seconds")]
        shown, only = (line[name] == "True" for name in ("shown", "only"))
        steps, case = (int(line[name]) for name in ("steps", "case"))
        return cls(line["recipe"], steps, case, line["kind"], *numbers[:2], shown, only, *numbers[2:], line["refused"])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_shared_arguments(parser)
    parser.add_argument("--model", choices=FILES, default="unet", help="the demo model to edit with")
    parser.add_argument("--steps", type=int, default=20)
    parser.set_defaults(edits=200, cfg=4.0, folder=Path("truth"))


def add_shared_arguments(parser: argparse.ArgumentParser) -> None:
    """All but the model and the steps: `bench steps` has one and several."""
    parser.add_argument("--edits", type=int, help="how many, of the kinds in turn")
    parser.add_argument("--kinds", nargs="+", choices=EDITS, default=list(EDITS), help="of edits; else all ten")
    parser.add_argument("--batch", type=int, default=20)
    parser.add_argument("--cfg", type=float)
    parser.add_argument("--cross", type=float, default=0.8, help="cross_replace of Prompt-to-Prompt")
    parser.add_argument("--self", dest="self_", type=float, default=0.4, help="its self_replace")
    parser.add_argument("--strength", type=float, default=0.7, help="of Virtual Inversion")
    parser.add_argument("--only", nargs="+", metavar="TEXT", help="recipes whose names hold one of these; else all")
    parser.add_argument("--seed", type=int, default=2026)
    parser.add_argument("--folder", type=Path, help="where results go, and are gone on from")


FILES = {
    "unet": (demo_model.WEIGHTS, demo_model.INPAINT_WEIGHTS),
    "few-step": (demo_model.WEIGHTS, demo_model.LCM_WEIGHTS),
    "flow": (FLOW_WEIGHTS,),
    "instruct": (demo_model.WEIGHTS, INSTRUCT_WEIGHTS),
}
SETTINGS = ("edits", "kinds", "batch", "cfg", "cross", "self_", "strength", "seed")


def run(arguments: argparse.Namespace) -> None:
    recipes = RECIPES[arguments.model]
    rows, cases = measured(arguments, recipes, [arguments.steps], (*SETTINGS, "steps"))
    by_recipe = {name: of for name in recipes if (of := [row for row in rows if row.recipe == name])}
    report(arguments.folder, by_recipe, cases, arguments.steps)


def measured(
    arguments: argparse.Namespace, recipes: Sequence[str], numbers_of_steps: Sequence[int], settings: Sequence[str]
) -> tuple[list[Row], list[Edit]]:
    """All results of the chosen recipes in the folder, those that it lacks made now, and the edits.

    settings: the arguments that all results of a folder have in common.
    """
    folder = arguments.folder
    folder.mkdir(parents=True, exist_ok=True)
    weights = hashlib.sha256(b"".join(path.read_bytes() for path in FILES[arguments.model])).hexdigest()[:12]
    check_settings(
        folder / "settings.json", {name: getattr(arguments, name) for name in settings} | {"weights": weights}
    )
    chosen = [name for name in recipes if any(text in name for text in arguments.only or [""])]
    if not chosen:
        raise SystemExit(f"No recipe holds {' or '.join(arguments.only)}; there are: {'; '.join(recipes)}.")
    results = Results(folder / "edits.csv")
    cases = draw_cases(arguments.edits, arguments.seed, arguments.kinds)
    loaded = demo_model.load(few_steps=arguments.model == "few-step")
    if arguments.model == "flow":
        loaded = load_flow(), *loaded[1:]
    elif arguments.model == "instruct":
        loaded = load_instruct()
    comfy.utils.PROGRESS_BAR_ENABLED = False
    with tqdm(total=len(cases) * len(chosen) * len(numbers_of_steps), unit="edit") as bar:
        for first in range(0, len(cases), arguments.batch):
            numbers = range(first, min(first + arguments.batch, len(cases)))
            outcomes: list[Outcomes] = []
            for steps in numbers_of_steps:
                missing = [recipe for recipe in chosen if not results.hold(recipe, steps, numbers)]
                bar.update((len(chosen) - len(missing)) * len(numbers))
                if missing:
                    batch = Batch(loaded, [cases[i] for i in numbers], arguments, steps)
                    outcomes = outcomes or [Outcomes(case) for case in batch.cases]
                for recipe in missing:
                    bar.set_postfix_str(f"{recipe}, {steps} steps")
                    results.add(score(batch, outcomes, recipe, numbers, loaded[2], pictures_of(folder, steps)))
                    bar.update(len(numbers))
    return [row for row in results.rows if row.recipe in chosen and row.steps in numbers_of_steps], cases


def pictures_of(folder: Path, steps: int) -> Path:
    return folder / "pictures" / f"{steps} steps"


def check_settings(path: Path, settings: dict) -> None:
    """Raises SystemExit where results of other settings lie beside `path`."""
    if path.exists() and (before := json.loads(path.read_text())) != settings:
        changed = [name for name in settings if before.get(name) != settings[name]]
        other = ", ".join(f"{name} {before.get(name)} (now {settings[name]})" for name in changed)
        raise SystemExit(f"{path.parent} holds results of other settings: {other}; name another --folder.")
    path.write_text(json.dumps(settings))


class Results:
    """The CSV file of all results, a recipe's batch written at once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[Row] = []
        if path.exists():
            with path.open(newline="") as file:
                self.rows = [Row.read(line) for line in csv.DictReader(file)]

    def hold(self, recipe: str, steps: int, numbers: Iterable[int]) -> bool:
        return set(numbers) <= {row.case for row in self.rows if (row.recipe, row.steps) == (recipe, steps)}

    def add(self, rows: list[Row]) -> None:
        done = {row[:3] for row in rows}
        self.rows = [row for row in self.rows if row[:3] not in done] + rows
        partial_file = self.path.with_suffix(".partial")
        with partial_file.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(Row._fields)
            writer.writerows(self.rows)
        partial_file.replace(self.path)


def draw_cases(count: int, seed: int, kinds: Sequence[str] = EDITS) -> list[Edit]:
    rng = random.Random(seed)
    return [demo_edits.draw(rng, kinds[number % len(kinds)]) for number in range(count)]


def score(
    batch: Batch, outcomes: Sequence[Outcomes], recipe: str, numbers: Sequence[int], vae, pictures: Path
) -> list[Row]:
    try:
        latent, spent = edit(batch, recipe)
    except ValueError as error:
        refused = 0.0, 0.0, False, False, 0.0, 0.0, str(error)
        return [Row(recipe, batch.steps, i, case.kind, *refused) for i, case in zip(numbers, batch.cases, strict=True)]
    each, rows = Spent(*(value / len(numbers) for value in spent)), []
    for number, image, outcome in zip(numbers, decode(vae, latent), outcomes, strict=True):
        case, verdict = outcome.edit, outcome.judge(image)
        rows.append(Row(recipe, batch.steps, number, case.kind, *errors(image, case), *verdict, *each))
        if number < len(EDITS):
            save(pictures / f"{number}", recipe, image)
    return rows


# --- what is made of the results ---


def save(folder: Path, recipe: str, image: np.ndarray) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray((image.clip(0, 1) * 255).round().astype(np.uint8))
    picture.save(folder / f"{recipe}.png")


def report(folder: Path, by_recipe: dict[str, list[Row]], cases: Sequence[Edit], steps: int) -> None:
    """`table.md`, `plot.png` and a sheet of pictures for every kind of edit."""
    table = tabled(by_recipe)
    (folder / "table.md").write_text(table)
    print(table)
    plot({name: of for name, of in by_recipe.items() if not of[0].refused}, folder / "plot.png")
    for number, case in enumerate(cases[: len(EDITS)]):
        found = [(name, pictures_of(folder, steps) / f"{number}" / f"{name}.png") for name in by_recipe]
        sheet(case, [(name, path) for name, path in found if path.exists()]).save(folder / f"{case.kind}.png")


def tabled(by_recipe: dict[str, list[Row]]) -> str:
    """Markdown: means, and how many of each kind show the asked change and nothing else."""
    drawn = [kind for kind in EDITS if any(row.kind == kind for rows in by_recipe.values() for row in rows)]
    lines = [
        "| recipe | inside, dB | outside, dB | shown | and nothing else | rows | " + " | ".join(drawn) + " |",
        "|---|---|---|---|---|---|" + "---|" * len(drawn),
    ]
    refusals = []
    for name, rows in by_recipe.items():
        if rows[0].refused:
            refusals.append(f"{name}: {rows[0].refused}")
            continue
        inside, outside = (np.nanmean([getattr(row, side) for row in rows]) for side in ("inside", "outside"))
        kinds = [[row.only for row in rows if row.kind == kind] for kind in drawn]
        counts = [f"{sum(row.shown for row in rows)}/{len(rows)}", f"{sum(row.only for row in rows)}/{len(rows)}"]
        cells = [f"{inside:.1f}", f"{outside:.1f}", *counts, f"{np.mean([row.rows for row in rows]):.0f}"]
        cells += [f"{sum(only)}/{len(only)}" for only in kinds]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", *(f"- Refused: {refusal}" for refusal in refusals)]) + "\n"


def plot(by_recipe: dict[str, list[Row]], path: Path) -> None:
    """Preservation against success, one point a recipe, one colour an editor."""
    figure = Figure((9, 6), layout="constrained")
    axes = figure.subplots()
    editors = list(dict.fromkeys(name.split(" + ")[-1].split(" at ")[0] for name in by_recipe))
    for name, rows in by_recipe.items():
        editor = name.split(" + ")[-1].split(" at ")[0]
        x, y = np.nanmean([row.outside for row in rows]), 100 * np.mean([row.only for row in rows])
        axes.scatter(x, y, color=f"C{editors.index(editor)}", label=editor)
        axes.annotate(name.removesuffix(f" + {editor}"), (x, y), (4, 3), textcoords="offset points", fontsize=6)
    axes.set_xlabel("outside the change, dB to the true answer")
    axes.set_ylabel("asked change and nothing else, %")
    handles, labels = axes.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    axes.legend(unique.values(), unique.keys())
    figure.savefig(path, dpi=150)


def sheet(case: Edit, tiles: Sequence[tuple[str, Path]], columns: int = 8) -> Image.Image:
    """Source, answer and every recipe's picture of one edit, each with its name beneath."""
    named = [("source", scenes.render(case.source)), ("answer", scenes.render(case.target))]
    pictures = [(name, Image.fromarray((image * 255).round().astype(np.uint8))) for name, image in named]
    pictures += [(name, Image.open(path)) for name, path in tiles]
    width, height = scenes.SIZE + 6, scenes.SIZE + 26
    page = Image.new("RGB", (columns * width, 16 + -(-len(pictures) // columns) * height), "white")
    draw = ImageDraw.Draw(page)
    draw.text((3, 2), f"{case.source.caption}  to  {case.target.caption}", fill="black")
    for number, (name, picture) in enumerate(pictures):
        x, y = number % columns * width + 3, 16 + number // columns * height
        page.paste(picture, (x, y))
        draw.text((x, y + scenes.SIZE), name.replace(" + ", "\n", 1), fill="black", font_size=9, spacing=1)
    return page
