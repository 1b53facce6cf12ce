"""Models as the host loads them: from what ModelSave wrote, in every weight_dtype, and with little memory."""

from __future__ import annotations

from pathlib import Path

import comfy.model_management
import folder_paths
import nodes
import pytest
import torch
from comfy.model_management import LoadedModel
from comfy.model_patcher import ModelPatcher
from comfy_extras.nodes_model_merging import ModelSave
from torch import Tensor

from palimpsest.benchmarks.architectures import CONFIGS, UNETS
from palimpsest.host.branch.source import attach
from palimpsest.host.run.model import identity
from palimpsest.inversion.replay import invert_edict
from palimpsest.inversion.run import Guidance, invert
from test_composition import edit, lora, stored
from test_identity import averaged
from tiny import Tiny, randomise, tiny_model

# What the host's loader takes for SD1.5, with one block of each kind.
SMALL = {
    "num_res_blocks": [1],
    "channel_mult": [1],
    "transformer_depth": [1],
    "transformer_depth_output": [1, 1],
}
WEIGHT_DTYPES = ["default", "fp8_e4m3fn", "fp8_e4m3fn_fast", "fp8_e5m2"]
CPU = torch.device("cpu")


def small_model(seed: int) -> ModelPatcher:
    config = CONFIGS["sd15"](UNETS["sd15"] | SMALL)
    config.set_inference_dtype(torch.float32, None)
    model = config.get_model({}, device=CPU)
    randomise(model, seed)
    return ModelPatcher(model, load_device=CPU, offload_device=CPU)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, ModelPatcher]]:
    """The folder of the files, and by name the models that ModelSave wrote there."""
    folder = tmp_path_factory.mktemp("output")
    with torch.inference_mode(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(folder_paths, "output_directory", str(folder))
        one = small_model(0)
        models = {"one": one, "merge": averaged(one, small_model(9))}
        for name, model in models.items():
            ModelSave().save(model, name)
    return folder, models


@pytest.mark.parametrize("weight_dtype", WEIGHT_DTYPES)
@pytest.mark.parametrize("name", ["one", "merge"])
def test_a_saved_model_is_the_one_that_was_saved(
    name: str, weight_dtype: str, saved: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, models = saved
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "diffusion_models", ([str(folder)], {".safetensors"}))
    (loaded,) = nodes.UNETLoader().load_unet(f"{name}_00001_.safetensors", weight_dtype)
    assert loaded.model is not models[name].model
    for other, model in models.items():
        assert identity(loaded).matches(identity(model)) == (other == name)


# --- little memory ---------------------------------------------------------------------------------------------------


def edits_of(model: ModelPatcher) -> dict[str, Tensor]:
    """What comes of it in every way that the pack runs a model, gradients aside."""
    tiny = Tiny(3, model=model)
    trajectory, sampler = invert_edict(model, Guidance(tiny.source, None, 1.0), tiny.image, tiny.sigmas, 0.93)
    noise = model.model.process_latent_out(trajectory.states[0])
    return {
        "trajectory": tiny.trajectory.states,
        "plain": tiny.sample(model),
        "live": tiny.sample(attach(model, tiny.trajectory, edit("swap"))),
        "stored": tiny.sample(attach(model, tiny.trajectory, edit("pnp"), stored(model, tiny))),
        "EDICT": tiny.sample(model, tiny.source, cfg=1.0, sampler=sampler, noise=noise),
        "again": invert(model, Guidance(tiny.source, None, 1.0), tiny.image, tiny.sigmas).states,
    }


@pytest.mark.parametrize("share", [0.0, 0.5], ids=["novram", "lowvram"])
def test_edits_with_little_memory_have_the_same_bits(share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """As --novram and --lowvram load: the host patches what is not on the device whenever a layer runs."""
    model = lora(averaged(tiny_model(), tiny_model(seed=9)))
    expected = edits_of(model)
    comfy.model_management.unload_all_models()
    load = LoadedModel.model_load

    def load_a_share(self: LoadedModel, memory: float = 0, force_patch_weights: bool = False) -> None:
        load(self, max(share * self.model.model_size() - self.model.loaded_size(), 0.1), force_patch_weights)
        assert self.model.model.model_lowvram

    monkeypatch.setattr(LoadedModel, "model_load", load_a_share)
    found = edits_of(model)
    comfy.model_management.unload_all_models()
    for name, result in expected.items():
        assert torch.equal(found[name], result), name
    assert not torch.equal(expected["live"], expected["plain"])
