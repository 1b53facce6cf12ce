"""What an edit is worth at 4 to 50 steps, against the rows of the network that it costs, with and without inversion.

Edits, recipes and scores are those of `bench truth`, whose settings are here the same at every number of steps. Results
are kept edit by edit in a CSV file, by which a run goes on where it was interrupted; two tables and a plot are made of
it, the second table beside the edit that `REFERENCE` names.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from .recipes import VIRTUAL
from .truth import SETTINGS, Row, add_shared_arguments, measured
from .truth import Results as Kept

matplotlib.use("agg")

EDITORS = ("naive", "P2P", "PnP", "MasaCtrl")
RECIPES = [f"DDIM + {editor}" for editor in EDITORS]
RECIPES += [
    f"{name} + {editor}"
    for name in ("second order", "O-BELM", "edit friendly", "TurboEdit")
    for editor in ("naive", "P2P")
]
RECIPES += [f"{name} + {editor}" for name in VIRTUAL for editor in EDITORS]
RECIPES += [f"{name} + InfEdit's control" for name in ("virtual FlowEdit", "virtual InfEdit")]
REFERENCE = "DDIM + P2P", 20
STYLES = dict(zip((*EDITORS, "InfEdit's control"), ("-", "--", ":", "-.", (0, (6, 1, 1, 1, 1, 1))), strict=True))
MEASURES = {"inside": "inside the change, dB", "outside": "outside it, dB", "shown": "asked change shown, %"}

Results = dict[tuple[str, int], list[Row]]
"""By recipe and number of steps, in order of the edits."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_shared_arguments(parser)
    parser.add_argument("--steps", type=int, nargs="+", default=[4, 8, 12, 20, 50], help="of the nodes, 4 to 50")
    parser.add_argument("--rows", type=float, default=16, help="the most that the second table shows")
    parser.add_argument(
        "--model", choices=("unet", "few-step"), default="unet", help="the demo model, or it with its LoRA"
    )
    parser.add_argument("--beside", type=Path, metavar="FOLDER", help="of the run that the second table refers to")
    parser.set_defaults(edits=40, cfg=3.0, folder=Path("steps"))


def run(arguments: argparse.Namespace) -> None:
    rows, _ = measured(arguments, RECIPES, arguments.steps, SETTINGS)
    results = grouped(rows)
    reference = results.get(REFERENCE) if arguments.beside is None else kept(arguments.beside, arguments)
    tables = tabled(results) + (compared(results, reference, arguments.rows) if reference else "")
    (arguments.folder / "table.md").write_text(tables)
    print(tables)
    figure = plot({key: of for key, of in results.items() if not of[0].refused})
    figure.savefig(arguments.folder / "plot.png", dpi=130)


def kept(folder: Path, arguments: argparse.Namespace) -> list[Row]:
    """The results of `REFERENCE` in the folder of another run. Raises SystemExit where it has none of these edits."""
    path = folder / "settings.json"
    before = json.loads(path.read_text()) if path.exists() else {}
    other = [name for name in ("edits", "kinds", "seed") if before.get(name) != getattr(arguments, name)]
    rows = grouped(Kept(folder / "edits.csv").rows).get(REFERENCE, [])
    if other or len(rows) < arguments.edits:
        raise SystemExit(
            f"{folder} holds no {REFERENCE[0]} at {REFERENCE[1]} steps of the same edits"
            + (f": other {', '.join(other)}." if before and other else ".")
        )
    return rows


def grouped(rows: Iterable[Row]) -> Results:
    found: Results = {}
    for row in sorted(rows, key=lambda row: (RECIPES.index(row.recipe), row.steps, row.case)):
        found.setdefault((row.recipe, row.steps), []).append(row)
    return found


def mean(rows: list[Row], field: str) -> float:
    """NaN outside the change of a whole picture, which counts for nothing."""
    return float(np.nanmean([getattr(row, field) for row in rows]))


def tabled(results: Results) -> str:
    """Markdown: means over the edits, rows and seconds of one image's edit with its inversion."""
    lines = ["| recipe | steps | rows | inside, dB | outside, dB | shown | and nothing else | s |", "|---" * 8 + "|"]
    refusals = {}
    for (recipe, steps), rows in results.items():
        if rows[0].refused:
            refusals[f"{recipe}: {rows[0].refused}"] = None
            continue
        counts = [f"{sum(getattr(row, name) for row in rows)}/{len(rows)}" for name in ("shown", "only")]
        means = [f"{mean(rows, name):.1f}" for name in ("inside", "outside")]
        cells = [recipe, f"{steps}", f"{mean(rows, 'rows'):g}", *means, *counts, f"{mean(rows, 'seconds'):.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", *(f"- Refused: {refusal}" for refusal in refusals)]) + "\n"


def compared(results: Results, reference: list[Row], most: float) -> str:
    """Markdown: differences from `REFERENCE`, edit by edit, with their standard errors, of what costs `most` rows."""
    rows, shown = mean(reference, "rows"), sum(row.shown for row in reference)
    lines = [
        f"\nBeside {REFERENCE[0]} at {REFERENCE[1]} steps ({rows:g} rows, {shown}/{len(reference)} shown):\n",
        "| recipe | steps | rows | inside, dB | outside, dB | shown | of its time |",
        "|---" * 7 + "|",
    ]
    for (recipe, steps), rows in results.items():
        if rows[0].refused or mean(rows, "rows") > most:
            continue
        gaps = [difference(rows, reference, field) for field in ("inside", "outside")]
        more = sum(row.shown for row in rows) - shown
        time = mean(rows, "seconds") / mean(reference, "seconds")
        lines.append(f"| {recipe} | {steps} | {mean(rows, 'rows'):g} | {' | '.join(gaps)} | {more:+d} | {time:.2f} |")
    return "\n".join(lines) + "\n"


def difference(rows: list[Row], reference: list[Row], field: str) -> str:
    gaps = np.array([getattr(row, field) - getattr(other, field) for row, other in zip(rows, reference, strict=True)])
    gaps = gaps[~np.isnan(gaps)]
    return f"{gaps.mean():+.2f} ± {gaps.std(ddof=1) / len(gaps) ** 0.5:.2f}"


def plot(results: Results) -> Figure:
    """Each measure against rows: one line a recipe, a colour for its inversion and a dash for its editor."""
    figure = Figure((15, 6), layout="constrained")
    panels = figure.subplots(1, len(MEASURES))
    recipes = list(dict.fromkeys(recipe for recipe, _ in results))
    inversions = list(dict.fromkeys(recipe.split(" + ")[0] for recipe in recipes))
    for axes, (field, label) in zip(panels, MEASURES.items(), strict=True):
        for recipe in recipes:
            inversion, editor = recipe.split(" + ")
            of = [rows for (name, _), rows in results.items() if name == recipe]
            scale = 100 if field == "shown" else 1
            points = [mean(rows, "rows") for rows in of], [scale * mean(rows, field) for rows in of]
            look = {"color": f"C{inversions.index(inversion)}", "linestyle": STYLES[editor], "linewidth": 1}
            axes.plot(*points, marker=".", label=recipe, **look)
        axes.set_xscale("log")
        axes.set_xticks([10, 20, 50, 100, 200], ["10", "20", "50", "100", "200"])
        axes.set_xlabel("rows of the network an edit")
        axes.set_title(label, fontsize=10)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    return figure
