"""The metrics against their published definitions, written out plainly in float64, and against other people's code."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torchmetrics.functional.image as image
import torchmetrics.functional.image.lpips as torchmetrics_lpips
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import Tensor
from torch.nn.functional import interpolate, pad
from torchvision.models import squeezenet1_1
from torchvision.transforms import v2
from transformers import ViTConfig, ViTModel

from palimpsest.metrics.clip import clip_direction, clip_score
from palimpsest.metrics.lpips import CHANNELS, SMALLEST, Lpips
from palimpsest.metrics.pixels import mse, psnr, ssim
from palimpsest.metrics.structure import DinoViT, structure_distance

SIZE = (24, 31)


def pictures(*size: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Two smooth pictures [2, h, w, 3] that differ, and a mask [2, h, w] of whole pixels."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(2, 3, 6, 7, generator=generator)
    one = interpolate(coarse, size, mode="bilinear").movedim(1, -1)
    other = (one + 0.1 * torch.randn(one.shape, generator=generator)).clamp(0, 1)
    where = interpolate(torch.rand(2, 1, 4, 4, generator=generator), size, mode="bilinear")[:, 0] > 0.5
    return one, other, where.double()


def plain_mse(one: np.ndarray, other: np.ndarray, where: np.ndarray) -> float:
    errors = [(one[y, x, c] - other[y, x, c]) ** 2 for y, x in np.argwhere(where) for c in range(3)]
    return sum(errors) / len(errors)


def plain_ssim(one: np.ndarray, other: np.ndarray, where: np.ndarray) -> float:
    """Equation 13 of the paper at every pixel that has a whole window, which holds the pixels that count."""
    found = []
    for y, x in np.argwhere(where):
        if not (5 <= y < one.shape[0] - 5 and 5 <= x < one.shape[1] - 5):
            continue
        window = np.s_[y - 5 : y + 6, x - 5 : x + 6]
        near = np.array([[math.exp(-(i * i + j * j) / (2 * 1.5**2)) for j in range(-5, 6)] for i in range(-5, 6)])
        near = near * where[window]
        near /= near.sum()
        for c in range(3):
            a, b = one[window][..., c], other[window][..., c]
            mean_a, mean_b = (near * a).sum(), (near * b).sum()
            var_a, var_b = (near * (a - mean_a) ** 2).sum(), (near * (b - mean_b) ** 2).sum()
            both = (near * (a - mean_a) * (b - mean_b)).sum()
            found.append(
                (2 * mean_a * mean_b + 1e-4)
                * (2 * both + 9e-4)
                / (mean_a**2 + mean_b**2 + 1e-4)
                / (var_a + var_b + 9e-4)
            )
    return sum(found) / len(found)


def test_pixels_by_definition() -> None:
    one, other, where = pictures(*SIZE)
    for i in range(2):
        a, b, w = (each[i].double().numpy() for each in (one, other, where))
        for counted, mask in ((None, np.ones(SIZE)), (where, w), (1 - where, 1 - w)):
            error = plain_mse(a, b, mask)
            assert float(mse(one, other, counted)[i]) == pytest.approx(error, rel=1e-12)
            assert float(psnr(one, other, counted)[i]) == pytest.approx(-10 * math.log10(error), rel=1e-12)
            assert float(ssim(one, other, counted)[i]) == pytest.approx(plain_ssim(a, b, mask), rel=1e-9)


def test_what_does_not_count_has_no_influence() -> None:
    one, other, where = pictures(*SIZE)
    painted = torch.where(where[..., None] > 0, other, torch.rand_like(other))
    for metric in (mse, psnr, ssim):
        assert torch.allclose(metric(one, other, where), metric(one, painted, where), rtol=1e-12)
        assert not torch.allclose(metric(one, other), metric(one, painted), rtol=1e-3)


def test_the_same_and_nothing() -> None:
    one, _, where = pictures(*SIZE)
    assert mse(one, one).tolist() == [0, 0]
    assert psnr(one, one, where).tolist() == [math.inf] * 2
    assert ssim(one, one, where).tolist() == pytest.approx([1, 1])
    assert all(metric(one, one, 0 * where).isnan().all() for metric in (mse, psnr, ssim))


def test_pixels_as_others_measure_them() -> None:
    one, other, _ = pictures(60, 41)
    a, b = one[0].double().numpy(), other[0].double().numpy()
    gaussian = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "channel_axis": -1}
    assert float(ssim(one, other)[0]) == pytest.approx(structural_similarity(a, b, data_range=1, **gaussian), rel=1e-6)
    assert float(psnr(one, other)[0]) == pytest.approx(peak_signal_noise_ratio(a, b, data_range=1), rel=1e-9)
    planes = [each[:1].double().movedim(-1, 1) for each in (one, other)]
    theirs = image.structural_similarity_index_measure(*planes, data_range=1.0)  # windows at the edge see it mirrored
    mirrored = [pad(each, (5, 5, 5, 5), mode="reflect").movedim(1, -1) for each in planes]
    assert float(ssim(*mirrored)[0]) == pytest.approx(float(theirs), rel=1e-6)
    theirs = image.peak_signal_noise_ratio(*planes, data_range=1.0)
    assert float(psnr(one, other)[0]) == pytest.approx(float(theirs), rel=1e-6)


# --- LPIPS -----------------------------------------------------------------------------------------------------------


def lpips_weights() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    torch.manual_seed(3)
    heads = {f"lin{i}.model.1.weight": torch.rand(1, c, 1, 1) for i, c in enumerate(CHANNELS)}
    return squeezenet1_1().state_dict(), heads


@pytest.fixture(scope="module")
def lpips() -> Lpips:
    model = Lpips()
    model.load(*lpips_weights())
    return model.double()


def plain_lpips(one: Tensor, other: Tensor) -> float:
    """Equation 1 of the paper, layer by layer, of pictures [h, w, 3]."""
    network, heads = lpips_weights()
    model = squeezenet1_1().double()
    model.load_state_dict(network)
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    a, b = (((2 * each.double() - 1 - shift) / scale).permute(2, 0, 1)[None] for each in (one, other))
    total, head = 0.0, 0
    for i, layer in enumerate(model.features):
        a, b = layer(a), layer(b)
        if i in (1, 4, 7, 9, 10, 11, 12):
            unit_a, unit_b = (each / (each**2).sum(1, keepdim=True).sqrt() for each in (a, b))
            weight = heads[f"lin{head}.model.1.weight"].double()
            total += float((weight * (unit_a - unit_b) ** 2).sum(1).mean())
            head += 1
    return total


def test_lpips_by_definition(lpips: Lpips) -> None:
    one, other, _ = (each.double() for each in pictures(70, 64))
    measured = lpips(one, other)
    for i in range(2):
        assert float(measured[i]) == pytest.approx(plain_lpips(one[i], other[i]), rel=1e-6)
    assert lpips(one, one).tolist() == [0, 0]


def test_lpips_of_a_part(lpips: Lpips) -> None:
    one, other, where = (each.double() for each in pictures(96, 96))
    left = torch.zeros_like(where)
    left[..., :32] = 1
    edited = torch.cat([one[:, :, :48], other[:, :, 48:]], 2)
    assert (lpips(one, edited, left) < 0.5 * lpips(one, edited, 1 - left)).all()
    assert lpips(one, other, torch.ones_like(where)).tolist() == pytest.approx(lpips(one, other).tolist(), rel=0.05)
    assert lpips(*(torch.rand(2, 1, SMALLEST, SMALLEST, 3).double())).isfinite().all()


def test_lpips_as_torchmetrics_measures_it(lpips: Lpips, monkeypatch: pytest.MonkeyPatch) -> None:
    network, heads = lpips_weights()

    def squeezenet(*_: object, **__: object) -> torch.nn.Module:
        model = squeezenet1_1()
        model.load_state_dict(network)
        return model

    monkeypatch.setattr("torchvision.models.squeezenet1_1", squeezenet)
    metric = torchmetrics_lpips._LPIPS(pretrained=False, net="squeeze", pnet_rand=True)
    metric.load_state_dict(heads, strict=False)
    one, other, _ = pictures(80, 64)
    planes = [2 * each.movedim(-1, 1) - 1 for each in (one, other)]
    measured = lpips(one.double(), other.double()).tolist()
    assert metric(*planes).flatten().tolist() == pytest.approx(measured, rel=1e-4)


# --- structure -------------------------------------------------------------------------------------------------------

LAYERS, WIDTH, PATCH = 2, 128, 16


def random_vit() -> ViTModel:
    torch.manual_seed(5)
    config = ViTConfig(
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=WIDTH // 64,
        intermediate_size=4 * WIDTH,
        patch_size=PATCH,
        image_size=224,
        initializer_range=0.1,
    )
    return ViTModel(config, add_pooling_layer=False).eval()


@pytest.fixture(scope="module")
def vits() -> tuple[ViTModel, DinoViT]:
    """The same random weights in transformers' class and in ours."""
    theirs = random_vit().double()
    return theirs, DinoViT(dino_weights(theirs)).double()


def dino_weights(vit: ViTModel) -> dict[str, Tensor]:
    """As the authors' file names them."""
    given = vit.state_dict()
    names = {
        "cls_token": "embeddings.cls_token",
        "pos_embed": "embeddings.position_embeddings",
        "patch_embed.proj": "embeddings.patch_embeddings.projection",
        "norm": "layernorm",
    }
    for i in range(LAYERS):
        ours, theirs = f"blocks.{i}.", f"layers.{i}."
        names |= {ours + "norm1": theirs + "layernorm_before", ours + "norm2": theirs + "layernorm_after"}
        names |= {ours + "attn.proj": theirs + "attention.o_proj"}
        names |= {ours + f"mlp.fc{n}": theirs + f"mlp.fc{n}" for n in (1, 2)}
        for part in ("weight", "bias"):
            heads = [given[f"{theirs}attention.{each}_proj.{part}"] for each in "qkv"]
            given[f"{theirs}qkv.{part}"] = torch.cat(heads)
        names |= {ours + "attn.qkv": theirs + "qkv"}
    ends = ("", ".weight", ".bias")
    return {name + end: given[other + end] for name, other in names.items() for end in ends if other + end in given}


def plain_structure_distance(vit: ViTModel, one: Tensor, other: Tensor) -> float:
    """Of pictures [3, h, w] that are scaled and normalised: keys of the last layer, their cosines, the mean square."""
    cosines = []
    for picture in (one, other):
        seen = []
        hook = vit.layers[-1].attention.k_proj.register_forward_hook(lambda *given, seen=seen: seen.append(given[2]))
        vit(picture[None], interpolate_pos_encoding=True)
        hook.remove()
        keys = seen[0][0].numpy()
        lengths = np.sqrt((keys**2).sum(1))
        cosines.append(keys @ keys.T / lengths[:, None] / lengths[None])
    return float(((cosines[0] - cosines[1]) ** 2).mean())


@pytest.mark.parametrize(("size", "scaled"), [((64, 64), (224, 224)), ((60, 40), (336, 224)), ((60, 20), (480, 160))])
def test_structure_distance_by_definition(
    vits: tuple[ViTModel, DinoViT], size: tuple[int, int], scaled: tuple[int, int]
) -> None:
    theirs, ours = vits
    one, other, _ = (each[:1].double() for each in pictures(*size))
    shown = [v2.functional.resize(each.movedim(-1, 1), [224], max_size=480)[0] for each in (one, other)]
    assert shown[0].shape[1:] == scaled
    for published, scale in ((False, 1), (True, 255)):
        mean, deviation = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
        pixels = [v2.functional.normalize(scale * each, mean, deviation) for each in shown]
        expected = plain_structure_distance(theirs, *pixels)
        assert float(structure_distance(ours, one, other, published)) == pytest.approx(expected, rel=1e-6)
        assert expected > 1e-4
    assert structure_distance(ours, one, one).tolist() == [0]


# --- CLIP ------------------------------------------------------------------------------------------------------------


def test_clip_by_definition() -> None:
    source, edited, source_text, target_text = torch.randn(4, 1, 16, generator=torch.Generator().manual_seed(1))

    def unit(vector: Tensor) -> np.ndarray:
        numbers = vector[0].double().numpy()
        return numbers / math.sqrt((numbers**2).sum())

    cosine = float(unit(edited) @ unit(target_text))
    assert float(clip_score(edited, target_text)) == pytest.approx(max(100 * cosine, 0), rel=1e-9)
    assert float(clip_score(-edited, target_text)) == pytest.approx(max(-100 * cosine, 0), rel=1e-9)
    moved, said = unit(edited) - unit(source), unit(target_text) - unit(source_text)
    expected = (moved @ said) / math.sqrt((moved @ moved) * (said @ said))
    assert float(clip_direction(source, edited, source_text, target_text)) == pytest.approx(expected, rel=1e-9)
