"""All nodes of the pack."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io
from server import PromptServer

from . import (
    alignment_view,
    blend,
    clip_guidance,
    concepts,
    conditioning,
    cross_attention,
    demo,
    diffedit,
    direction,
    exact,
    flow_edit,
    guidance,
    h_space,
    inject,
    instruct,
    inversion,
    maps,
    metrics,
    null_text,
    p2p,
    prompt,
    pull,
    sampler,
    store,
    trajectory,
    value_inversion,
    viewer,
    virtual,
    visii,
)

NODES: list[type[io.ComfyNode]] = [
    inversion.DDIMInversion,
    exact.EditFriendlyInversion,
    exact.EDICTInversion,
    exact.OBELMInversion,
    virtual.VirtualInversion,
    flow_edit.FlowEdit,
    inversion.RecordTrajectory,
    trajectory.SaveTrajectory,
    trajectory.LoadTrajectory,
    null_text.NullTextInversion,
    value_inversion.ValueInversion,
    conditioning.SaveConditioning,
    conditioning.LoadConditioning,
    prompt.PromptEdit,
    prompt.BatchPromptEdits,
    sampler.EditSampler,
    p2p.P2PAttentionController,
    inject.PnPFeatureInjector,
    inject.MasaCtrlNode,
    direction.EditDirectionFromPrompts,
    direction.CombineEditDirections,
    direction.ApplyEditDirection,
    direction.SaveEditDirection,
    direction.LoadEditDirection,
    h_space.HSpaceDirectionFromPrompts,
    h_space.HSpaceDirectionFromTrajectories,
    h_space.ApplyHSpaceDirection,
    h_space.SaveHSpaceDirection,
    h_space.LoadHSpaceDirection,
    cross_attention.CrossAttentionGuidanceNode,
    blend.LocalBlendNode,
    blend.LocalBlendMask,
    diffedit.DifferenceMask,
    guidance.NegativePromptGuidance,
    guidance.NegativePromptGuider,
    guidance.ProximalGuidance,
    guidance.UniEditGuidance,
    instruct.InstructGuidance,
    visii.LearnEditFromPair,
    pull.ImagePullNode,
    concepts.ConceptGuidance,
    clip_guidance.ClipGuidanceNode,
    store.RecordAttention,
    store.SaveAttentionStore,
    store.LoadAttentionStore,
    maps.AttentionMaps,
    viewer.FeatureViewer,
    metrics.EditMetrics,
    demo.LoadDemoModel,
    demo.LoadDemoFlowModel,
    demo.LoadDemoClip,
    demo.LoadDemoInstructModel,
    demo.LoadDemoInpaintModel,
    demo.LoadDemoControlNet,
    demo.DemoScene,
]


class Palimpsest(ComfyExtension):
    async def on_load(self) -> None:
        PromptServer.instance.routes.post("/palimpsest/alignment")(alignment_view.answer)

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return NODES
