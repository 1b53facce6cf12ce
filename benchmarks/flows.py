"""What a row of an edit costs on flow transformers against a row of plain sampling.

Blocks of Flux.1's and of SD3.5 large's width and number of tokens at 1024 pixels, with random weights, sample in fp32
on the CPU: three rows a step, the source's among them in the edits. Ratios are of processor time in rounds in which
every form takes its turn; "more memory" is what an edit's peak has over the plain one's, in tensors of all queries.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable

import comfy.samplers
import comfy.supported_models as supported
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ..attention.masactrl import MasaCtrl
from ..attention.pnp import PlugAndPlay
from ..host.branch.blocks import attention_blocks, attention_layers
from ..host.branch.source import attach
from ..host.files.trajectory import Trajectory
from ..host.run.model import identity
from .p2p import CLEAR_REFS, CPU, Measure, Roomy, ThreeRows, measure

SIDE = 128  # of the latent, in positions: 1024 pixels
TEXT = {"flux": 256, "sd3": 154}
FLUX = {
    "image_model": "flux",
    "in_channels": 16,
    "out_channels": 16,
    "vec_in_dim": 768,
    "context_in_dim": 4096,
    "hidden_size": 3072,
    "mlp_ratio": 4.0,
    "num_heads": 24,
    "depth": 1,
    "depth_single_blocks": 1,
    "axes_dim": [16, 56, 56],
    "theta": 10000,
    "patch_size": 2,
    "qkv_bias": True,
    "guidance_embed": False,
    "txt_ids_dims": [],
    "yak_mlp": False,
    "txt_norm": False,
}
SD3 = {
    "in_channels": 16,
    "out_channels": 16,
    "patch_size": 2,
    "depth": 38,
    "num_blocks": 2,
    "input_size": None,
    "adm_in_channels": 2048,
    "context_embedder_config": {"target": "torch.nn.Linear", "params": {"in_features": 4096, "out_features": 2432}},
    "num_patches": 36864,
    "pos_embed_max_size": 192,
    "pos_embed_scaling_factor": None,
    "qk_norm": "rms",
    "x_block_self_attn_layers": [],
}
KINDS = {"flux": (supported.FluxSchnell, FLUX, 3072, 768), "sd3": (supported.SD3, SD3, 2432, 2048)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", choices=KINDS, nargs="+", default=list(KINDS))
    parser.add_argument("--side", type=int, default=SIDE, help="of the latent, an even number")
    parser.add_argument("--repeat", type=int, default=3, help="rounds that count; one more warms up")


def run(arguments: argparse.Namespace) -> None:
    if not CLEAR_REFS.exists():
        sys.exit("bench flows: peak memory is read from Linux's /proc, which this system lacks")
    print("| model | form | s a step | a row, against plain | more memory, tensors |")
    print("|---|---|---|---|---|")
    for kind in arguments.model:
        forms = forms_of(kind, arguments.side)
        measures: dict[str, list[Measure]] = {name: [] for name in forms}
        for turn in range(arguments.repeat + 1):
            for name, work in forms.items():
                measured = measure(work)
                if turn:
                    measures[name].append(measured)
        report(kind, arguments.side, measures)


def forms_of(kind: str, side: int) -> dict[str, Callable[[], Tensor]]:
    """One step of three rows: plain, and with each edit."""
    model, generator = random_model(kind), torch.Generator().manual_seed(0)
    _, _, _, pooled = KINDS[kind]
    source, target, negative = (random_prompt(TEXT[kind], pooled, generator) for _ in range(3))
    sigmas = torch.tensor([0.9, 0.8])
    states = torch.randn(2, 1, 16, side, side, generator=generator)
    trajectory = Trajectory(states, sigmas, source, identity(model))
    network = model.model.diffusion_model
    masactrl = MasaCtrl(frozenset(attention_layers(network)), 0.0, False, None)
    plug_and_play = PlugAndPlay((), tuple(attention_blocks(network)), 0.0, 1.0)

    def sampling(model: ModelPatcher, third: list | None = None) -> Callable[[], Tensor]:
        guider = ThreeRows(model) if third else comfy.samplers.CFGGuider(model)
        conds = {"positive": target, "negative": negative}
        guider.inner_set_conds(conds | {"third": third} if third else conds)
        guider.set_cfg(3.0)
        noise, euler = states[0] / sigmas[0], comfy.samplers.sampler_object("euler")
        image = torch.zeros_like(noise)
        return lambda: guider.sample(noise, image, euler, sigmas.clone(), disable_pbar=True, seed=0)

    return {
        "plain": sampling(model, source),
        "MasaCtrl": sampling(attach(model, trajectory, masactrl)),
        "Plug-and-Play": sampling(attach(model, trajectory, plug_and_play)),
    }


def random_model(kind: str) -> ModelPatcher:
    """Random within what keeps activations finite."""
    config, unet, _, _ = KINDS[kind]
    parts = config(unet)
    parts.set_inference_dtype(torch.float32, None)
    model = parts.get_model({}, device=CPU)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.diffusion_model.named_parameters():
        if parameter.ndim > 1:
            parameter.normal_(0, 0.5 * parameter[0].numel() ** -0.5, generator=generator)
        else:
            parameter.fill_(name.endswith(("weight", "scale")))
    return Roomy(model, load_device=CPU, offload_device=CPU)


def random_prompt(tokens: int, pooled: int, generator: torch.Generator) -> list:
    embedding = torch.randn(1, tokens, 4096, generator=generator)
    return [[embedding, {"pooled_output": torch.randn(1, pooled, generator=generator)}]]


def report(kind: str, side: int, measures: dict[str, list[Measure]]) -> None:
    """Rows of a Markdown table."""
    _, _, width, _ = KINDS[kind]
    tensor = 3 * ((side // 2) ** 2 + TEXT[kind]) * width * 4
    for name, taken in measures.items():
        pairs = [*zip(taken, measures["plain"], strict=True)]
        ratios = [one.processor / plain.processor for one, plain in pairs]
        more = statistics.median((one.peak - plain.peak) / tensor for one, plain in pairs)
        seconds = statistics.median(one.seconds for one in taken)
        ratio = f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"
        print(f"| {kind} | {name} | {seconds:.1f} | {ratio} | {more:.1f} |")
