#!/usr/bin/env bash
# Pictures named after their prompts, read as a folder by datasets.
#
# Guess, written first: every picture of a flat folder is in the split "train", whatever words the file names hold; only
# folders called train or test are splits. With a metadata.jsonl of file names and prompts, there is a row for each line.
#
# Seen with datasets 5.2.0: one file name with "train", "test" or "dev" as a word of its own makes that split of the
# pictures so named, and all others are left out, without error or warning, though metadata.jsonl lists them. A folder of
# edits with "a train in the snow.png" among them holds that one picture; one with "flux-dev_00001_.png" has no "train".
# "red trainers.png" does no harm, nor does the same folder given as a glob of files (data_files).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check datasets==5.2.0 pillow==13.0.0
cd "$folder"
export HF_HOME="$folder/cache" HF_HUB_OFFLINE=1
"$folder/venv/bin/python" - <<'PYTHON'
import json
import logging
import warnings
from pathlib import Path

import datasets
from PIL import Image

TRAIN = ["a cat.png", "a dog.png", "a train in the snow.png"]
FOLDERS = {
    "plain": ["a cat.png", "a dog.png", "red trainers.png"],
    "train": TRAIN,
    "train, with metadata": TRAIN,
    "train, as a glob": TRAIN,
    "test": ["a cat.png", "a_test_picture.png"],
    "dev": ["krea_00001_.png", "flux-dev_00001_.png"],
}
EXPECTED = {
    "plain": {"train": FOLDERS["plain"]},
    "train": {"train": ["a train in the snow.png"]},
    "train, with metadata": {"train": ["a train in the snow.png"]},
    "train, as a glob": {"train": TRAIN},
    "test": {"test": ["a_test_picture.png"]},
    "dev": {"validation": ["flux-dev_00001_.png"]},
}
said = []


class Listener(logging.Handler):
    def emit(self, record):
        said.append(record.getMessage())


logging.getLogger("datasets").addHandler(Listener(logging.WARNING))
warnings.showwarning = lambda message, *_: said.append(str(message))
datasets.disable_progress_bars()


def read(number, kind, names):
    folder = Path(f"pictures{number}").absolute()
    folder.mkdir()
    for name in names:
        Image.new("RGB", (8, 8)).save(folder / name)
    if "metadata" in kind:
        lines = (json.dumps({"file_name": name, "prompt": name.removesuffix(".png")}) for name in names)
        (folder / "metadata.jsonl").write_text("\n".join(lines))
    where = {"data_files": str(folder / "*.png")} if "glob" in kind else {"data_dir": str(folder)}
    splits = datasets.load_dataset("imagefolder", **where)
    return {name: sorted(Path(row["image"].filename).name for row in rows) for name, rows in splits.items()}


seen = {kind: read(number, kind, names) for number, (kind, names) in enumerate(FOLDERS.items())}
for kind, splits in seen.items():
    print(f"{kind}: {len(FOLDERS[kind])} pictures, {splits}")
print("warnings:", said)
assert seen == EXPECTED
assert not said
PYTHON
