"""What people type about single words, and the nodes that take it."""

from __future__ import annotations

import comfy.samplers
import pytest
import torch

from palimpsest.attention.alignment import PromptEdit
from palimpsest.attention.heatmap import colored, word_heat
from palimpsest.attention.p2p import PRESETS, Window
from palimpsest.attention.phrases import changed_columns, gains, phrase_columns, prompt_columns, windows
from palimpsest.attention.record import Recording, record_attention
from palimpsest.host.branch.source import attach
from palimpsest.host.words import Words, words
from palimpsest.inversion.run import Guidance, record
from palimpsest.nodes.blend import LocalBlendMask, LocalBlendNode
from palimpsest.nodes.maps import AttentionMaps
from palimpsest.nodes.p2p import P2PAttentionController
from palimpsest.nodes.store import RecordAttention
from test_source import swap
from tiny import Tiny, conditioning, execute, pieces

SOURCE, TARGET = "a cat on a mat", "a fluffy cat on a red mat"
HERE = torch.device("cpu")


def read(prompt: str, length: int = 77) -> Words:
    return words([pieces(prompt, length)])


def edit_of(source: str, *targets: str, alignment: str = "refine") -> PromptEdit:
    """Of prompts, with the tiny UNet's embeddings: those of Tiny for the first target."""
    embeddings = torch.cat([conditioning(2 + 4 * i)[0][0] for i in range(len(targets))])
    texts = tuple(read(target) for target in targets)
    return PromptEdit(read(source), texts, (alignment,) * len(targets), (conditioning(1)[0][0], embeddings))


EDIT = edit_of(SOURCE, TARGET)


def test_gains_of_words_and_phrases() -> None:
    table = gains("fluffy:2, red mat : -1.5", EDIT)
    expected = torch.ones(1, 77)
    expected[0, 2], expected[0, 6:8] = 2, -1.5
    assert torch.equal(table, expected)
    assert torch.equal(gains(" ", EDIT), torch.ones(1, 77))


def test_a_word_of_one_target_of_two() -> None:
    table = gains("dog:3", edit_of("a cat", "a dog", "a bird"))
    assert table[0].tolist() == [1, 1, 3, *[1] * 74]
    assert torch.equal(table[1], torch.ones(77))


def test_windows_of_words() -> None:
    table = windows("fluffy:0.4, red:0.1-0.5", EDIT, 0.2, 0.8)
    assert table[:, 0, 2].tolist() == [0, 0.4]
    assert table[:, 0, 6].tolist() == [0.1, 0.5]
    assert table[:, 0, 3].tolist() == [0.2, 0.8]
    assert table.dtype == torch.float64
    assert windows("red:0", EDIT, 0.2, 0.8)[:, 0, 6].tolist() == [0, 0]  # never


@pytest.mark.parametrize(
    ("function", "text", "sentence"),
    [
        (gains, "lion:2", "reweight of .* names 'lion', but the target prompt has the words a | fluffy | cat"),
        (gains, "fluffy", "reweight of .* has 'fluffy' without a colon: write for example fluffy:2"),
        (gains, "fluffy:much", "has 'fluffy:much', where 'much' is no number"),
        (gains, "fluffy:nan", "where 'nan' is no number"),
        (
            lambda *a: windows(*a, 0, 1),
            "fluffy:0.1-0.2-0.3",
            "word_schedule .* has 'fluffy:0.1-0.2-0.3', but a schedule",
        ),
        (lambda *a: windows(*a, 0, 1), "fluffy:40", "fractions from 0 to 1"),
        (
            lambda *a: windows(*a, 0, 1),
            "fluffy:0.5-0.2",
            "has 'fluffy:0.5-0.2', which is to end at 0.2 but starts at 0.5",
        ),
        (lambda *a: windows(*a, 0, 1), "fluffy:0.5-0.5", "which is to end at 0.5 but starts at 0.5: write for example"),
        (
            lambda *a: phrase_columns([a[0]], a[1], "Local Blend"),
            "moon",
            "Local Blend looks for 'moon', but the prompts",
        ),
        (
            lambda *a: prompt_columns([a[0]], a[1].source),
            "fluffy",
            "Attention Maps looks for 'fluffy', but the image's",
        ),
    ],
)
def test_what_does_not_fit_is_refused_in_a_sentence(function, text: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence.replace("|", r"\|")):
        function(text, EDIT)


def test_columns_of_phrases() -> None:
    source, target = phrase_columns(["cat", "red mat"], EDIT, "Local Blend")
    assert source.nonzero().tolist() == [[0, 2, 0]]
    assert target.nonzero().tolist() == [[0, 3, 0], [0, 6, 1], [0, 7, 1]]


def test_columns_of_what_changes() -> None:
    source, target = changed_columns(EDIT)
    assert not source.any()
    assert target.nonzero().tolist() == [[0, 2, 0], [0, 6, 1]]
    source, target = changed_columns(edit_of("a cat", "a dog", "a cat"))
    assert source.nonzero().tolist() == [[0, 2, 0]]
    assert target.nonzero().tolist() == [[0, 2, 1]]
    assert changed_columns(edit_of("a cat", "a cat"))[0].shape[2] == 0


def test_changed_words_side_by_side_are_joined() -> None:
    """Of each prompt, words of several pieces with them, but not over a word that stays."""
    edit = edit_of("a cat on a mat", "a flu|ffy red dog on a blue mat", "a cat on a mat")
    source, target = changed_columns(edit, joined=True)
    assert source.nonzero().tolist() == [[0, 2, 0]]
    assert target.nonzero().tolist() == [[0, 2, 1], [0, 3, 1], [0, 4, 1], [0, 5, 1], [0, 8, 2]]
    assert changed_columns(edit)[1].shape[2] == 5


def test_columns_of_a_prompt_are_its_words_where_none_is_named() -> None:
    assert prompt_columns([], EDIT.source).shape == (77, 5)
    assert prompt_columns(["cat on"], EDIT.source).nonzero().tolist() == [[2, 0], [3, 0]]


def test_repeated_targets_mark_every_copy() -> None:
    long = edit_of(SOURCE, TARGET)
    tiled = long._replace(embeddings=(long.embeddings[0], long.embeddings[1].repeat(1, 2, 1)))
    assert gains("fluffy:2", tiled).nonzero().shape == (154, 2)
    assert (gains("fluffy:2", tiled) == 2).nonzero()[:, 1].tolist() == [2, 79]
    assert phrase_columns(["fluffy"], tiled, "Local Blend")[1].nonzero()[:, 1].tolist() == [2, 79]


def test_presets_are_what_they_say(tiny: Tiny) -> None:
    parts = {"model": tiny.model, "trajectory": tiny.trajectory, "prompt_edit": edit_of(SOURCE, TARGET)}
    for name, preset in PRESETS.items():
        (chosen,) = execute(P2PAttentionController, **parts, preset=name, cross_replace=0.1, self_replace=0.0)
        (written,) = execute(
            P2PAttentionController,
            **parts,
            cross_replace=preset.cross.end,
            self_replace=preset.self_.end,
            self_max_side=preset.self_max_side,
            reweight="fluffy:2, red:2" if preset.new_words == 2 else "",
        )
        assert torch.equal(tiny.sample(chosen), tiny.sample(written))  # only words are added: all alignments are one
    weighed, chosen = (
        execute(P2PAttentionController, **parts, preset="PIE-Bench", reweight=reweight)[0] for reweight in ("red:1", "")
    )
    assert not torch.equal(tiny.sample(weighed), tiny.sample(chosen))


def test_local_blend_node(tiny: Tiny) -> None:
    parts = {"model": tiny.model, "trajectory": tiny.trajectory}
    edit = edit_of(SOURCE, TARGET)
    (edited,) = execute(P2PAttentionController, **parts, prompt_edit=edit)
    over = {"model": edited, "trajectory": tiny.trajectory}
    (blended,) = execute(LocalBlendNode, **over, prompt_edit=edit, threshold=0.99, soft_edge=0)
    samples = tiny.sample(blended)
    (mask,) = LocalBlendMask.execute({"samples": samples}, tiny.trajectory, tiny.model).result
    assert mask.shape == (1, 64, 64)
    assert 0 < mask.mean() < 1
    source = tiny.model.model.process_latent_out(tiny.trajectory.states[-1])
    outside = (mask[:, ::8, ::8] == 0)[:, None].expand_as(samples)
    assert torch.equal(samples[outside], source[outside])

    left = torch.zeros(1, 32, 32)
    left[..., :16] = 1
    (by_hand,) = execute(LocalBlendNode, **over, mask=left)
    (shown,) = LocalBlendMask.execute({"samples": tiny.sample(by_hand)}, tiny.trajectory, tiny.model).result
    assert torch.equal(shown[..., :32], torch.ones(1, 64, 32))
    assert not shown[..., 32:].any()

    for changes, sentence in [
        ({}, "needs prompt_edit to find words"),
        ({"mask": left, "words": "cat"}, "needs prompt_edit to find words"),
        ({"prompt_edit": edit_of(SOURCE, SOURCE)}, "has no words, and the prompts of Prompt Edit do not differ"),
        ({"prompt_edit": edit, "words": "moon"}, "Local Blend looks for 'moon'"),
    ]:
        with pytest.raises(ValueError, match=sentence):
            execute(LocalBlendNode, **over, **changes)
    with pytest.raises(ValueError, match="already carries a Local Blend"):
        execute(LocalBlendNode, model=blended, trajectory=tiny.trajectory, mask=left)
    with pytest.raises(ValueError, match=r"'uni_pc': choose euler"):
        tiny.sample(by_hand, sampler="uni_pc")
    with pytest.raises(ValueError, match="a latent of shape"):
        LocalBlendMask.execute({"samples": torch.zeros(1, 4, 4, 4)}, tiny.trajectory, tiny.model)


def test_attention_maps_are_the_recorded_ones(tiny: Tiny) -> None:
    recording = Recording(Window(0, 0), Window(0, 0), 1, 0, torch.float32, HERE)
    store = record_attention(tiny.model, tiny.trajectory, recording)
    columns = prompt_columns(["cat", "mat"], EDIT.source)
    heat = word_heat(store, columns, (8, 8), 0.0, 0.6, all_sizes=False)
    (finest,) = (maps for maps in store.maps if maps.shape[2:4] == (8, 8))
    expected = finest[:3, 0].double().mean(0)[..., [2, 5]].movedim(-1, 0)
    torch.testing.assert_close(heat.double(), expected / expected.amax((1, 2), keepdim=True), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=r"the steps from 0\.5 to 0\.5 of the schedule, where there are none"):
        word_heat(store, columns, (8, 8), 0.5, 0.5, all_sizes=False)
    coarse = store._replace(maps=tuple(maps for maps in store.maps if maps.shape[2:4] != (8, 8)))
    with pytest.raises(
        ValueError, match=r"no maps of the layers that place words in this picture, 8 x 8: set layers of"
    ):
        word_heat(coarse, columns, (8, 8), 0.0, 0.6, all_sizes=False)
    assert word_heat(coarse, columns, (8, 8), 0.0, 0.6, all_sizes=True).shape == (2, 8, 8)

    image = torch.rand(1, 40, 24, 3)
    maps, masks = execute(AttentionMaps, attention_store=store, prompt_edit=EDIT, words="cat, mat", image=image)
    assert maps.shape == (2, 40, 24, 3)
    assert masks.shape == (2, 40, 24)
    assert masks.amax() == 1
    maps, masks = execute(AttentionMaps, attention_store=store, prompt_edit=EDIT, threshold=0.97, layers="all")
    assert maps.shape == (5, 64, 64, 3)
    assert set(masks.unique().tolist()) == {0, 1}
    other = EDIT._replace(embeddings=(conditioning(9)[0][0], conditioning(8)[0][0]))
    with pytest.raises(ValueError, match="recorded with another prompt"):
        execute(AttentionMaps, attention_store=store, prompt_edit=other)


def test_colours_go_from_cold_to_hot() -> None:
    found = colored(torch.tensor([[[0.0, 1.0]]]), None)
    assert found[0, 0, 0].sum() < found[0, 0, 1].sum()
    assert colored(torch.zeros(1, 2, 2), torch.ones(1, 2, 2, 3)).amin().item() == pytest.approx(0.35)


def test_the_edited_image_has_maps_too(tiny: Tiny) -> None:
    """Record Trajectory on the edited MODEL keeps the run as it is, and its states feed Record Attention."""
    edited = attach(tiny.model, tiny.trajectory, swap())
    euler = comfy.samplers.sampler_object("euler")
    guidance = Guidance(tiny.target, tiny.negative, 4.0)
    zeros = torch.zeros_like(tiny.noise)
    trajectory, image = record(edited, guidance, euler, tiny.sigmas, zeros, tiny.noise, 0)
    assert torch.equal(image, tiny.sample(edited))
    (store,) = execute(RecordAttention, model=tiny.model, trajectory=trajectory)
    maps, _ = execute(AttentionMaps, attention_store=store, prompt_edit=edit_of(SOURCE, TARGET), words="fluffy")
    assert maps.shape == (1, 64, 64, 3)


def test_record_attention_says_what_it_left_out(tiny: Tiny) -> None:
    parts = {"model": tiny.model, "trajectory": tiny.trajectory, "dtype": "fp32"}
    for budget, sentence in ((2048, "4 of 4 edited steps recorded"), (0, "The budget leaves 4 steps")):
        widgets = {"cross_replace": 0.8, "self_replace": 0.4, "feature_replace": 0.0, "self_max_side": 32}
        output = RecordAttention.execute(**parts, **widgets, budget_mb=budget, device="cpu")
        assert sentence in output.ui.as_dict()["text"][0]
