"""What else a flow model may carry: edits run beside it as beside the plain loop, or refuse it in a sentence."""

from __future__ import annotations

from dataclasses import replace

import comfy.supported_models as supported
import pytest
import torch
from comfy_extras.nodes_context_windows import ContextWindowsManualNode

from flows import FLOWS, WAN, Flow, model, randn
from palimpsest.inversion.flow_edit import edit_image
from palimpsest.inversion.run import Guidance, resample
from palimpsest.inversion.virtual import invert_virtually
from palimpsest.nodes.inject import MasaCtrlNode
from test_flow_edit import CFG, STEPS, Parts, close, noises, paper
from test_flow_reads import KV, blocks_of, pair, setting
from tiny import execute

WAN_5B = replace(
    FLOWS["Wan"],
    name="Wan 2.2 5B",
    make=lambda: model(supported.WAN22_T2V, WAN | {"in_dim": 48, "out_dim": 48}),
    latent=(1, 48, 2, 8, 8),
)


def test_a_noise_level_of_each_token() -> None:
    """Wan 2.2 5B has one for each frame where a noise mask says so, as LTX-Video has for each token."""
    parts = Parts(WAN_5B)
    edited = edit_image(parts.model, parts.source, parts.image)
    assert close(parts.sample(edited), paper(parts, noises(parts.image, STEPS)))
    mask = torch.zeros(1, 1, 1, 8, 8)
    mask[..., :4] = 1
    virtual, _ = invert_virtually(parts.model, parts.source, parts.image, parts.sigmas)
    for one, node in ((edited, "Flow Edit"), (virtual, "Virtual Inversion")):
        with pytest.raises(ValueError, match=rf"this MODEL \(WAN22\) takes .* {node} has noise everywhere: remove Set"):
            parts.sample(one, mask=mask)


def with_references(flow: Flow, method: str) -> Flow:
    """Every prompt with an image of its own to look at, as Flux Kontext takes it."""

    def prompt(seed: int, tokens: int) -> list:
        [[embedding, values]] = flow.prompt(seed, tokens)
        return [
            [
                embedding,
                {**values, "reference_latents": [randn(seed, *flow.latent)], "reference_latents_method": method},
            ]
        ]

    return replace(flow, prompt=prompt)


@pytest.mark.parametrize(
    ("name", "method"), [("Flux", "offset"), ("Flux dev", "index"), ("Qwen-Image", "index_timestep_zero")]
)
def test_reference_latents(name: str, method: str) -> None:
    """Flow Edit and MasaCtrl are the loops that they are without; references are no part of the image."""
    flow = with_references(FLOWS[name], method)
    parts = Parts(flow)
    edited = edit_image(parts.model, parts.source, parts.image)
    assert close(parts.sample(edited), paper(parts, noises(parts.image, STEPS)))
    parts, trajectory = setting(flow)
    (edited,) = execute(MasaCtrlNode, model=parts.model, trajectory=trajectory, start=0.0, first_layer=1)
    ours = resample(edited, trajectory, Guidance(parts.target, parts.negative, CFG))
    layers = list(range(len(blocks_of(parts.model.model.diffusion_model, flow))))
    last = replace(flow, image=2 * flow.image)  # as many tokens stand behind the image's
    assert close(ours, pair(parts, last, trajectory, layers[1:], KV), 1e-4)


def test_several_gpus_and_context_windows() -> None:
    parts = Parts(replace(FLOWS["Wan"], latent=(1, 16, 3, 8, 8)))
    edited = edit_image(parts.model, parts.source, parts.image)
    windows = {"context_length": 2, "context_overlap": 1, "dim": 2}
    (divided,) = execute(ContextWindowsManualNode, model=edited, **windows)
    with pytest.raises(ValueError, match="The model is called on a part of shape .*: remove context windows"):
        parts.sample(divided)
    (whole,) = execute(ContextWindowsManualNode, model=edited, **windows | {"context_length": 3})
    assert torch.equal(parts.sample(whole), parts.sample(edited))
    edited.set_additional_models("multigpu", [parts.model.clone()])
    with pytest.raises(ValueError, match="run on one GPU: remove the MultiGPU node"):
        parts.sample(edited)
