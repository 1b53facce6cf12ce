"""What a row of an edit costs on flow transformers against a row of plain sampling.

Blocks of Flux.1's and of SD3.5 large's width and number of tokens at 1024 pixels, with random weights, sample in fp32
on the CPU: one step of three rows, the source's among them in the edits. Ratios are of processor time in rounds in
which every form takes its turn; "more memory" is what an edit's peak has over the plain one's, in tensors of all
queries. What an edit adds it adds in every block, so that a few tell; `--blocks 0 1` is the least.
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
from ..inversion.flow_edit import edit_image
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
    "axes_dim": [16, 56, 56],
    "theta": 10000,
    "patch_size": 2,
    "qkv_bias": True,
    "guidance_embed": False,
    "txt_ids_dims": [],
    "yak_mlp": False,
    "txt_norm": False,
}
DEPTHS = "depth", "depth_single_blocks"
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
    parser.add_argument(
        "--blocks", type=int, nargs=2, default=(1, 1), help="double and single ones of Flux; SD3 has as many in all"
    )
    parser.add_argument("--warm", type=int, default=1, help="rounds that do not count, at first")
    parser.add_argument("--repeat", type=int, default=3, help="rounds that count")


def run(arguments: argparse.Namespace) -> None:
    if not CLEAR_REFS.exists():
        sys.exit("bench flows: peak memory is read from Linux's /proc, which this system lacks")
    print("| model | form | s a step | a row, against plain | more memory, tensors |")
    print("|---|---|---|---|---|")
    for kind in arguments.model:
        forms = forms_of(kind, arguments.side, tuple(arguments.blocks))
        measures: dict[str, list[Measure]] = {name: [] for name in forms}
        for turn in range(arguments.warm + arguments.repeat):
            for name, work in forms.items():
                measured = measure(work)
                if turn >= arguments.warm:
                    measures[name].append(measured)
        report(kind, arguments.side, measures)


def forms_of(kind: str, side: int, blocks: tuple[int, int] = (1, 1)) -> dict[str, Callable[[], Tensor]]:
    """One step of three rows: plain, and with each edit."""
    model, generator = random_model(kind, blocks), torch.Generator().manual_seed(0)
    _, _, _, pooled = KINDS[kind]
    source, target, negative = (random_prompt(TEXT[kind], pooled, generator) for _ in range(3))
    sigmas = torch.tensor([0.9, 0.0])
    states = torch.randn(2, 1, 16, side, side, generator=generator)
    trajectory = Trajectory(states, sigmas, source, identity(model))
    network = model.model.diffusion_model
    masactrl = MasaCtrl(frozenset(attention_layers(network)), 0.0, False, None)
    plug_and_play = PlugAndPlay((), tuple(attention_blocks(network)), 0.0, 1.0)

    def sampling(model: ModelPatcher, third: list | None = None, latent: Tensor | None = None) -> Callable[[], Tensor]:
        guider = ThreeRows(model) if third else comfy.samplers.CFGGuider(model)
        conds = {"positive": target, "negative": negative}
        guider.inner_set_conds(conds | {"third": third} if third else conds)
        guider.set_cfg(3.0)
        noise, euler = states[0] / sigmas[0], comfy.samplers.sampler_object("euler")
        image = torch.zeros_like(noise) if latent is None else latent
        return lambda: guider.sample(noise, image, euler, sigmas.clone(), disable_pbar=True, seed=0)

    return {
        "plain": sampling(model, source),
        "MasaCtrl": sampling(attach(model, trajectory, masactrl)),
        "Plug-and-Play": sampling(attach(model, trajectory, plug_and_play)),
        "Flow Edit": sampling(edit_image(model, source, states[1]), latent=states[1]),
    }


def random_model(kind: str, blocks: tuple[int, int]) -> ModelPatcher:
    """Random within what keeps activations finite."""
    config, unet, _, _ = KINDS[kind]
    depths = {"num_blocks": sum(blocks)} if kind == "sd3" else dict(zip(DEPTHS, blocks, strict=True))
    parts = config(unet | depths)
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
