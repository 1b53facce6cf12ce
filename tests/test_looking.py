"""What people see instead of reading it: which words change, what runs cost, where words are looked for."""

from __future__ import annotations

import json
import time
import urllib.error

import comfy.samplers
import pytest
import torch
from comfy_api.latest import io
from comfy_execution.graph import DynamicPrompt
from comfy_execution.progress import ProgressHandler, add_progress_handler, reset_progress_state

from host_server import HostServer
from palimpsest.attention.local_blend import LocalBlend
from palimpsest.attention.word_pairs import Pair, told, word_pairs
from palimpsest.host.branch.source import attach_blend
from palimpsest.host.run.live import PAUSE, SHARE, Live
from palimpsest.host.words import words
from palimpsest.nodes.exact import EDICTInversion, EditFriendlyInversion, OBELMInversion
from palimpsest.nodes.inversion import DDIMInversion, RecordTrajectory
from palimpsest.nodes.null_text import NullTextInversion
from palimpsest.nodes.store import RecordAttention
from tiny import Tiny, pieces, rows_of, run

ROUTE = "/palimpsest/alignment"


def pairs(source: str, target: str, alignment: str) -> list[str]:
    found = word_pairs(words([pieces(source)]), words([pieces(target)]), alignment)
    return [f"{pair.state}: {' '.join(pair.source)} > {' '.join(pair.target)}" for pair in found]


# --- words -----------------------------------------------------------------------------------------------------------


def test_swapped_words_stand_under_those_whose_places_they_take() -> None:
    assert pairs("a red circle on blue", "a green star on blue", "swap") == [
        "kept: a > a",
        "swapped: red > green",
        "swapped: circle > star",
        "kept: on > on",
        "kept: blue > blue",
    ]
    # Where they do not pair up, the node swaps them as one.
    assert pairs("a cat sits", "a big dog sits", "swap") == [
        "kept: a > a",
        "swapped: cat > big dog",
        "kept: sits > sits",
    ]


def test_refined_words_are_new_or_left_out() -> None:
    assert pairs("a cat sits here", "a fluffy dog sits", "refine") == [
        "kept: a > a",
        "dropped: cat > ",
        "new:  > fluffy",
        "new:  > dog",
        "kept: sits > sits",
        "dropped: here > ",
    ]
    # Tokens that words share are carried over, though the words differ.
    assert pairs("a fire|truck", "a fire|fly", "refine") == ["kept: a > a", "swapped: firetruck > firefly"]


@pytest.mark.parametrize(("source", "target"), [("", ""), ("", "a cat"), ("a cat", "")])
def test_empty_prompts_have_words_on_one_side(source: str, target: str) -> None:
    state = "dropped: {} > " if source else "new:  > {}"
    assert pairs(source, target, "refine") == [state.format(word) for word in (source or target).split()]


def test_changes_are_told_in_a_line() -> None:
    changed = [Pair(("a",), ("a",)), Pair(("cat",), ("big", "dog")), Pair((), ("now",)), Pair(("here",), ())]
    assert told(changed, "swap") == "swap: cat → big dog, + now, - here"
    assert told(changed[:1], "swap") == "swap: no word changes"


# --- the route -------------------------------------------------------------------------------------------------------


def asked(server: HostServer, **changes) -> dict:
    return json.loads(server.post(ROUTE, {"source": "", "target": "", "alignment": "auto", "demo": False} | changes))


@pytest.mark.parametrize(
    ("source", "target", "alignment"),
    [
        ("a photo of a cat on a meadow", "a photo of a dog on a meadow", "auto"),
        ("a photo of a cat on a meadow", "a small red dog, meadow", "auto"),
        ("a photo of a cat on a meadow", "a small red dog, meadow", "swap"),
        ("a (red:1.2) circle 35 zyzzyva", "a firetruck 7 é\U0001f600 embedding:none", "refine"),
        ("<img src=x onerror=alert(1)>", " ".join(f"word{i}" for i in range(100)), "auto"),
    ],
)
def test_typed_words_are_those_of_the_node(server: HostServer, source: str, target: str, alignment: str) -> None:
    edit = {"clip": ["1", 1], "source_prompt": source, "target_prompt": target, "alignment": alignment}
    prompt = {
        "1": {"class_type": "PalimpsestLoadDemoModel", "inputs": {}},
        "2": {"class_type": "PalimpsestPromptEdit", "inputs": edit},
        "3": {"class_type": "PreviewImage", "inputs": {"images": ["2", 3]}},
    }
    run = server.run(prompt, workflow={"nodes": []})
    assert not run.errors
    answer = asked(server, source=source, target=target, alignment=alignment, demo=True)
    assert run.outputs["2"]["palimpsest_words"] == [answer]
    assert run.outputs["2"]["text"] == [answer["text"]]


def test_words_that_the_demo_model_does_not_know_are_named(server: HostServer) -> None:
    prompts = {"source": "a red zyzzyva", "target": "a Red zyzzyva, qwertyish"}
    answer = asked(server, **prompts, demo=True)
    assert [word for word in answer["unknown"] if word != ","] == ["zyzzyva", "qwertyish"]
    assert "The demo model does not know: zyzzyva" in answer["text"]
    assert asked(server, **prompts)["unknown"] == []


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        (b"{", "has to be JSON"),
        (b"[]", "has to be JSON"),
        (b"[" * 100_000, "has to be JSON"),
        (b"\xff", "has to be JSON"),
        (b'{"source": "a"}', "has to be JSON"),
        (b'{"source": 1, "target": "a", "alignment": "auto", "demo": false}', "have to be texts"),
        (b'{"source": "a", "target": "%s", "alignment": "auto", "demo": false}' % (b"a" * 2001), "at most 2,000 signs"),
        (b'{"source": "a", "target": "a", "alignment": ["auto"], "demo": false}', "one of auto, swap, refine"),
        (b'{"source": "a", "target": "a", "alignment": "auto", "demo": 1}', "demo true or false"),
        (rb'{"source": "\ud800", "target": "a", "alignment": "auto", "demo": false}', "have to be texts"),
    ],
)
def test_bad_requests_are_refused_in_a_sentence(server: HostServer, body: bytes, sentence: str) -> None:
    request = urllib.request.Request(server.url + ROUTE, body)
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request)
    assert refused.value.code == 400
    assert sentence in json.load(refused.value)["error"]


def test_the_longest_prompts_are_answered_soon(server: HostServer) -> None:
    began = time.perf_counter()
    asked(server, source="a " * 1000, target="b " * 1000)
    assert time.perf_counter() - began < 20


# --- cost ------------------------------------------------------------------------------------------------------------


def cost_of(node: type, tiny: Tiny, **inputs) -> tuple[str, list[int]]:
    """What a node says of itself, and the rows of every UNet call, counted by another wrapper elsewhere."""
    model, rows = rows_of(tiny.model)
    said = run(node, model=model, **inputs).ui.as_dict()["text"][0]
    assert f"{len(rows)} network evaluations, {sum(rows)} rows, " in said
    return said, rows


def test_inversion_says_what_it_cost(tiny: Tiny) -> None:
    image = {"source": tiny.source, "image": {"samples": tiny.image}}
    said, rows = cost_of(DDIMInversion, tiny, **image, steps=5)
    assert rows == [1] * 5
    assert said.endswith("trajectory 0.0 MB.")
    *_, rows = cost_of(DDIMInversion, tiny, **image, steps=5, iterations=2)
    assert rows == [1] * 15
    guided = {"negative": tiny.negative, "cfg": 3.0, "steps": 4}
    for node, more in (
        (DDIMInversion, {}),
        (EditFriendlyInversion, {"skip": 0.0}),
        (EDICTInversion, {"strength": 1.0}),
        (OBELMInversion, {"strength": 1.0}),
    ):
        *_, rows = cost_of(node, tiny, **image, **guided, **more)
        assert sum(rows) >= 8


def test_trajectories_are_weighed(tiny: Tiny) -> None:
    assert tiny.trajectory.bytes == 6 * 4 * 8 * 8 * 4
    image = torch.zeros(1, 4, 32, 32)
    said, _ = cost_of(DDIMInversion, tiny, source=tiny.source, image={"samples": image}, steps=7)
    assert said.endswith("trajectory 0.1 MB.")  # 8 states of 16 KiB


def test_recording_says_what_it_cost(tiny: Tiny) -> None:
    sampler = comfy.samplers.sampler_object("euler")
    start = {"latent_image": {"samples": tiny.image}, "sampler": sampler, "sigmas": tiny.sigmas}
    *_, rows = cost_of(RecordTrajectory, tiny, positive=tiny.source, negative=tiny.negative, **start)
    assert sum(rows) >= 10
    said, rows = cost_of(RecordAttention, tiny, trajectory=tiny.trajectory)
    assert rows == [1] * 5
    assert said.startswith("4 of 4 edited steps recorded")


def test_null_text_says_what_it_cost(tiny: Tiny) -> None:
    *_, rows = cost_of(
        NullTextInversion, tiny, trajectory=tiny.trajectory, empty=tiny.negative, inner_steps=1, early_stop=0.0
    )
    assert sum(rows) >= 5 * 3


# --- live ------------------------------------------------------------------------------------------------------------


class Sent(ProgressHandler):
    """Keeps what would go to the frontend."""

    def __init__(self) -> None:
        super().__init__("webui")
        self.pictures: list[tuple] = []
        self.texts: list[tuple] = []
        self.server_instance, self.client_id = self, "tab"

    def send_progress_text(self, text: str, node_id: str, client: str) -> None:
        self.texts.append((text, node_id, client))

    def update_handler(self, node_id, value, max_value, state, prompt_id, image=None) -> None:
        self.pictures.append((node_id, image))


@pytest.fixture
def sent() -> Sent:
    reset_progress_state("prompt", DynamicPrompt({}))
    handler = Sent()
    add_progress_handler(handler)
    yield handler
    reset_progress_state("", DynamicPrompt({}))


def test_pictures_take_a_small_share_of_the_time(sent: Sent) -> None:
    live, drawing, drawn = Live("8"), 0.01, []

    def draw() -> torch.Tensor:
        time.sleep(drawing)
        drawn.append(None)
        return torch.ones(16, 16, 3)

    end = time.perf_counter() + 1.5
    while time.perf_counter() < end:
        live.show(draw)
    assert drawing / SHARE > PAUSE
    assert len(drawn) in (2, 3)
    node_id, (kind, picture, _) = sent.pictures[0]
    assert (node_id, kind, picture.size, picture.getpixel((0, 0))) == ("8", "JPEG", (16, 16), (255, 255, 255))


def test_without_a_server_nothing_is_drawn() -> None:
    reset_progress_state("", DynamicPrompt({}))
    Live("8").show(lambda: pytest.fail("drawn"))
    Live("8").say("nothing")


def test_record_attention_says_what_it_will_hold(sent: Sent, tiny: Tiny) -> None:
    """To who has a workflow open, and to no other."""
    widgets = {"cross_replace": 0.8, "self_replace": 0.4, "feature_replace": 0.0, "self_max_side": 32}
    widgets |= {"budget_mb": 2048, "dtype": "fp32", "device": "cpu"}
    expected = "4 of 4 edited steps to record, 0.2 MB, and 0.1 MB of word maps."
    for workflow, texts in ({}, []), ({"workflow": {}}, []), ({"workflow": {"id": 1}}, [(expected, "8", "tab")]):
        hidden = {io.Hidden.unique_id: "8", io.Hidden.extra_pnginfo: workflow}
        node = RecordAttention.PREPARE_CLASS_CLONE({"hidden_inputs": hidden})
        node.execute(tiny.model, tiny.trajectory, **widgets)
        assert sent.texts == texts


def test_local_blend_shows_its_words_while_sampling(tiny: Tiny) -> None:
    columns = torch.zeros(1, 77, 2)
    columns[:, 5, 0], columns[:, 7, 1] = 1, 1  # the second is where not to edit
    pictures = []
    shown = LocalBlend((columns, columns), 1, tiny.target[0][0], 0.3, 0.3, 0.2, 0, None, False, pictures.append)
    still = LocalBlend((columns, columns), 1, tiny.target[0][0], 0.3, 0.3, 0.2, 0, None, False)
    samples = [tiny.sample(attach_blend(tiny.model, tiny.trajectory, blend)) for blend in (shown, still)]
    assert len(pictures) == tiny.steps - 1  # with every mask, from the second step on
    picture = pictures[0]()
    assert picture.shape == (8, 8, 3)
    assert 0 <= picture.min() < picture.max() <= 1
    assert torch.equal(*samples)
