"""Flow models whose weights are stored in fewer bits: what edits them is what edits their exact twins."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import comfy.ops
import comfy.supported_models as supported
import pytest
import torch
from comfy.model_patcher import CoreModelPatcher, ModelPatcher
from comfy.quant_ops import QuantizedTensor
from torch import Tensor, nn
from torch.nn.functional import linear

from flows import FLOWS, FLUX, SD3, WAN, randomise
from palimpsest.host.files.trajectory import Trajectory
from palimpsest.host.run.model import identity
from palimpsest.host.run.weights import sampled_weights
from palimpsest.inversion.flow_edit import edit_image
from palimpsest.inversion.run import Guidance, Refinement, invert, resample
from palimpsest.nodes.inject import MasaCtrlNode, PnPFeatureInjector
from test_flow_edit import CFG, Parts, close
from tiny import execute

CPU = torch.device("cpu")
FP8, SCALED, PACKED = "fp8", "scaled fp8", "packed"
CONFIGS = {"Flux": (supported.FluxSchnell, FLUX), "SD3": (supported.SD3, SD3), "Wan": (supported.WAN21_T2V, WAN)}


class Packed(Tensor):
    """Bytes that stand for a weight, and say its shape in place of their own, as in packs that load GGUF files: each
    row's numbers in 8 bits, and their scale in four bytes more.
    """

    @staticmethod
    def of(weight: Tensor) -> Packed:
        scale = weight.abs().amax(1, keepdim=True) / 127
        numbers = (weight / scale).round().to(torch.int8).view(torch.uint8)
        packed = torch.cat([numbers, scale.view(torch.uint8)], 1).as_subclass(Packed)
        packed.stands_for = weight.shape
        return packed

    @property
    def shape(self) -> torch.Size:
        return getattr(self, "stands_for", self.size())

    def detach(self) -> Packed:
        return self

    def to(self, *args, **kwargs) -> Tensor:
        moved = super().to(*args, **kwargs)
        if hasattr(self, "stands_for"):
            moved.stands_for = self.stands_for
        return moved

    def unpacked(self) -> Tensor:
        stored = self.as_subclass(Tensor)
        return stored[:, :-4].contiguous().view(torch.int8) * stored[:, -4:].contiguous().view(torch.float32)


class PackedOperations(comfy.ops.manual_cast):
    class Linear(comfy.ops.manual_cast.Linear):
        """Has no weight until it is loaded."""

        def __init__(self, in_features: int, out_features: int, bias: bool = True, device=None, dtype=None) -> None:
            nn.Module.__init__(self)
            self.in_features, self.out_features = in_features, out_features
            self.weight = self.bias = None

        def _load_from_state_dict(self, state: dict[str, Tensor], prefix: str, *args) -> None:
            for name in ("weight", "bias"):
                if f"{prefix}{name}" in state:
                    setattr(self, name, nn.Parameter(state[f"{prefix}{name}"], requires_grad=False))

        def forward(self, x: Tensor) -> Tensor:
            return linear(x, self.weight.unpacked(), self.bias)


def model(name: str, kind: str | None, seed: int = 0) -> ModelPatcher:
    """A tiny model of random weights, each kind as the host or another pack loads it; with None the fp32 of `twin`."""
    config, unet = CONFIGS[name]
    parts = config(copy.deepcopy(unet))
    if kind == FP8:
        parts.set_inference_dtype(torch.float8_e4m3fn, torch.float32)
    else:
        parts.set_inference_dtype(torch.float32, None)
    if kind == SCALED:
        parts.quant_config = {"mixed_ops": True}
    if kind == PACKED:
        parts.custom_operations = PackedOperations
    made = parts.get_model({}, device=CPU)
    made.diffusion_model.load_state_dict(stored(name, kind, seed), strict=False)
    return CoreModelPatcher(made, load_device=CPU, offload_device=CPU)


def weights(name: str, seed: int) -> tuple[dict[str, Tensor], set[str]]:
    """Of the model in fp32, and which of them are those of linear layers."""
    config, unet = CONFIGS[name]
    parts = config(copy.deepcopy(unet))
    parts.set_inference_dtype(torch.float32, None)
    network = parts.get_model({}, device=CPU).diffusion_model
    randomise(network, seed)
    layers = {f"{layer}.weight" for layer, module in network.named_modules() if isinstance(module, nn.Linear)}
    return network.state_dict(), layers


def stored(name: str, kind: str | None, seed: int) -> dict[str, Tensor]:
    state, layers = weights(name, seed)
    if kind == FP8:
        return {key: weight.to(torch.float8_e4m3fn) for key, weight in state.items()}
    if kind == PACKED:
        return state | {key: Packed.of(state[key]) for key in layers}
    if kind == SCALED:
        mark = torch.tensor(list(json.dumps({"format": "float8_e4m3fn"}).encode()), dtype=torch.uint8)
        for key in layers:
            scaled = QuantizedTensor.from_float(state[key], "TensorCoreFP8E4M3Layout", scale="recalculate")
            state |= {key: scaled._qdata, f"{key}_scale": scaled._params.scale}
            state[f"{key.removesuffix('weight')}comfy_quant"] = mark
    return state


def twin(name: str, kind: str, seed: int = 0) -> ModelPatcher:
    """The model in fp32, whose weights are what those of the other kind stand for."""
    exact, (state, layers) = model(name, None, seed), weights(name, seed)
    for key, weight in state.items():
        if kind == FP8:
            state[key] = weight.to(torch.float8_e4m3fn).float()
        elif kind == PACKED and key in layers:
            state[key] = Packed.of(weight).unpacked()
        elif kind == SCALED and key in layers:
            scaled = QuantizedTensor.from_float(weight, "TensorCoreFP8E4M3Layout", scale="recalculate")
            state[key] = scaled.dequantize()
    exact.model.diffusion_model.load_state_dict(state)
    return exact


each_kind = pytest.mark.parametrize("kind", [FP8, SCALED, PACKED])
each_model = pytest.mark.parametrize("name", CONFIGS)


def parts_of(name: str, made: ModelPatcher) -> Parts:
    parts = Parts(FLOWS[name])
    parts.model = made
    return parts


@each_kind
@each_model
def test_edits_are_those_of_the_exact_twin(name: str, kind: str) -> None:
    """Flow Edit, inversion, and what MasaCtrl and Plug-and-Play read along it."""

    def results(made: ModelPatcher) -> list[Tensor]:
        parts = parts_of(name, made)
        guidance = Guidance(parts.target, parts.negative, CFG)
        trajectory = invert(made, Guidance(parts.source), parts.image, parts.sigmas, Refinement(iterations=1))
        read = {"model": made, "trajectory": trajectory}
        (masactrl,) = execute(MasaCtrlNode, **read, start=0.0, first_layer=0)
        (pnp,) = execute(PnPFeatureInjector, **read, tau_a=1.0)
        edits = [resample(one, trajectory, guidance) for one in (masactrl, pnp, made)]
        return [parts.sample(edit_image(made, parts.source, parts.image)), trajectory.states, *edits]

    ours = results(model(name, kind))
    assert all(close(one, other) for one, other in zip(ours, results(twin(name, kind)), strict=True))
    *_, masactrl, pnp, plain = ours
    assert not close(masactrl, plain, 2e-3)
    assert not close(pnp, plain, 2e-3)


@each_kind
@each_model
def test_a_trajectory_is_used_again(name: str, kind: str, tmp_path: Path) -> None:
    """By the same weights, loaded anew; other weights are known for others."""
    parts = parts_of(name, model(name, kind))
    before = sampled_weights(parts.model)
    invert(parts.model, Guidance(parts.source), parts.image, parts.sigmas).save(tmp_path / "it.safetensors")
    assert all(torch.equal(*pair) for pair in zip(before, sampled_weights(parts.model), strict=True))
    trajectory = Trajectory.load(tmp_path / "it.safetensors")
    again = model(name, kind)
    assert identity(again).matches(trajectory.model)
    results = [
        resample(execute(MasaCtrlNode, model=made, trajectory=trajectory)[0], trajectory, Guidance(parts.target))
        for made in (parts.model, again)
    ]
    assert torch.equal(*results)
    with pytest.raises(ValueError, match="The trajectory was made with another model"):
        execute(MasaCtrlNode, model=model(name, kind, seed=9), trajectory=trajectory)
