#!/usr/bin/env bash
# White of an 8-bit PNG, read as floating point by PyAV.
#
# Guess, written first: ComfyUI's Load Image reads pictures with PyAV as 32-bit floats (format gbrpf32le), in which white
# is 1.0 whatever the file's depth; a white mask painted in any program is then a mask of ones.
#
# Seen with av 18.1.0 (FFmpeg's own conversion, no setting of ours): white of 8-bit files is 0.9961, for values are
# divided by 256; white of 16-bit files is 1.0. Grey files reach nodes that way, so a mask of 8-bit white keeps 0.4 % of
# what it should replace.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check av==18.1.0 numpy==2.4.6 pillow==13.0.0
"$folder/venv/bin/python" - <<'PYTHON'
import io

import av
import numpy as np
from PIL import Image

WHITE = {
    "8-bit grey": np.full((32, 32), 255, np.uint8),
    "8-bit RGB": np.full((32, 32, 3), 255, np.uint8),
    "16-bit grey": np.full((32, 32), 65535, np.uint16),
}
EXPECTED = {"8-bit grey": 0.9961, "8-bit RGB": 0.9962, "16-bit grey": 1.0}

for name, pixels in WHITE.items():
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    file.seek(0)
    with av.open(file) as container:
        frame = next(container.decode(video=0))
    white = float(frame.to_ndarray(format="gbrpf32le").max())
    print(f"av {av.__version__}, {name} ({frame.format.name}): white is {white:.4f}")
    assert abs(white - EXPECTED[name]) < 5e-5, f"{name}: {white} where {EXPECTED[name]} was seen"
PYTHON
