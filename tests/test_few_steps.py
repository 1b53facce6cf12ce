"""The demo model's LoRA for few steps: how it was trained, how the host loads it, and what it draws and edits."""

from __future__ import annotations

import random
from collections import Counter

import comfy.sd
import comfy.utils
import folder_paths
import nodes as host_nodes
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from comfy_extras.nodes_model_advanced import ModelSamplingDiscrete
from torch import Tensor

from palimpsest.demo import distil, scenes, score
from palimpsest.demo import model as demo_model
from palimpsest.host.run.cost import metered
from palimpsest.nodes.demo import LoadDemoModel
from palimpsest.nodes.inversion import DDIMInversion
from palimpsest.nodes.sampler import EditSampler
from palimpsest.nodes.virtual import VirtualInversion
from tiny import Tiny, execute, run


@pytest.fixture(scope="module")
def few() -> tuple:
    return execute(LoadDemoModel, few_steps=True)


def test_the_file_is_small() -> None:
    assert demo_model.LCM_WEIGHTS.stat().st_size <= 2_000_000


def weights(model: ModelPatcher) -> dict[str, Tensor]:
    """Of the UNet, as it is sampled with."""
    return {
        key: model.patch_weight_to_device(key, return_weight=True)
        for key in model.model_state_dict("diffusion_model.")
        if key.endswith(".weight")
    }


def test_both_of_the_hosts_loaders_add_up_times_down(demo: tuple, few: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    file = comfy.utils.load_torch_file(str(demo_model.LCM_WEIGHTS), safe_load=True)
    folder = [str(demo_model.LCM_WEIGHTS.parent)], folder_paths.supported_pt_extensions
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", folder)
    (by_node,) = host_nodes.LoraLoaderModelOnly().load_lora_model_only(demo[0], demo_model.LCM_WEIGHTS.name, 1.0)
    by_function, _ = comfy.sd.load_lora_for_models(demo[0], None, file, 1.0, 0.0)
    before, expected = weights(demo[0]), {}
    for key, weight in before.items():
        name = key.removesuffix(".weight")
        if f"{name}.lora_up.weight" in file:
            up, down = (file[f"{name}.lora_{side}.weight"].double().flatten(1) for side in ("up", "down"))
            scale = float(file[f"{name}.alpha"]) / len(down)
            expected[key] = weight.double() + scale * (up @ down).view(weight.shape)
    assert 3 * len(expected) == len(file)  # nothing in the file is left over
    for model in (few[0], by_node, by_function):
        after = weights(model)
        assert model.patches.keys() == expected.keys()
        for key, weight in after.items():
            torch.testing.assert_close(weight.double(), expected.get(key, before[key].double()), rtol=0, atol=1e-6)
    changed = [(expected[key] - before[key]).norm() / before[key].norm() for key in expected]
    assert sum(changed) / len(changed) > 0.01


def test_what_was_trained_is_what_the_host_samples(few: tuple) -> None:
    """The same answer to the same latents, from the training's UNet and its LoRA and from the host's MODEL."""
    student = distil.Student()
    file = comfy.utils.load_torch_file(str(demo_model.LCM_WEIGHTS), safe_load=True)
    for index, name in enumerate(student.lora.shapes):
        for side in ("up", "down"):
            parameter = getattr(student.lora, side)[index]
            parameter.copy_(file[f"diffusion_model.{name}.lora_{side}.weight"].flatten(1))
    assert {key: value.shape for key, value in student.lora.file().items()} == {k: v.shape for k, v in file.items()}
    captions = [scenes.sample(random.Random(seed)).caption for seed in range(3)]
    level, generator = 500, torch.Generator().manual_seed(0)
    noisy = torch.randn((3, 16, 16, 16), generator=generator)
    text = student.frozen[0].text
    ours = student(noisy, torch.full((3,), level), text(text.rows(captions)))
    sampling = few[0].get_model_object("model_sampling")
    sigma = sampling.sigma(torch.tensor([float(level - 1)]))
    asked = torch.cat([encoded(few[1], caption)[0][0] for caption in captions])
    few[0].patch_model()
    theirs = few[0].model.apply_model(noisy * (1 + sigma**2).sqrt(), sigma.expand(3), c_crossattn=asked)
    few[0].unpatch_model()
    torch.testing.assert_close(theirs, ours, rtol=1e-3, atol=1e-3)


def encoded(clip: comfy.sd.CLIP, text: str) -> list:
    return host_nodes.CLIPTextEncode().encode(clip, text)[0]


def test_the_loss_is_its_formula() -> None:
    generator = torch.Generator().manual_seed(0)
    error = torch.randn((4, 16, 5, 5), generator=generator, dtype=torch.float64) * 0.1
    weight = torch.rand((16, 1, 1), generator=generator, dtype=torch.float64)
    total = 0.0
    for b, c, h, w in torch.cartesian_prod(*map(torch.arange, error.shape)).tolist():
        total += (float(weight[c]) * float(error[b, c, h, w]) ** 2 + 0.03**2) ** 0.5 - 0.03
    assert float(distil.huber(error, weight)) == pytest.approx(total / error.numel(), rel=1e-12)


def test_the_aim_is_the_image_by_which_one_step_leads_there() -> None:
    """In the sampler's space: x' = D + (t / s) (x - D)."""
    generator = torch.Generator().manual_seed(0)
    noisy, later = torch.randn((2, 3, 4, 4, 4), generator=generator, dtype=torch.float64)
    for level, after in ((1000, 750), (430, 180), (120, 0)):
        kept, then = distil.KEPT[level].double(), distil.KEPT[after].double()
        image = distil.aim(noisy, later, kept, then)
        torch.testing.assert_close(distil.ddim(noisy, image, kept, then), later)
        s, t = ((1 - share).sqrt() / share.sqrt() for share in (kept, then))
        x, reached = noisy / kept.sqrt(), later / then.sqrt()
        torch.testing.assert_close(image + t / s * (x - image), reached)


def drawn(loaded: tuple, asked: list[scenes.Scene], steps: int, cfg: float, sampler: str = "euler") -> Tensor:
    """Pictures of scenes by KSampler, one after the other."""
    model, clip, vae = loaded
    latents = []
    for seed, scene in enumerate(asked):
        prompts = encoded(clip, scene.caption), encoded(clip, "")
        latent = {"samples": torch.zeros(1, 16, 16, 16)}
        (latent,) = host_nodes.KSampler().sample(model, seed, steps, cfg, sampler, "simple", *prompts, latent)
        latents.append(latent["samples"])
    return vae.decode(torch.cat(latents))


def some_scenes(count: int) -> list[scenes.Scene]:
    rng = random.Random("few steps")
    return [scenes.sample(rng, pair=False) for _ in range(count)]


def test_four_steps_draw_what_twenty_guided_ones_do(demo: tuple, few: tuple) -> None:
    """From the same noise; without the LoRA they come less near."""
    asked = some_scenes(4)
    guided = drawn(demo, asked, 20, 4.0)
    without, with_it = ((drawn(loaded, asked, 4, 1.0) - guided).square().mean() for loaded in (demo, few))
    assert with_it < 0.8 * without


@pytest.mark.slow
@pytest.mark.parametrize("sampler", ["euler", "lcm"])
def test_four_steps_say_their_captions(few: tuple, sampler: str) -> None:
    """Read back from the pictures, word by word."""
    asked = some_scenes(4)
    right: Counter[str] = Counter()
    for image, scene in zip(drawn(few, asked, 4, 1.0, sampler).numpy(), asked, strict=True):
        right.update(word for word, so in score.judge(image, scene).items() if so)
    assert {word: right[word] for word in LEAST if right[word] < LEAST[word]} == {}


LEAST = {"style": 4, "place": 4, "time": 4, "look": 3}


def test_an_edit_in_four_steps(demo: tuple, few: tuple) -> None:
    """Without inversion and without guidance, eight rows of the network; without the LoRA it comes less far."""
    source, target = "a photo of a yellow pumpkin on a meadow", "a photo of a purple pumpkin on a meadow at night"
    before, answer = (torch.from_numpy(scenes.render(scenes.parse(text, 6)))[None] for text in (source, target))

    def edited(loaded: tuple, prompt: str) -> Tensor:
        model, clip, vae = loaded
        model, cost = metered(model)
        inputs = {"model": model, "source": encoded(clip, source), "image": before, "vae": vae, "steps": 4}
        model, trajectory, _, sampler, _ = execute(VirtualInversion, **inputs)
        inputs = {"model": model, "trajectory": trajectory, "positive": encoded(clip, prompt), "vae": vae}
        _, image = execute(EditSampler, **inputs, sampler=sampler, cfg=1.0)
        assert sum(cost.rows) == 8
        return image

    def left(loaded: tuple) -> float:
        return float((edited(loaded, target) - answer).abs().mean() / (before - answer).abs().mean())

    with_it = left(few)
    assert with_it < 0.14
    assert with_it < 0.8 * left(demo)
    assert torch.equal(edited(few, source), few[2].decode(few[2].encode(before)))


def test_many_steps_on_a_distilled_sampling_are_told(tiny: Tiny, caplog: pytest.LogCaptureFixture) -> None:
    (distilled,) = ModelSamplingDiscrete().patch(tiny.model, "lcm", False)
    parts = {"source": tiny.source, "image": {"samples": tiny.image}}

    def told(model: ModelPatcher, steps: int) -> str:
        return run(DDIMInversion, model=model, steps=steps, **parts).ui.as_dict()["text"][0]

    assert told(tiny.model, 16).endswith(" MB.")
    assert told(distilled, 15).endswith(" MB.")
    assert not caplog.text
    many = "is for checkpoints distilled to a few of 50 timesteps, but 16 steps were run: run 4 to 15, or take"
    assert many in told(distilled, 16)
    assert many in caplog.text
