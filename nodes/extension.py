"""All nodes of the pack."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from . import demo, inversion, p2p, prompt, trajectory

NODES: list[type[io.ComfyNode]] = [
    inversion.DDIMInversion,
    inversion.RecordTrajectory,
    trajectory.SaveTrajectory,
    trajectory.LoadTrajectory,
    prompt.PromptEdit,
    p2p.P2PAttentionController,
    demo.LoadDemoModel,
    demo.DemoScene,
]


class Palimpsest(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return NODES
