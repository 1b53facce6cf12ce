#!/usr/bin/env bash
# A workflow with a bypassed node, made into a prompt of ComfyUI's API by comfyui-autograph.
#
# Guess, written first: what a bypassed node would have read goes on to the node behind it, as in ComfyUI's browser.
#
# Seen with comfyui-autograph 2.3.0: the first input of a type goes to every output of it, where the browser first takes
# the input in the output's own place. Behind a bypassed ControlNetApplyAdvanced, KSampler's negative is the positive
# prompt, so guidance has nothing to lead away from, whatever cfg says, and the negative prompt is unused. It calls that a
# success, without a warning.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check comfyui-autograph==2.3.0
cd "$folder"
"$folder/venv/bin/python" -W error - <<'PYTHON'
import json

from autograph.convert import workflow_to_api_format_with_errors

# What ComfyUI's /object_info says of these nodes, as far as the workflow needs it.
TEXT, FLOAT = ("STRING", {"multiline": True}), ("FLOAT", {})
INT, SEED = ("INT", {}), ("INT", {"control_after_generate": True})
SAMPLERS, SCHEDULERS = (["euler"], {}), (["normal"], {})
INPUTS = {
    "CheckpointLoaderSimple": {"ckpt_name": (["model.safetensors"], {})},
    "CLIPTextEncode": {"text": TEXT, "clip": ("CLIP", {})},
    "EmptyLatentImage": {"width": INT, "height": INT, "batch_size": INT},
    "LoadImage": {"image": (["pose.png"], {"image_upload": True})},
    "ControlNetLoader": {"control_net_name": (["pose.safetensors"], {})},
    "ControlNetApplyAdvanced": {
        **{"positive": ("CONDITIONING", {}), "negative": ("CONDITIONING", {}), "control_net": ("CONTROL_NET", {})},
        **{"image": ("IMAGE", {}), "strength": FLOAT, "start_percent": FLOAT, "end_percent": FLOAT},
    },
    "KSampler": {
        **{"model": ("MODEL", {}), "seed": SEED, "steps": INT, "cfg": FLOAT, "sampler_name": SAMPLERS},
        **{"scheduler": SCHEDULERS, "positive": ("CONDITIONING", {}), "negative": ("CONDITIONING", {})},
        **{"latent_image": ("LATENT", {}), "denoise": FLOAT},
    },
    "VAEDecode": {"samples": ("LATENT", {}), "vae": ("VAE", {})},
    "SaveImage": {"images": ("IMAGE", {}), "filename_prefix": ("STRING", {})},
}
INFO = {
    name: {"input": {"required": inputs}, "input_order": {"required": list(inputs)}} for name, inputs in INPUTS.items()
}
INFO = json.loads(json.dumps(INFO))
NODES = [  # number, class, linked inputs with the number and slot that they come from, outputs, widgets
    (1, "CheckpointLoaderSimple", {}, ["MODEL", "CLIP", "VAE"], ["model.safetensors"]),
    (2, "CLIPTextEncode", {"clip": (1, 1)}, ["CONDITIONING"], ["a red cat"]),
    (3, "CLIPTextEncode", {"clip": (1, 1)}, ["CONDITIONING"], ["blurry"]),
    (4, "EmptyLatentImage", {}, ["LATENT"], [512, 512, 1]),
    (5, "LoadImage", {}, ["IMAGE", "MASK"], ["pose.png", "image"]),
    (6, "ControlNetLoader", {}, ["CONTROL_NET"], ["pose.safetensors"]),
    (
        *(7, "ControlNetApplyAdvanced"),
        {"positive": (2, 0), "negative": (3, 0), "control_net": (6, 0), "image": (5, 0)},
        *(["CONDITIONING", "CONDITIONING"], [1.0, 0.0, 1.0]),
    ),
    (
        *(8, "KSampler"),
        {"model": (1, 0), "positive": (7, 0), "negative": (7, 1), "latent_image": (4, 0)},
        *(["LATENT"], [1, "fixed", 20, 7.0, "euler", "normal", 1.0]),
    ),
    (9, "VAEDecode", {"samples": (8, 0), "vae": (1, 2)}, ["IMAGE"], []),
    (10, "SaveImage", {"images": (9, 0)}, [], ["picture"]),
]


def workflow(bypassed):
    nodes, links = {}, []
    for number, kind, inputs, outputs, widgets in NODES:
        slots = [{"name": kind.lower(), "type": kind, "links": []} for kind in outputs]
        nodes[number] = {"id": number, "type": kind, "mode": 4 if number == bypassed else 0, "inputs": []}
        nodes[number] |= {"outputs": slots, "widgets_values": widgets, "properties": {}}
        for slot, (name, (origin, place)) in enumerate(inputs.items()):
            link, output = len(links) + 1, nodes[origin]["outputs"][place]
            links.append([link, origin, place, number, slot, output["type"]])
            output["links"].append(link)
            nodes[number]["inputs"].append({"name": name, "type": output["type"], "link": link})
    last = {"last_node_id": 10, "last_link_id": len(links)}
    return {"version": 0.4, **last, "nodes": list(nodes.values()), "links": links}


def sampler(bypassed):
    result = workflow_to_api_format_with_errors(workflow(bypassed), node_info=INFO, use_api=True)
    assert result.success and not result.errors and not result.warnings, (result.errors, result.warnings)
    inputs = result.data["8"]["inputs"]
    assert (inputs["seed"], inputs["cfg"], inputs["denoise"]) == (1, 7.0, 1.0)
    return [(str(number), place) for number, place in (inputs["positive"], inputs["negative"])]


seen = {"used": sampler(None), "bypassed": sampler(7)}
for name, (positive, negative) in seen.items():
    print(f"{name}: positive is from {positive}, negative from {negative}")
assert seen == {"used": [("7", 0), ("7", 1)], "bypassed": [("2", 0), ("2", 0)]}
PYTHON
