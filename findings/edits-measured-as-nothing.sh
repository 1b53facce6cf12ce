#!/usr/bin/env bash
# An edit of an 8-bit picture, or of one with alpha, measured by flip-evaluator.
#
# Guess, written first: a picture and its edit have the same error as uint8 arrays and as floats of 0 to 1.
#
# Seen with flip-evaluator 1.7: a meadow with a red square in it is 0.27 from the meadow, as floats and as PNG files. As
# uint8 arrays, which its docstring does not allow for but the function takes, the error is 0.0: values above 1 count as
# 1, so any two pictures without zeros are the same. Floats with four channels are read as if there were three, so other
# colours are compared and the last quarter of the rows never: an edit there is 0.0 too. No error, no warning.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check flip-evaluator==1.7 numpy==2.4.6 pillow==13.0.0
cd "$folder"
"$folder/venv/bin/python" -W error - <<'PYTHON'
import flip_evaluator
import numpy as np
from PIL import Image

down, across = np.mgrid[:64, :64]
meadow = np.stack([40 + across, 120 + down, 60 + across // 2], axis=2).astype(np.uint8)
inside, below = meadow.copy(), meadow.copy()
inside[16:48, 16:48] = below[52:64] = (230, 25, 25)


def floats(picture):
    return (picture / 255).astype(np.float32)


def with_alpha(picture):
    return np.concatenate([floats(picture), np.ones((64, 64, 1), np.float32)], axis=2)


def file(picture):
    name = f"{picture.sum()}.png"
    Image.fromarray(picture).save(name)
    return name


def error(form, edit):
    return round(float(flip_evaluator.evaluate(form(meadow), form(edit), "LDR", applyMagma=False)[1]), 3)


FORMS = {"floats": floats, "PNG files": file, "uint8": np.copy, "floats with alpha": with_alpha}
seen = {name: (error(form, inside), error(form, below)) for name, form in FORMS.items()}
for name, (square, strip) in seen.items():
    print(f"{name}: a square in the middle is {square}, a strip along the bottom {strip}")
assert seen == {
    "floats": (0.273, 0.204),
    "PNG files": (0.273, 0.204),
    "uint8": (0.0, 0.0),
    "floats with alpha": (0.155, 0.0),
}
PYTHON
