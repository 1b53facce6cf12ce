"""Local blend: the mask against the published one, whole runs against plain float64, and what is measured."""

from __future__ import annotations

import copy
from dataclasses import replace

import comfy.ldm.modules.attention
import comfy.model_management
import pytest
import torch
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from palimpsest.attention.alignment import Carry
from palimpsest.attention.local_blend import LocalBlend, softened
from palimpsest.attention.p2p import PromptToPrompt, Window
from palimpsest.host.branch.maps import map_size
from palimpsest.host.branch.source import attach, attach_blend
from palimpsest.host.layer import Edit
from palimpsest.inversion.run import Guidance, invert
from reference import classic_p2p
from test_source import split
from tiny import Tiny, conditioning, rows_of

EXACT = ["euler", "dpmpp_2m", "heun", "lms"]


def distance(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


def columns(phrases: list[list[int]], tokens: int = 77) -> Tensor:
    """[1, tokens, phrases], 1 at each phrase's tokens."""
    table = torch.zeros(1, tokens, len(phrases))
    for i, phrase in enumerate(phrases):
        table[0, phrase, i] = 1
    return table


PHRASES = [[2, 3]], [[4]]  # where to edit and where not, the same in both prompts


def blend(
    tiny: Tiny | None = None,
    phrases: tuple[list[list[int]], list[list[int]]] | None = PHRASES,
    threshold: float = 0.3,
    subtract: float = 0.3,
    start: float = 0.0,
    soft: int = 0,
    user: Tensor | None = None,
    unite: bool = False,
) -> LocalBlend:
    if phrases is None:
        return LocalBlend(None, 0, None, threshold, subtract, start, soft, user, unite)
    source, target = (77, 77) if tiny is None else (p[0][0].shape[1] for p in (tiny.source, tiny.target))
    edits, others = phrases
    table = columns([*edits, *others], source), columns([*edits, *others], target)
    embedding = None if tiny is None else tiny.target[0][0]
    return LocalBlend(table, len(edits), embedding, threshold, subtract, start, soft, user, unite)


# --- the mask --------------------------------------------------------------------------------------------------------


def published_mask(
    maps: tuple[Tensor, Tensor], words: list[int], threshold: float, pool: bool, size: tuple[int, int]
) -> Tensor:
    """get_mask of the public code's later form: maps [h, w, tokens] of source and target, bool [*size]."""
    united = torch.zeros(size, dtype=torch.bool)
    for each in maps:
        h, w, _ = each.shape
        m = sum(each[..., j].double() for j in words)
        if pool:
            m = torch.stack(
                [
                    torch.stack([m[max(y - 1, 0) : y + 2, max(x - 1, 0) : x + 2].max() for x in range(w)])
                    for y in range(h)
                ]
            )
        rows, cols = (torch.arange(n) * old // n for n, old in zip(size, (h, w), strict=True))
        m = m[rows][:, cols]
        united |= m / m.max() > threshold
    return united


def random_maps(batch: int, h: int, w: int, seed: int = 0, tokens: int = 77) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    maps = torch.randn(2, batch, h, w, tokens, generator=generator).mul(2).softmax(-1)
    return maps[0], maps[1]


def of_phrases(maps: tuple[Tensor, Tensor], table: Tensor) -> tuple[Tensor, Tensor]:
    return tuple((each @ table[0]).movedim(-1, 1) for each in maps)


SIZES = [((16, 16), (64, 64)), ((24, 16), (96, 64)), ((33, 17), (65, 33)), ((5, 3), (17, 10)), ((8, 8), (8, 8))]


@pytest.mark.parametrize(("size", "latent"), SIZES)
@pytest.mark.parametrize("threshold", [0.3, 0.7])
def test_mask_is_the_published_one(size: tuple[int, int], latent: tuple[int, int], threshold: float) -> None:
    """Of one phrase to edit and one not to, for each image of a batch."""
    maps = random_maps(2, *size)
    ours = blend(threshold=threshold, subtract=0.5)
    mask = ours.mask(*of_phrases(maps, ours.columns[0]), latent)
    assert mask.shape == (2, 1, *latent)
    for i in range(2):
        pair = maps[0][i], maps[1][i]
        expected = published_mask(pair, [2, 3], threshold, True, latent)
        expected &= ~published_mask(pair, [4], 0.5, False, latent)
        assert torch.equal(mask[i, 0], expected.float())
        assert 0 < expected.float().mean() < 1


def test_several_phrases_each_have_their_threshold() -> None:
    """A phrase's map is relative to its own maximum, so that a weakly attended one has a region too."""
    maps, latent = random_maps(1, 16, 16), (64, 64)
    maps[0][..., 5] *= 1e-3
    maps[1][..., 5] *= 1e-3
    ours = blend(phrases=([[2, 3], [5]], [[4], [6, 7]]), threshold=0.8, subtract=0.9)
    mask = ours.mask(*of_phrases(maps, ours.columns[0]), latent)[0, 0].bool()
    pair = maps[0][0], maps[1][0]
    edits = [published_mask(pair, words, 0.8, True, latent) for words in ([2, 3], [5])]
    others = [published_mask(pair, words, 0.9, False, latent) for words in ([4], [6, 7])]
    assert torch.equal(mask, (edits[0] | edits[1]) & ~(others[0] | others[1]))
    assert not torch.equal(mask, edits[0] & ~(others[0] | others[1]))


def test_a_phrase_that_one_prompt_lacks_counts_in_the_other() -> None:
    maps, latent = random_maps(1, 16, 16), (64, 64)
    ours = blend(phrases=([[2, 3]], []))
    source, target = of_phrases(maps, ours.columns[0])
    alone = published_mask((maps[1][0],), [2, 3], 0.3, True, latent)
    assert torch.equal(ours.mask(torch.zeros_like(source), target, latent)[0, 0], alone.float())
    assert not ours.mask(torch.zeros_like(source), torch.zeros_like(target), latent).any()


def test_scale_of_the_maps_does_not_matter() -> None:
    """They are running sums: of one step or of all."""
    ours, maps = blend(threshold=0.7), random_maps(2, 16, 16)
    source, target = of_phrases(maps, ours.columns[0])
    assert torch.equal(ours.mask(source, target, (64, 64)), ours.mask(source * 8, target * 32, (64, 64)))


def test_one_source_serves_several_targets() -> None:
    ours, maps = blend(threshold=0.7), random_maps(3, 16, 16)
    source, target = of_phrases(maps, ours.columns[0])
    together = ours.mask(source[:1], target, (64, 64))
    for i in range(3):
        assert torch.equal(together[i : i + 1], ours.mask(source[:1], target[i : i + 1], (64, 64)))


@pytest.mark.parametrize("width", [0, 1, 5])
def test_soft_edges_fall_to_nothing(width: int) -> None:
    mask = torch.zeros(2, 1, 33, 20)
    mask[0, 0, 10:15, 8:10] = 1
    soft = softened(mask, width)
    y, x = torch.arange(33)[:, None], torch.arange(20)
    away = torch.maximum((10 - y).clamp(min=0) + (y - 14).clamp(min=0), (8 - x).clamp(min=0) + (x - 9).clamp(min=0))
    torch.testing.assert_close(soft[0, 0], (1 - away / (width + 1)).clamp(min=0), rtol=0, atol=1e-6)
    assert torch.equal(soft == 1, mask == 1)
    assert not soft[0, 0][away > width].any()
    assert not soft[1].any()


def test_soft_edges_of_the_mask_by_words() -> None:
    maps = random_maps(1, 16, 16)
    hard, soft = (blend(threshold=0.8, soft=width) for width in (0, 3))
    hard, soft = (each.mask(*of_phrases(maps, each.columns[0]), (64, 64)) for each in (hard, soft))
    assert torch.equal(soft, softened(hard, 3))
    assert torch.equal(soft == 1, hard == 1)
    assert ((soft > 0) & (soft < 1)).any()


def test_masks_by_hand_unite_or_limit() -> None:
    maps = random_maps(2, 16, 16)
    words = blend(threshold=0.7)
    words = words.mask(*of_phrases(maps, words.columns[0]), (64, 64))
    user = torch.rand(2, 64, 64, generator=torch.Generator().manual_seed(1))
    for mine in (user, user[:1]):
        united, limited = (blend(threshold=0.7, user=mine, unite=unite) for unite in (True, False))
        united, limited = (each.mask(*of_phrases(maps, each.columns[0]), (64, 64)) for each in (united, limited))
        assert torch.equal(united, torch.where(words == 1, 1.0, mine[:, None]))
        assert torch.equal(limited, torch.where(words == 1, mine[:, None], 0.0))
    alone = blend(phrases=None, user=user)
    assert torch.equal(alone.mask(None, None, (64, 64)), user[:, None])


def test_masks_by_hand_come_at_any_size() -> None:
    user = torch.zeros(1, 512, 768)
    user[:, :260, :384] = 1
    mask = blend(phrases=None, user=user).mask(None, None, (64, 96))
    assert mask.shape == (1, 1, 64, 96)
    assert (mask[0, 0, :32, :48] == 1).all()
    torch.testing.assert_close(mask[0, 0, 32, :48], torch.full((48,), 0.5))  # 4 of 8 rows of pixels
    assert not mask[0, 0, 33:].any()
    assert not mask[0, 0, :, 48:].any()
    small = torch.tensor([[[0.0, 1.0], [0.25, 0.0]]])
    mask = blend(phrases=None, user=small).mask(None, None, (64, 96))
    assert torch.equal(mask[0, 0], small[0].repeat_interleave(32, 0).repeat_interleave(48, 1))


@pytest.mark.parametrize(
    ("latent", "expected"),
    [
        ((64, 64), (16, 16)),
        ((128, 128), (32, 32)),
        ((96, 64), (24, 16)),
        ((65, 65), (17, 17)),
        ((65, 33), (33, 17)),
        ((47, 48), (12, 12)),
        ((40, 40), (20, 20)),
        ((8, 8), (8, 8)),
    ],
)
def test_size_of_the_layers_that_place_a_word(latent: tuple[int, int], expected: tuple[int, int]) -> None:
    assert map_size(latent) == expected


def test_wrong_masks_and_prompts_are_refused(tiny: Tiny) -> None:
    three = blend(phrases=None, user=torch.ones(3, 8, 8))
    with pytest.raises(ValueError, match="has 3 masks for 1 images: connect one mask, or one for each"):
        tiny.sample(attach_blend(tiny.model, tiny.trajectory, three))
    model = attach_blend(tiny.model, tiny.trajectory, blend(tiny))
    with pytest.raises(ValueError, match="not the target prompt of this Local Blend's words"):
        tiny.sample(model, conditioning(7))
    with pytest.raises(ValueError, match="already carries a Local Blend"):
        attach_blend(model, tiny.trajectory, blend(tiny))
    with pytest.raises(ValueError, match="different trajectories"):
        attach_blend(model, tiny.trajectory._replace(states=tiny.trajectory.states + 1), blend(tiny))


# --- whole runs ------------------------------------------------------------------------------------------------------


def sized(height: int, width: int, **parts) -> Tiny:
    tiny = Tiny(**parts)
    tiny.image = torch.randn(1, 4, height, width, generator=torch.Generator().manual_seed(4)) * 5
    tiny.trajectory = invert(tiny.model, Guidance(tiny.source, None, 1.0), tiny.image, tiny.sigmas)
    tiny.noise = tiny.model.model.process_latent_out(tiny.trajectory.states[0])
    return tiny


def refine(target: Tensor, tokens: int = 77, end: int = 4, steps: int = 5) -> tuple[PromptToPrompt, object]:
    """An edit that keeps some tokens' own maps and weighs others, and the same in the published form."""
    k, n = target.shape[:2]
    generator = torch.Generator().manual_seed(8)
    mapper = torch.randint(tokens, (n,), generator=generator)
    aligned = (torch.rand(n, generator=generator) < 0.6).float()
    gain = torch.rand(n, generator=generator) * 4
    carried = torch.zeros(tokens, n)
    carried[mapper, torch.arange(n)] = aligned
    windows = torch.stack([torch.zeros(k, n), torch.full((k, n), end / steps)])
    carry = Carry(carried.expand(k, -1, -1), (1 - aligned).expand(k, -1))
    edit = PromptToPrompt(carry, target, gain.expand(k, -1), windows, Window(0, 0), 0)

    def published(step: int, source: Tensor, own: Tensor) -> Tensor:
        return gain.double() * (source[..., mapper] * aligned + own * (1 - aligned)) if step < end else own

    return edit, published


class Watch:
    """A blend of everything that keeps the sums that it is given."""

    def __init__(self, table: tuple[Tensor, Tensor], layout: bool = False) -> None:
        self.columns, self.layout = table, layout
        self.seen: list[tuple[Tensor, Tensor]] = []

    def check(self, positive: Tensor, batch: int) -> None:
        pass

    def applies(self, fraction: float) -> bool:
        return True

    def mask(self, source: Tensor, target: Tensor, size: tuple[int, int]) -> Tensor:
        self.seen.append((source, target))
        return torch.ones(1, 1, *size)


def unedited(step: int, source: Tensor, own: Tensor) -> Tensor:
    return own


class Plain:
    """Local blend written out: the running sum of maps of one size, and the mask after each step."""

    def __init__(self, tiny: Tiny, local: LocalBlend, words: list[list[int]], size: tuple[int, int]) -> None:
        self.tiny, self.local, self.words, self.size = tiny, local, words, size
        self.sums: list[Tensor | int] = [0, 0]
        self.masks: list[Tensor] = []

    def __call__(self, step: int, x: Tensor, attended: dict[str, list[Tensor]]) -> Tensor:
        for i, role in enumerate(("source", "target")):
            maps = [m[0].mean(0) for m in attended[role] if m.shape[2] == self.size[0] * self.size[1]]
            self.sums[i] = self.sums[i] + torch.stack(maps).mean(0).unflatten(0, self.size)
        if (step + 1) / self.tiny.steps <= self.local.start:
            return x
        latent = tuple(x.shape[2:])
        mask = published_mask(tuple(self.sums), self.words[0], self.local.threshold, True, latent)
        if self.words[1]:
            mask &= ~published_mask(tuple(self.sums), self.words[1], self.local.subtract_threshold, False, latent)
        self.masks.append(mask)
        state = self.tiny.trajectory.states[step + 1].double()
        return state + mask * (x - state)


RUNS = [
    # edited, start, height and width of the latent, of the map, source and target tokens, calls split
    (True, 0.0, (8, 8), (8, 8), 77, 77, False),
    (True, 0.4, (8, 8), (8, 8), 77, 154, True),
    (True, 0.2, (27, 24), (14, 12), 154, 77, False),
    (False, 0.0, (9, 7), (9, 7), 77, 77, True),
]


@pytest.mark.parametrize(("edited", "start", "latent", "size", "source", "target", "no_memory"), RUNS)
def test_whole_run_equals_the_plain_loop(
    edited: bool,
    start: float,
    latent: tuple[int, int],
    size: tuple[int, int],
    source: int,
    target: int,
    no_memory: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Masks from running sums of the edited maps, blended with the source's state of the next sigma."""
    tiny = sized(*latent, source=conditioning(1, source), target=conditioning(2, target))
    local = blend(tiny, ([[2, 3]], [[4]]), 0.8, 0.9, start)
    edit, published = refine(tiny.target[0][0], source) if edited else (None, unedited)
    plain = Plain(tiny, local, [[2, 3], [4]], size)
    expected = tiny.model.model.process_latent_out(classic_p2p(tiny, published, 0, 4.0, plain))
    model = attach_blend(tiny.model, tiny.trajectory, local)
    if edit:
        model = attach(model, tiny.trajectory, edit)
    if no_memory:
        split(monkeypatch, tiny)
    assert distance(tiny.sample(model), expected) < 1e-4
    assert len(plain.masks) == round((1 - start) * 5)
    assert all(0.1 < mask.float().mean() < 0.9 for mask in plain.masks)
    assert not torch.equal(plain.masks[0], plain.masks[-1])


def test_masks_are_of_the_edited_maps(tiny: Tiny) -> None:
    """As in the public code, whose store holds the maps that the edit has written."""
    table = columns([[2, 3]])
    edit, published = refine(tiny.target[0][0])
    watch, sums = Watch((table, table)), []
    tiny.sample(attach_blend(attach(tiny.model, tiny.trajectory, edit), tiny.trajectory, watch))

    def after(step: int, x: Tensor, attended: dict[str, list[Tensor]]) -> Tensor:
        maps = torch.stack([m[0].mean(0) for m in attended["target"] if m.shape[2] == 64]).mean(0)
        sums.append((maps @ table[0].double()).T.reshape(1, 1, 8, 8) + (sums[-1] if sums else 0))
        return x

    classic_p2p(tiny, published, 0, 4.0, after)
    for (_, target), expected in zip(watch.seen, sums, strict=True):
        torch.testing.assert_close(target.double(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("sampler", ["euler", "heun"])
def test_a_mask_of_ones_is_the_edit_alone(tiny: Tiny, sampler: str) -> None:
    edit, _ = refine(tiny.target[0][0], end=5)
    alone = tiny.sample(attach(tiny.model, tiny.trajectory, edit), sampler=sampler)
    for local in (blend(phrases=None, user=torch.ones(1, 8, 8)), blend(tiny, ([[2]], []), threshold=-1.0)):
        model = attach_blend(attach(tiny.model, tiny.trajectory, edit), tiny.trajectory, local)
        assert torch.equal(tiny.sample(model, sampler=sampler), alone)


def test_a_mask_of_ones_without_an_edit(tiny: Tiny) -> None:
    """By hand it is the plain run, bit for bit; by words the source rides along, which may round differently."""
    plain = tiny.sample(tiny.model)
    model = attach_blend(tiny.model, tiny.trajectory, blend(phrases=None, user=torch.ones(1, 8, 8)))
    assert torch.equal(tiny.sample(model), plain)
    model = attach_blend(tiny.model, tiny.trajectory, blend(tiny, ([[2]], []), threshold=-1.0))
    assert distance(tiny.sample(model), plain) < 1e-5


@pytest.mark.parametrize("sampler", EXACT)
def test_outside_the_mask_is_the_source(tiny: Tiny, sampler: str) -> None:
    """Exactly, at every step and in the result."""
    user = torch.zeros(1, 8, 8)
    user[:, 2:6, :5] = 1
    edit, _ = refine(tiny.target[0][0])
    source = tiny.model.model.process_latent_out(tiny.trajectory.states[-1])
    seen = []

    def watch(executor, x: Tensor, timestep: Tensor, *args, **kwargs):
        index = tiny.trajectory.index(float(timestep[0]))
        seen.append((index, (x - tiny.trajectory.states[index])[:, :, user[0] == 0].abs().max()))
        return executor(x, timestep, *args, **kwargs)

    for local in (blend(tiny, ([[2, 3]], []), 0.8, user=user), blend(phrases=None, user=user)):
        model = attach_blend(attach(tiny.model, tiny.trajectory, edit), tiny.trajectory, local)
        model.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, "test.watch", watch)  # runs inside ours
        result = tiny.sample(model, sampler=sampler)
        assert torch.equal(result[:, :, user[0] == 0], source[:, :, user[0] == 0])
        assert not torch.isclose(result, source).all()
    # The run starts from the trajectory's noise, through the host's latent scaling.
    assert all(apart == 0 for index, apart in seen if index)
    assert {index for index, _ in seen} >= set(range(5))


@pytest.mark.parametrize("sampler", EXACT)
def test_a_mask_of_zeros_is_the_source(tiny: Tiny, sampler: str) -> None:
    source = tiny.model.model.process_latent_out(tiny.trajectory.states[-1])
    for local in (
        blend(phrases=None, user=torch.zeros(1, 8, 8)),
        blend(tiny, ([[2]], []), threshold=1.0, start=0.9),
    ):
        model = attach_blend(tiny.model, tiny.trajectory, local)
        assert torch.equal(tiny.sample(model, sampler=sampler), source)


def test_a_start_at_the_end_blends_nothing(tiny: Tiny) -> None:
    local = blend(phrases=None, user=torch.zeros(1, 8, 8), start=1.0)
    assert torch.equal(tiny.sample(attach_blend(tiny.model, tiny.trajectory, local)), tiny.sample(tiny.model))


def test_a_soft_mask_mixes(tiny: Tiny) -> None:
    """One step, so that the mix can be read off the result."""
    user = torch.rand(1, 8, 8, generator=torch.Generator().manual_seed(1))
    source = tiny.model.model.process_latent_out(tiny.trajectory.states[-1])
    plain = tiny.sample(tiny.model)
    local = blend(phrases=None, user=user, start=0.9)
    mixed = tiny.sample(attach_blend(tiny.model, tiny.trajectory, local))
    torch.testing.assert_close(mixed, source + user[:, None] * (plain - source), rtol=1e-5, atol=1e-5)


# --- what is measured ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "target", "negative", "no_memory"),
    [(77, 77, 77, False), (77, 154, 231, False), (154, 77, 77, False), (154, 77, 77, True)],
)
def test_word_maps_are_the_layers_own(
    source: int, target: int, negative: int, no_memory: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """softmax(q k) of the layers of the map's size: means over heads and layers, copies of a token added."""
    tiny = Tiny(source=conditioning(1, source), target=conditioning(2, target), negative=conditioning(3, negative))
    seen: list[tuple[int, Tensor, Tensor]] = []
    chunks: list[int] = []

    def attend(q: Tensor, k: Tensor, v: Tensor, options: dict) -> Tensor:
        if options["activations_shape"][2:] == [8, 8]:
            chunks[:] = options["palimpsest.chunks"]
            seen.extend((chunk, q[i], k[i]) for i, chunk in enumerate(chunks))
        return comfy.ldm.modules.attention.optimized_attention(q, k, v, options["n_heads"])

    tables = columns([[2, 3], [5]], source), columns([[4], [6, 7]], target)
    watch = Watch(tables)
    model = tiny.model.clone()
    for block in (("input", 1), ("output", 2), ("output", 3)):
        model.set_model_attn2_replace(attend, *block)
    model = attach_blend(model, tiny.trajectory, watch)
    if no_memory:
        split(monkeypatch, tiny)
    tiny.sample(model, sigmas=tiny.sigmas[:2])
    for of_chunk, table, measured in ((2, tables[0][0], watch.seen[0][0]), (0, tables[1][0], watch.seen[0][1])):
        layers = []
        for q, k in [(q, k) for chunk, q, k in seen if chunk == of_chunk]:
            q, k = (t.double().unflatten(-1, (4, -1)).transpose(0, 1) for t in (q, k))
            maps = (q @ k.transpose(1, 2) / q.shape[-1] ** 0.5).softmax(-1).mean(0)
            layers.append(sum(maps[:, i : i + len(table)] for i in range(0, maps.shape[1], len(table))))
        assert len(layers) == 3
        expected = (torch.stack(layers).mean(0) @ table.double()).T.reshape(1, 2, 8, 8)
        torch.testing.assert_close(measured.double(), expected, rtol=1e-5, atol=1e-7)


def test_maps_are_added_up_over_the_steps(tiny: Tiny) -> None:
    table = columns([list(range(77))])
    watch = Watch((table, table))
    tiny.sample(attach_blend(tiny.model, tiny.trajectory, watch))
    assert len(watch.seen) == 5
    for step, pair in enumerate(watch.seen, 1):
        for maps in pair:  # the whole of attention at each step
            torch.testing.assert_close(maps, torch.full((1, 1, 8, 8), float(step)))


def test_measuring_leaves_other_packs_attention_in_place(tiny: Tiny) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, options: dict) -> Tensor:
        return 0.5 * comfy.ldm.modules.attention.optimized_attention(q, k, v, options["n_heads"])

    plain = tiny.sample(tiny.model)
    model = tiny.model.clone()
    model.set_model_attn2_replace(attend, "output", 2)
    model.set_model_attn2_replace(attend, "middle", 0, 0)
    expected = tiny.sample(model)
    result = tiny.sample(attach_blend(model, tiny.trajectory, blend(tiny, ([[2]], []), threshold=-1.0)))
    assert distance(result, expected) < 1e-5
    assert distance(plain, expected) > 1e-3


# --- runs and rows ---------------------------------------------------------------------------------------------------


def test_words_need_the_sources_row_and_hands_do_not(tiny: Tiny) -> None:
    counted, rows = rows_of(tiny.model)
    edit, _ = refine(tiny.target[0][0], end=2)
    by_hand = blend(phrases=None, user=torch.ones(1, 8, 8))

    def sampled(model, **changes) -> list[int]:
        rows.clear()
        tiny.sample(model, **changes)
        return list(rows)

    assert sampled(attach_blend(counted, tiny.trajectory, by_hand)) == sampled(counted) == [2] * 5
    edited = attach(counted, tiny.trajectory, edit)
    assert sampled(attach_blend(edited, tiny.trajectory, by_hand)) == sampled(edited) == [3, 3, 2, 2, 2]
    words = attach_blend(counted, tiny.trajectory, blend(tiny))
    assert sampled(words) == [3] * 5
    assert sampled(words, cfg=1.0) == [2] * 5
    assert sampled(words, sampler="heun") == [3, 3] + [2, 3] * 4  # measured once at each sigma


# of source and target, by image
TWO_TARGETS = (([[2, 3], [4]], [[9], [10]]), ([[2], [5]], [[5], [6, 7]]))


def test_a_batch_of_targets_equals_single_runs() -> None:
    """Each image by the words of its own target, in that and in the source."""
    tiny = Tiny(target=conditioning(2, batch=2))
    targets = tiny.target[0][0]
    both = [torch.cat([columns(one), columns(other)]) for one, other in TWO_TARGETS]
    local = replace(blend(tiny, ([[2, 3]], [[4]]), 0.8, 0.9), columns=tuple(both))

    def model(local: LocalBlend, target: Tensor):
        edited = attach(tiny.model, tiny.trajectory, refine(target)[0])
        return attach_blend(edited, tiny.trajectory, local)

    counted, rows = rows_of(model(local, targets))
    together = tiny.sample(counted, noise=tiny.noise.repeat(2, 1, 1, 1))
    assert rows == [1, 4] * 5
    for i in range(2):
        target = targets[i : i + 1]
        own = replace(local, columns=tuple(table[i : i + 1] for table in both), target=target)
        single = tiny.sample(model(own, target), [[target, {}]])
        assert distance(together[i : i + 1], single) < 1e-4
    for crossed in ((both[0], both[1].flip(0)), (both[0].flip(0), both[1])):
        other = tiny.sample(model(replace(local, columns=crossed), targets), noise=tiny.noise.repeat(2, 1, 1, 1))
        assert distance(other, together) > 1e-2


def test_a_batch_of_images_equals_single_runs() -> None:
    tiny = Tiny(batch=2)
    user = torch.zeros(2, 8, 8)
    user[0, :5], user[1, :, 3:] = 1, 1
    local = blend(tiny, ([[2, 3]], [[4]]), 0.8, 0.9, user=user)
    edit, _ = refine(tiny.target[0][0])
    together = tiny.sample(attach_blend(attach(tiny.model, tiny.trajectory, edit), tiny.trajectory, local))
    for i in range(2):
        one = copy.copy(tiny)
        one.trajectory = tiny.trajectory._replace(states=tiny.trajectory.states[:, i : i + 1])
        one.noise = tiny.noise[i : i + 1]
        model = attach_blend(tiny.model, one.trajectory, replace(local, user=user[i : i + 1]))
        assert distance(together[i : i + 1], one.sample(attach(model, one.trajectory, edit))) < 1e-4


def model_of(tiny: Tiny, edit: Edit | None = None):
    model = attach(tiny.model, tiny.trajectory, edit or refine(tiny.target[0][0])[0])
    return attach_blend(model, tiny.trajectory, blend(tiny, ([[2, 3]], [[4]]), 0.8, 0.9, soft=1))


def test_requeueing_gives_the_same_bits_and_clones_stay_clean(tiny: Tiny) -> None:
    before, noise = tiny.sample(tiny.model), tiny.noise.clone()
    model = model_of(tiny)
    first = tiny.sample(model)
    assert torch.equal(tiny.sample(model), first)
    assert torch.equal(tiny.sample(model.clone()), first)
    assert torch.equal(tiny.sample(tiny.model), before)
    assert torch.equal(tiny.noise, noise)
    assert not torch.equal(first, before)


def test_an_interrupt_leaves_nothing_behind(tiny: Tiny) -> None:
    before, model = tiny.sample(tiny.model), model_of(tiny)
    expected = tiny.sample(model)
    calls = 0

    def interrupt(executor, *args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == 3:
            raise comfy.model_management.InterruptProcessingException
        return executor(*args, **kwargs)

    broken = model.clone()
    broken.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "test.interrupt", interrupt)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        tiny.sample(broken)
    assert torch.equal(tiny.sample(tiny.model), before)
    assert torch.equal(tiny.sample(model), expected)
    calls = 3  # and the broken one itself works on
    assert torch.equal(tiny.sample(broken), expected)


def test_split_calls_give_the_same(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a sampler asks twice at a sigma."""
    model = model_of(tiny)
    together = tiny.sample(model, sampler="heun")
    split(monkeypatch, tiny)
    assert distance(tiny.sample(model, sampler="heun"), together) < 1e-4
