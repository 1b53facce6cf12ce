"""A workflow with another picture and other prompts in it: what runs it on many pictures puts in and takes out."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .servers import Prompt

DECODERS = ("VAEDecode", "VAEDecodeTiled", "PalimpsestEditSampler")
SAVED = "edited"  # id of the node that saves the edited picture; the host's own ids are numbers
SCENE, LOADER, PROMPTS, BLEND = "PalimpsestDemoScene", "LoadImage", "PalimpsestPromptEdit", "PalimpsestLocalBlend"
INSTRUCTED = ("PalimpsestInstructGuidance", "InstructPixToPixConditioning")


def read_workflow(path: Path) -> Prompt:
    """Raises ValueError, naming the file, for what is no workflow in the API format, and OSError."""
    try:
        workflow = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON file: {error}") from error
    nodes = list(workflow.values()) if isinstance(workflow, dict) else []
    if not nodes or not all(isinstance(node, dict) and {"class_type", "inputs"} <= node.keys() for node in nodes):
        raise ValueError(f"{path} is no workflow in the API format: save it by File, Export (API)")
    return workflow


class Template:
    """A workflow in the host's API format, as far as one decoder needs it.

    Pictures go to Load Image, prompts to Prompt Edit. A Demo Scene stands for both: it becomes a Load Image, and the
    inputs that its captions went to get the prompts. Where an InstructPix2Pix is at work, the instruction goes to the
    CLIP Text Encode of the positive. Raises ValueError for a workflow without such places.
    """

    def __init__(self, workflow: Prompt, decoder: str | None = None) -> None:
        decoders = [node_id for node_id, node in workflow.items() if node["class_type"] in DECODERS]
        if decoder is None and len(decoders) == 1:
            decoder = decoders[0]
        if decoder not in decoders:
            raise ValueError(
                f"the workflow decodes pictures in the nodes {', '.join(decoders) or 'none'}: name one by --decoder"
            )
        needed = set(_needed(workflow, decoder))
        self.nodes = {node_id: copy.deepcopy(node) for node_id, node in workflow.items() if node_id in needed}
        output = 1 if self.nodes[decoder]["class_type"] == "PalimpsestEditSampler" else 0
        saving = {"images": [decoder, output], "filename_prefix": "palimpsest/edited"}
        self.nodes[SAVED] = {"class_type": "SaveImage", "inputs": saving}
        self.places = {name: list(self._places(name)) for name in ("image", "source_prompt", "target_prompt")}
        self.places["instruction"] = list(self._instructions())
        wanted = [("image", "Load Image")]
        if not self.places["instruction"]:
            wanted.append(("target_prompt", "Prompt Edit"))
        for name, what in wanted:
            if not self.places[name]:
                raise ValueError(f"the workflow has no {what} in front of its decoder, where the {name} could go")
        for node in self.nodes.values():
            if node["class_type"] == SCENE:
                node |= {"class_type": LOADER, "inputs": {"image": ""}}

    def _places(self, name: str) -> Iterator[tuple[str, str]]:
        """The nodes and inputs that the picture or a prompt goes to."""
        scenes = [node_id for node_id, node in self.nodes.items() if node["class_type"] == SCENE]
        for node_id, node in self.nodes.items():
            kind = node["class_type"]
            if name == "image" and kind in (LOADER, SCENE) or name != "image" and kind == PROMPTS:
                yield node_id, name
            slot = {"source_prompt": 1, "target_prompt": 2}.get(name)
            for key, value in node["inputs"].items():
                if kind != PROMPTS and value in [[scene, slot] for scene in scenes]:
                    yield node_id, key

    def _instructions(self) -> Iterator[tuple[str, str]]:
        """The texts that an InstructPix2Pix is guided by."""
        if any(node["class_type"] in INSTRUCTED for node in self.nodes.values()):
            positives = {node["inputs"]["positive"][0] for node in self.nodes.values() if "positive" in node["inputs"]}
            for node_id, node in self.nodes.items():
                if node_id in positives and node["class_type"] == "CLIPTextEncode":
                    yield node_id, "text"

    def filled(
        self,
        image: str,
        source_prompt: str,
        target_prompt: str,
        words: str | None = None,
        instruction: str | None = None,
    ) -> Prompt:
        """The prompt for one picture, by its name in the server's input folder. `words` are those of Local Blend.

        Raises ValueError where the workflow follows an instruction and there is none.
        """
        if self.places["instruction"] and not (instruction or "").strip():
            raise ValueError("its instruction is empty, which the workflow's InstructPix2Pix follows")
        nodes = copy.deepcopy(self.nodes)
        values = {"image": image, "source_prompt": source_prompt, "target_prompt": target_prompt}
        for name, value in (values | {"instruction": instruction}).items():
            for node_id, key in self.places[name]:
                nodes[node_id]["inputs"][key] = value
        for node in nodes.values():
            if node["class_type"] == BLEND and words is not None:
                node["inputs"]["words"] = words
        return nodes


def _needed(workflow: Prompt, node_id: str) -> Iterator[str]:
    yield node_id
    for value in workflow[node_id]["inputs"].values():
        if _is_link(value):
            yield from _needed(workflow, value[0])


def _is_link(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and isinstance(value[0], str)
