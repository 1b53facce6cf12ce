#!/usr/bin/env bash
# Prompts of ComfyUI's pictures, read back by sd-parsers.
#
# Guess, written first: the graph that ComfyUI writes into its PNGs is walked from the picture back, so the prompts are
# found whichever of ComfyUI's own samplers made it, and through the nodes that a conditioning or a text passes.
#
# Seen with sd-parsers 0.6, on minimal graphs of ComfyUI 0.30's own nodes: the prompts are found beneath KSampler, beside
# ConditioningZeroOut as well. Beneath SamplerCustom and SamplerCustomAdvanced (so in most pictures of flow models)
# neither prompt nor sampler is found. Beneath KSampler, a positive prompt that passes ConditioningCombine, or whose text
# comes from a string node, is missing while the negative one is there, so a picture seems to have been made without words.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check sd-parsers==0.6 pillow==12.1.0
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import json

from PIL import Image
from PIL.PngImagePlugin import PngInfo
from sd_parsers import ParserManager


def node(kind, **inputs):
    return {"class_type": kind, "inputs": inputs}


COMMON = {
    "1": node("CheckpointLoaderSimple", ckpt_name="model.safetensors"),
    "2": node("CLIPTextEncode", text="a red cat", clip=["1", 1]),
    "3": node("CLIPTextEncode", text="blurry", clip=["1", 1]),
    "4": node("EmptyLatentImage", width=512, height=512, batch_size=1),
    "6": node("VAEDecode", samples=["5", 0], vae=["1", 2]),
    "7": node("SaveImage", images=["6", 0], filename_prefix="picture"),
    "8": node("KSamplerSelect", sampler_name="euler"),
    "9": node("BasicScheduler", model=["1", 0], scheduler="normal", steps=20, denoise=1.0),
}


def ksampler(positive, negative=("3", 0)):
    inputs = {"seed": 1, "steps": 20, "cfg": 7.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0}
    return node("KSampler", model=["1", 0], positive=positive, negative=list(negative), latent_image=["4", 0], **inputs)


PLAIN = {"model": ["1", 0], "positive": ["2", 0], "negative": ["3", 0], "cfg": 7.0}
CUSTOM = {"sampler": ["8", 0], "sigmas": ["9", 0], "latent_image": ["4", 0]}
GRAPHS = {
    "KSampler": {"5": ksampler(["2", 0])},
    "ConditioningZeroOut": {
        "5": ksampler(["2", 0], ("10", 0)),
        "10": node("ConditioningZeroOut", conditioning=["2", 0]),
    },
    "SamplerCustom": {"5": node("SamplerCustom", add_noise=True, noise_seed=1, **PLAIN, **CUSTOM)},
    "SamplerCustomAdvanced": {
        "5": node("SamplerCustomAdvanced", noise=["10", 0], guider=["11", 0], **CUSTOM),
        "10": node("RandomNoise", noise_seed=1),
        "11": node("CFGGuider", **PLAIN),
    },
    "ConditioningCombine": {
        "5": ksampler(["10", 0]),
        "10": node("ConditioningCombine", conditioning_1=["2", 0], conditioning_2=["11", 0]),
        "11": node("CLIPTextEncode", text="on a mat", clip=["1", 1]),
    },
    "PrimitiveString": {
        "5": ksampler(["2", 0]),
        "2": node("CLIPTextEncode", text=["10", 0], clip=["1", 1]),
        "10": node("PrimitiveString", value="a red cat"),
    },
}
EXPECTED = {  # positive, negative, samplers
    "KSampler": (["a red cat"], ["blurry"], ["euler"]),
    "ConditioningZeroOut": (["a red cat"], [], ["euler"]),
    "SamplerCustom": ([], [], []),
    "SamplerCustomAdvanced": ([], [], []),
    "ConditioningCombine": ([], ["blurry"], ["euler"]),
    "PrimitiveString": ([], ["blurry"], ["euler"]),
}


def read(graph):
    info = PngInfo()
    info.add_text("prompt", json.dumps(COMMON | graph))
    info.add_text("workflow", json.dumps({"nodes": [], "links": []}))
    Image.new("RGB", (8, 8)).save("picture.png", pnginfo=info)
    found = ParserManager().parse("picture.png")
    prompts = ([text.value for text in side] for side in (found.prompts, found.negative_prompts))
    return (*prompts, [sampler.name for sampler in found.samplers])


seen = {name: read(graph) for name, graph in GRAPHS.items()}
for name, (positive, negative, samplers) in seen.items():
    print(f"{name}: prompts {positive}, negative {negative}, samplers {samplers}")
assert seen == EXPECTED
PYTHON
