#!/usr/bin/env bash
# Transposed arrays, saved by safetensors.numpy.
#
# Guess, written first: an array that is a transposed view comes back from a file with the values it had.
#
# Seen with safetensors 0.8.0: the file has the view's shape and its buffer's order, so the values come back in the wrong
# places, and nothing is said. The docstring asks for contiguous tensors; 0.7.0 saved these correctly, so a script that
# transposes a LoRA's matrix, or turns a picture to channels first, writes another file after an update of the library.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check numpy==2.4.6 safetensors==0.8.0
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check --no-deps --target "$folder/before" safetensors==0.7.0
cat > "$folder/look.py" <<'PYTHON'
import sys
import warnings

import numpy as np
import safetensors
from safetensors.numpy import load_file, save_file

warnings.simplefilter("error")
folder, version, *expected = sys.argv[1:]
assert safetensors.__version__ == version
up = np.arange(6, dtype=np.float32).reshape(2, 3)
picture = np.arange(12, dtype=np.float32).reshape(2, 2, 3)
arrays = {"up": up, "up.T": up.T, "channels first": picture.transpose(2, 0, 1)}
arrays["up.T copied"] = np.ascontiguousarray(up.T)
save_file(arrays, f"{folder}/arrays.safetensors")
found = load_file(f"{folder}/arrays.safetensors")
kept = sorted(name for name, array in arrays.items() if np.array_equal(found[name], array))
print(f"safetensors {version}: up.T {up.T.tolist()} comes back as {found['up.T'].tolist()}; kept are {kept}")
assert all(found[name].shape == array.shape for name, array in arrays.items())
assert kept == sorted(expected), f"{kept} where {expected} was seen"
PYTHON
"$folder/venv/bin/python" "$folder/look.py" "$folder" 0.8.0 up "up.T copied"
PYTHONPATH="$folder/before" "$folder/venv/bin/python" "$folder/look.py" "$folder" 0.7.0 up up.T "up.T copied" "channels first"
