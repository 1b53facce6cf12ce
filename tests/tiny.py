"""A tiny random UNet in the host's own classes, and the rows that it is asked for."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import comfy.latent_formats
import comfy.model_management
import comfy.model_patcher
import comfy.sample
import comfy.samplers
import comfy.supported_models_base
import torch
from comfy.model_base import ModelType
from comfy.patcher_extension import WrappersMP
from comfy.samplers import Sampler
from comfy_api.latest import io
from torch import Tensor

from palimpsest.host.files.trajectory import Trajectory
from palimpsest.inversion.ddim import leading_sigmas
from palimpsest.inversion.run import Guidance, invert

WIDTH = 64  # of the prompt's embeddings
UNET = {
    "image_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 32,
    "num_res_blocks": [1, 1],
    "channel_mult": [1, 2],
    "transformer_depth": [1, 1],
    "transformer_depth_output": [1, 1, 1, 1],
    "transformer_depth_middle": 1,
    "context_dim": WIDTH,
    "num_heads": 4,
    "use_spatial_transformer": True,
    "use_linear_in_transformer": False,
    "adm_in_channels": None,
    "legacy": False,
}


class TinyConfig(comfy.supported_models_base.BASE):
    unet_extra_config = {}
    latent_format = comfy.latent_formats.SD15

    @classmethod
    def of(cls, prediction: ModelType, **changes) -> TinyConfig:
        config = cls(copy.deepcopy(UNET) | changes)
        config.prediction = prediction
        config.set_inference_dtype(torch.float32, None)
        return config

    def model_type(self, state_dict: dict, prefix: str = "") -> ModelType:
        return self.prediction


def tiny_model(
    prediction: ModelType = ModelType.EPS, seed: int = 0, config: type[TinyConfig] = TinyConfig, **changes
) -> comfy.model_patcher.ModelPatcher:
    """A model of random weights; `changes` are to UNET."""
    model = config.of(prediction, **changes).get_model({}, device=torch.device("cpu"))
    randomise(model, seed)
    device = comfy.model_management.get_torch_device()
    return comfy.model_patcher.CoreModelPatcher(model, load_device=device, offload_device=torch.device("cpu"))


def randomise(model: torch.nn.Module, seed: int) -> None:
    """Gives it weights that keep activations of a size."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        norm = "norm" in name or name.endswith(("in_layers.0.weight", "out_layers.0.weight", "out.0.weight"))
        parameter.data = 1 + 0.1 * noise if norm and name.endswith("weight") else 0.08 * noise


def conditioning(seed: int, tokens: int = 77, batch: int = 1) -> list:
    generator = torch.Generator().manual_seed(seed)
    return [[torch.randn(batch, tokens, WIDTH, generator=generator), {}]]


def rows_of(model: comfy.model_patcher.ModelPatcher) -> tuple[comfy.model_patcher.ModelPatcher, list[int]]:
    """A clone of `model` and a list that gets the number of rows of every UNet call."""
    rows: list[int] = []

    def count(executor, x: Tensor, *args, **kwargs):
        rows.append(len(x))
        return executor(x, *args, **kwargs)

    model = model.clone()
    model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "test.rows", count)
    return model, rows


@dataclass
class Tiny:
    """The parts of one tiny edit."""

    steps: int = 5
    batch: int = 1
    model: comfy.model_patcher.ModelPatcher = field(default_factory=tiny_model)
    source: list = field(default_factory=lambda: conditioning(1))
    target: list = field(default_factory=lambda: conditioning(2))
    negative: list = field(default_factory=lambda: conditioning(3))

    def __post_init__(self) -> None:
        self.image = torch.randn(self.batch, 4, 8, 8, generator=torch.Generator().manual_seed(4)) * 5
        self.sigmas = leading_sigmas(self.model.get_model_object("model_sampling").sigmas, self.steps)
        self.follow(invert(self.model, Guidance(self.source, None, 1.0), self.image, self.sigmas))

    def follow(self, trajectory: Trajectory) -> None:
        """Sample from its noise along its sigmas from now on."""
        self.trajectory, self.sigmas = trajectory, trajectory.sigmas
        self.noise = self.model.model.process_latent_out(trajectory.states[0])

    def sample(
        self, model, positive=None, negative=None, cfg: float = 4.0, sampler: str | Sampler = "euler", **changes
    ) -> Tensor:
        parts = {"noise": self.noise, "sigmas": self.sigmas, "noise_mask": None, "seed": 0} | changes
        return comfy.sample.sample_custom(
            model,
            torch.zeros_like(parts["noise"]),
            cfg,
            comfy.samplers.sampler_object(sampler) if isinstance(sampler, str) else sampler,
            parts["sigmas"],
            self.target if positive is None else positive,
            self.negative if negative is None else negative,
            parts["noise"],
            noise_mask=parts["noise_mask"],
            disable_pbar=True,
            seed=parts["seed"],
        )


def execute(node: type[io.ComfyNode], **inputs) -> tuple:
    """A node's outputs, its widgets at their defaults but for `inputs`."""
    return run(node, **inputs).result


def run(node: type[io.ComfyNode], **inputs) -> io.NodeOutput:
    """As execute, with what the frontend is sent."""
    widgets = [slot for slot in node.GET_SCHEMA().inputs if isinstance(slot, io.WidgetInput)]
    defaults = {slot.id: slot.default if slot.default is not None else slot.options[0] for slot in widgets}
    return node.execute(**defaults | inputs)


def pieces(text: str, length: int = 77) -> list[str]:
    """Token texts as the host's tokenizer gives them, for words split by "|" into pieces."""
    body = [piece for word in text.split() for piece in (word + "</w>").split("|")]
    return ["<|startoftext|>", *body] + ["<|endoftext|>"] * (length - 1 - len(body))
