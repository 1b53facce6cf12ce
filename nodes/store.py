"""Nodes that record what edits read from the source, and keep it."""

from __future__ import annotations

import math

import comfy.model_management
import torch
from comfy_api.latest import io, ui

from ..attention.p2p import Window
from ..attention.pnp import READS
from ..attention.record import Plan, Recording, record_attention
from ..host.branch.blocks import layers_in
from ..host.files.store import AttentionStore
from ..host.layer import Inputs
from ..host.run.cost import metered
from ..host.run.model import is_unet
from ..host.run.refusals import check_readable, check_same_model
from ..host.unet.tree import decoder_from_second
from . import files, sockets
from .telling import SAYING, say, tell
from .widgets import fraction, noise_and_sigmas, noise_and_sigmas_of, saved_file, saved_name

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
ALL_READS = READS | {"queries, keys, values": Inputs._fields}
DEVICES = {"cpu": torch.device("cpu"), "gpu": None}


class RecordAttention(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PalimpsestRecordAttention",
            display_name="Record Attention",
            category="Palimpsest/invert",
            description=(
                "Runs the source image once and keeps what edits read from it, and its word maps. Edits that get the "
                "store run two rows a step instead of three: the price of an ordinary generation. It pays from the "
                "second edit of an image on."
            ),
            search_aliases=["attention store", "cache attention", "p2p store", "speed up edits"],
            inputs=[
                io.Model.Input("model", tooltip="The model that made the trajectory, from before the edit nodes."),
                sockets.Trajectory.Input("trajectory", tooltip="The source image."),
                fraction("cross_replace", 0.8, "Until where in the run word attention is kept: as on the controller."),
                fraction("self_replace", 0.4, "Until where in the run structure is kept: as on the controller."),
                fraction(
                    "feature_replace",
                    0.0,
                    "Until where features are kept: tau_f of PnP Feature Injector, else 0. Flow models have none.",
                ),
                io.Int.Input(
                    "self_max_side",
                    default=32,
                    min=1,
                    max=1024,
                    advanced=True,
                    tooltip=(
                        "The largest layer whose structure is kept, as the side of a square: as on the controller. In "
                        "flow models all are kept."
                    ),
                ),
                io.Int.Input(
                    "budget_mb",
                    default=2048,
                    min=0,
                    max=1 << 20,
                    tooltip=(
                        "How much memory the store may hold. Steps that do not fit run with the source beside the "
                        "target, as without a store; the cheapest steps are kept first. SD1.5 at 512 pixels and 50 "
                        "steps takes about 1,100 MB in fp16; a flow model's step many times more: what it comes to "
                        "stands under the node before it runs."
                    ),
                ),
                io.Combo.Input(
                    "dtype",
                    options=list(DTYPES),
                    default="fp16",
                    advanced=True,
                    tooltip="What it is kept in. fp16 takes half of fp32; the edit differs by what fp16 rounds.",
                ),
                io.Combo.Input(
                    "device",
                    options=list(DEVICES),
                    default="cpu",
                    advanced=True,
                    tooltip="Where it is kept. On the gpu edits need not copy it, but it takes its memory.",
                ),
                io.String.Input(
                    "blocks",
                    default="",
                    optional=True,
                    advanced=True,
                    tooltip=(
                        "Whose attention is kept: double 0-18, single 0-37 in Flux, block 3 in SD3, output 4-11 in a "
                        "UNet, or vital: those that the edit names. Empty: all, as Prompt-to-Prompt reads them."
                    ),
                ),
                io.Combo.Input(
                    "reads",
                    options=[*ALL_READS],
                    default=next(iter(ALL_READS)),
                    optional=True,
                    advanced=True,
                    tooltip=(
                        "What of self-attention is kept in flow models: queries and keys for P2P and PnP, keys and "
                        "values for MasaCtrl. UNets keep what all three are made of."
                    ),
                ),
            ],
            hidden=SAYING,
            outputs=[
                sockets.AttentionStore.Output(
                    "attention_store", tooltip="For P2P Attention Controller and Attention Maps."
                )
            ],
        )

    @classmethod
    def execute(
        cls,
        model,
        trajectory,
        cross_replace,
        self_replace,
        feature_replace,
        self_max_side,
        budget_mb,
        dtype,
        device,
        blocks="",
        reads="queries, keys",
    ) -> io.NodeOutput:
        check_readable(model, "Record Attention")
        network, unet = model.model.diffusion_model, is_unet(model)
        recording = Recording(
            Window(0.0, cross_replace),
            Window(0.0, self_replace),
            self_max_side**2 if unet else math.inf,  # layers of flow models are of one size
            budget_mb << 20,
            DTYPES[dtype],
            DEVICES[device] or comfy.model_management.get_torch_device(),
            Window(0.0, feature_replace),
            tuple(decoder_from_second(network)[:1]) if unet and feature_replace else (),
            layers_in(network, blocks, "blocks of Record Attention") if blocks.strip() else None,
            ALL_READS[reads],
        )
        model, cost = metered(model)
        plans: list[Plan] = []

        def planned(plan: Plan) -> None:
            plans.append(plan)
            say(cls, _summary(plan, "to record"))

        store = record_attention(model, trajectory, recording, planned)
        return tell(cls, store, ui=ui.PreviewText(f"{_summary(plans[0], 'recorded')} {cost.told}."))


class SaveAttentionStore(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PalimpsestSaveAttentionStore",
            display_name="Save Attention Store",
            category="Palimpsest/invert",
            description="Writes an attention store, with its trajectory, to the output folder.",
            search_aliases=["export attention", "cache attention"],
            is_output_node=True,
            inputs=[
                sockets.AttentionStore.Input("attention_store", tooltip="What to write; as large as it is in memory."),
                saved_name("attention/image"),
            ],
            outputs=[sockets.AttentionStore.Output("attention_store", tooltip="The same store, to go on with.")],
        )

    @classmethod
    def execute(cls, attention_store, filename_prefix) -> io.NodeOutput:
        path, shown = files.fresh(filename_prefix, "Save Attention Store")
        attention_store.save(path)
        return tell(cls, attention_store, ui={"text": [shown]})


class LoadAttentionStore(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PalimpsestLoadAttentionStore",
            display_name="Load Attention Store",
            category="Palimpsest/invert",
            description="Reads an attention store and its trajectory, from the output or the input folder.",
            search_aliases=["import attention"],
            inputs=[
                io.Model.Input("model", tooltip="The model that made the store; clearly another one is refused."),
                saved_file(),
            ],
            outputs=[
                sockets.AttentionStore.Output("attention_store", tooltip="For P2P Attention Controller."),
                sockets.Trajectory.Output("trajectory", tooltip="The source image, for the edit nodes."),
                *noise_and_sigmas(),
            ],
        )

    @classmethod
    def validate_inputs(cls, file: str) -> bool | str:
        return files.verdict(file, "Load Attention Store")

    @classmethod
    def fingerprint_inputs(cls, file: str) -> str:
        return files.version(file, "Load Attention Store")

    @classmethod
    def execute(cls, model, file) -> io.NodeOutput:
        store = AttentionStore.load(files.existing(file, "Load Attention Store"))
        trajectory = store.trajectory
        check_same_model(model, trajectory)
        return io.NodeOutput(store, trajectory, *noise_and_sigmas_of(model, trajectory))


def _summary(plan: Plan, done: str) -> str:
    inputs, maps = (f"{size / 2**20:,.1f} MB" for size in (plan.inputs, plan.maps))
    text = f"{len(plan.steps)} of {plan.wanted} edited steps {done}, {inputs}, and {maps} of word maps."
    if left := plan.wanted - len(plan.steps):
        text += f" The budget leaves {left} steps to the source's own row: three rows there."
    return text
