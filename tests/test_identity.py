"""One model, one identity: whatever is loaded, in every precision, and merges told from their parts."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from itertools import product
from pathlib import Path

import comfy.model_management
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from comfy.quant_ops import QuantizedTensor
from comfy.weight_adapter.lora import LoRAAdapter
from comfy_extras.nodes_model_merging import ModelAdd, ModelMergeBlocks, ModelMergeSimple, ModelSubtract
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from palimpsest.host.branch.source import attach
from palimpsest.host.files.storage import Format
from palimpsest.host.files.store import FORMAT as STORE
from palimpsest.host.files.store import AttentionStore
from palimpsest.host.files.trajectory import FORMAT, Trajectory
from palimpsest.host.run.model import identity
from palimpsest.host.run.weights import SAMPLES
from palimpsest.inversion.run import Guidance, invert
from test_inject import masactrl
from tiny import UNET, Tiny, tiny_model

CPU = torch.device("cpu")
SCALED = "scaled fp8"
PRECISIONS = [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, SCALED]


def stored_as(precision: torch.dtype | str, seed: int = 0) -> ModelPatcher:
    """The tiny model, its weights stored in another precision."""
    model = tiny_model(seed=seed)
    if precision == SCALED:
        return scaled(model)
    for parameter in model.model.parameters():
        parameter.data = parameter.data.to(precision)
    return model


def scaled(model: ModelPatcher) -> ModelPatcher:
    """The same weights as the host loads a scaled fp8 checkpoint: linear layers in fp8, all others in bf16."""
    weights = {}
    for name, weight in model.model.diffusion_model.state_dict().items():
        weights[name] = weight.to(torch.bfloat16)
        if weight.ndim == 2 and "attn" in name:
            quantized = QuantizedTensor.from_float(weight, "TensorCoreFP8E4M3Layout", scale="recalculate")
            layer = name.removesuffix("weight")
            mark = json.dumps({"format": "float8_e4m3fn"}).encode()
            weights |= {
                name: quantized._qdata,
                f"{layer}weight_scale": quantized._params.scale,
                f"{layer}input_scale": torch.tensor(1.0),
                f"{layer}comfy_quant": torch.tensor(list(mark), dtype=torch.uint8),
            }
    config = type(model.model.model_config)(copy.deepcopy(UNET))
    config.prediction = model.model.model_type
    config.quant_config = {"mixed_ops": True}
    config.set_inference_dtype(torch.bfloat16, torch.float32)
    quantized = config.get_model({}, device=CPU)
    quantized.diffusion_model.load_state_dict(weights, strict=False)
    assert sum(isinstance(p, QuantizedTensor) for p in quantized.diffusion_model.parameters()) > 10
    return type(model)(quantized, load_device=CPU, offload_device=CPU)


def merge(node: type, one: ModelPatcher, other: ModelPatcher, **options) -> ModelPatcher:
    return node().merge(one, other, **options)[0]


def averaged(one: ModelPatcher, other: ModelPatcher) -> ModelPatcher:
    return merge(ModelMergeSimple, one, other, ratio=0.5)


def doubled(model: ModelPatcher) -> ModelPatcher:
    return merge(ModelAdd, model, model)


def with_lora(model: ModelPatcher, layer: str = "time_embed.0", strength: float = 1.0) -> ModelPatcher:
    """A clone with a strong LoRA on one layer of it."""
    model = model.clone()
    name = f"diffusion_model.{layer}.weight"
    rows, columns = model.model.state_dict()[name].shape
    generator = torch.Generator().manual_seed(1)
    up, down = torch.randn(rows, 4, generator=generator), torch.randn(4, columns, generator=generator)
    assert model.add_patches({name: LoRAAdapter(set(), (up, down, 4.0, None, None, None))}, strength) == [name]
    return model


MERGES: dict[str, Callable[[ModelPatcher, ModelPatcher], ModelPatcher]] = {
    "average": averaged,
    "doubled": lambda one, _: doubled(one),
    "sum": lambda one, other: merge(ModelAdd, one, other),
    "difference": lambda one, other: merge(ModelSubtract, one, other, multiplier=0.5),
    "last block": lambda one, other: merge(ModelMergeBlocks, one, other, input=1.0, middle=1.0, out=0.9),
    "twice": lambda one, other: averaged(averaged(one, other), one),
    "merge of a LoRA": lambda one, other: averaged(one, with_lora(other)),
    "LoRA on a merge": lambda one, other: with_lora(averaged(one, other)),
}


def load(model: ModelPatcher) -> None:
    comfy.model_management.load_models_gpu([model])


def load_partly(model: ModelPatcher) -> None:
    """As with little memory: some layers are patched in place, others only when they run."""
    model.partially_load(CPU, model.model_size() // 2)
    assert model.model.model_lowvram
    assert model.loaded_size() > 0


def unload(_: ModelPatcher) -> None:
    comfy.model_management.unload_all_models()


LOADED = {"loaded": load, "partly loaded": load_partly, "unloaded": unload}


def equal(one, other) -> bool:
    return one[:2] == other[:2] and torch.equal(one.weights, other.weights) and torch.equal(one.spacing, other.spacing)


@pytest.mark.parametrize("name", MERGES)
def test_it_does_not_depend_on_what_is_loaded(name: str) -> None:
    """Not on the model's own state, nor on that of the checkpoint that it shares its weights with, nor on a restart."""
    base, other = tiny_model(), tiny_model(seed=9)
    merged = MERGES[name](base, other)
    plain, made = identity(base), identity(merged)
    for which, change in product((merged, base, other), LOADED.values()):
        change(which)
        assert equal(identity(merged), made)
        assert equal(identity(base), plain)
        assert equal(identity(MERGES[name](base, other)), made)
        unload(which)
    assert equal(identity(MERGES[name](tiny_model(), tiny_model(seed=9))), made)


@pytest.mark.parametrize("name", MERGES)
def test_a_merge_is_told_from_its_parts(name: str) -> None:
    base, other = tiny_model(), tiny_model(seed=9)
    made = identity(MERGES[name](base, other))
    for part in (base, other):
        assert not identity(part).matches(made)
        assert not made.matches(identity(part))


def test_a_merge_that_is_one_of_its_parts_is_that_model() -> None:
    base, other = tiny_model(), tiny_model(seed=9)
    assert identity(merge(ModelMergeSimple, base, other, ratio=1.0)).matches(identity(base))
    assert identity(merge(ModelMergeSimple, base, other, ratio=0.0)).matches(identity(other))


@pytest.mark.parametrize("change", LOADED)
@pytest.mark.parametrize("layer", ["time_embed.0", "out.2", "input_blocks.0.0"])
def test_loras_count_for_nothing(layer: str, change: str) -> None:
    base = tiny_model()
    plain = identity(base)
    model = with_lora(base, layer) if layer == "time_embed.0" else with_diff(base, layer)
    LOADED[change](model)
    assert equal(identity(model), plain)
    assert equal(identity(base), plain)
    model.detach()


def with_diff(model: ModelPatcher, layer: str) -> ModelPatcher:
    """As a LoRA file with whole differences in it."""
    model = model.clone()
    weights = model.model.state_dict()
    names = [f"diffusion_model.{layer}.{part}" for part in ("weight", "bias")]
    assert len(model.add_patches({name: ("diff", (torch.randn_like(weights[name]),)) for name in names})) == 2
    return model


@pytest.fixture(scope="module")
def identities() -> dict:
    """By precision: of the same weights, of another seed's, and of two merges of them where the host can merge."""
    found = {}
    for precision in PRECISIONS:
        one, other = stored_as(precision), stored_as(precision, seed=9)
        merges = [] if precision == SCALED else [doubled(one), averaged(one, other)]
        found[precision] = identity(one), [identity(model) for model in (other, *merges)]
    return found


@pytest.mark.parametrize("one", PRECISIONS, ids=str)
@pytest.mark.parametrize("other", PRECISIONS, ids=str)
def test_the_same_weights_in_every_precision_are_one_model(one, other, identities: dict) -> None:
    """And others are another model, in every precision."""
    (same, _), (made, others) = identities[one], identities[other]
    assert same.matches(made)
    assert not any(same.matches(stranger) for stranger in others)


@pytest.mark.parametrize("precision", PRECISIONS[1:-1], ids=str)
def test_weights_that_were_rounded_once_and_stored_finer_are_the_same(precision: torch.dtype) -> None:
    rounded = stored_as(precision)
    for parameter in rounded.model.parameters():
        parameter.data = parameter.data.float()
    assert identity(rounded).matches(identity(tiny_model()))
    assert not identity(rounded).matches(identity(tiny_model(seed=9)))


@pytest.mark.parametrize("precision", PRECISIONS[:-1], ids=str)
def test_a_merge_that_was_saved_and_loaded_again_is_the_same_model(precision: torch.dtype) -> None:
    merged = averaged(stored_as(precision), stored_as(precision, seed=9))
    saved = {name: weight.to("cpu") for name, weight in merged.model_state_dict_for_saving().items()}
    loaded = stored_as(precision)
    loaded.model.load_state_dict(saved)
    assert identity(loaded).matches(identity(merged))
    assert not identity(loaded).matches(identity(stored_as(precision)))


def test_a_sixteenth_of_another_model_is_noticed_in_half_precision() -> None:
    base, other = (stored_as(torch.float16, seed) for seed in (0, 9))
    assert not identity(merge(ModelMergeSimple, base, other, ratio=15 / 16)).matches(identity(base))


def test_every_parameter_counts() -> None:
    """Also the smallest bias, wherever it stands."""
    plain = identity(tiny_model())
    changed = tiny_model()
    assert plain.weights.shape == (len([*changed.model.diffusion_model.parameters()]), SAMPLES)
    for parameter in changed.model.diffusion_model.parameters():
        parameter.data *= 1.01
        assert not identity(changed).matches(plain)
        parameter.data /= 1.01


def test_an_edit_of_a_merge_goes_on_after_its_models_were_unloaded() -> None:
    """And after another sampler used the plain checkpoint: the same bits."""
    tiny = Tiny(steps=3)
    merged = doubled(tiny.model)
    trajectory = invert(merged, Guidance(tiny.source, None, 1.0), tiny.image, tiny.sigmas)
    noise = merged.model.process_latent_out(trajectory.states[0])

    def edit() -> Tensor:
        return tiny.sample(attach(merged, trajectory, masactrl(tiny)), noise=noise)

    first = edit()
    unload(merged)
    assert torch.equal(edit(), first)
    tiny.sample(tiny.model)
    assert torch.equal(edit(), first)
    for model in (tiny.model, averaged(tiny.model, tiny_model(seed=9))):
        with pytest.raises(ValueError, match="made with another model"):
            attach(model, trajectory, masactrl(tiny))


def test_a_file_knows_its_model(tiny: Tiny, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    tiny.trajectory.save(path)
    assert equal(Trajectory.load(path).model, identity(tiny.model))


@pytest.mark.parametrize(("kind", "kept"), [(FORMAT, Trajectory), (STORE, AttentionStore)])
def test_files_of_another_version_are_refused_in_a_sentence(
    kind: Format, kept: type, tiny: Tiny, tmp_path: Path
) -> None:
    """Those of the first version knew models by numbers that depended on what was loaded."""
    path = tmp_path / "x.safetensors"
    tiny.trajectory.save(path)
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    save_file(tensors, path, metadata | {"format": kind.id.replace("/2", "/1")})
    with pytest.raises(ValueError, match=f"another version of Palimpsest: make the {kind.name} anew"):
        kept.load(path)
