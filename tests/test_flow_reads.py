"""What a target reads in flow transformers: the source's row looked up, against a pair of rows written out plainly."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import comfy.samplers
import pytest
import torch
from comfy.samplers import calc_cond_batch
from torch import Tensor, nn

from flows import FLOWS, Flow
from palimpsest.host.branch.blocks import VITAL_BLOCKS, attention_layers, last_layers, layers_in, parse_blocks
from palimpsest.host.branch.source import attach_blend
from palimpsest.host.dit.architectures import dit_blocks, turned
from palimpsest.host.files.trajectory import Trajectory
from palimpsest.host.run.cost import metered
from palimpsest.host.run.sampler import OwnSampler, Run
from palimpsest.inversion.flow_edit import edit_trajectory
from palimpsest.inversion.run import Guidance, invert, resample
from palimpsest.inversion.virtual import invert_virtually
from palimpsest.nodes.blend import LocalBlendNode
from palimpsest.nodes.cross_attention import CrossAttentionGuidanceNode
from palimpsest.nodes.inject import MasaCtrlNode, PnPFeatureInjector
from palimpsest.nodes.p2p import P2PAttentionController
from test_flow_edit import CFG, STEPS, Parts, close, every_flow
from test_local_blend import blend
from tiny import execute

KV, QK = (1, 2), (0, 1)  # which of queries, keys and values are the source's


def blocks_of(model: nn.Module, flow: Flow) -> list[nn.Module]:
    return [block for name in flow.blocks for block in getattr(model, name)]


def image_of(flow: Flow, tensor: Tensor) -> Tensor:
    """A view of the image's tokens [..., tokens, ...] of queries, keys or values, without padding."""
    dim = 2 if flow.split else 1
    tokens = flow.latent[-1] * flow.latent[-2] // 4 * (flow.latent[2] if len(flow.latent) == 5 else 1)
    tokens = tokens if flow.name != "Flux.2" else flow.latent[-1] * flow.latent[-2]
    start = tensor.shape[dim] - flow.image if flow.order == "text image" else 0
    return tensor.narrow(dim, start, tokens)


@contextmanager
def attention(
    model: nn.Module, flow: Flow, options: dict, change: Callable[[int, list[Tensor]], None]
) -> Iterator[dict]:
    """Options by which queries, keys and values of each main block's first attention pass through `change`."""
    now: list[int] = []

    def override(func: Callable, q: Tensor, k: Tensor, v: Tensor, heads: int, *args, **kwargs) -> Tensor:
        tensors = [q.clone(), k.clone(), v.clone()]
        if now:
            change(now.pop(), tensors)
        return func(*tensors, heads, *args, **kwargs)

    with ExitStack() as stack:
        for i, block in enumerate(blocks_of(model, flow)):
            handle = block.register_forward_pre_hook(lambda module, inputs, i=i: now.__setitem__(slice(None), [i]))
            stack.callback(handle.remove)
        yield {**options, "optimized_attention_override": override}


class PairLoop(OwnSampler):
    """Euler with each prompt in a call of its own; from the source's it keeps what the others' layers take.

    union: whether that stands beside their own. residual: whether what the source's own step lacks is added.
    own: [image tokens], True where they keep their own; None for nowhere.
    """

    def __init__(
        self,
        flow: Flow,
        trajectory: Trajectory,
        layers: list[int],
        taken: tuple[int, ...],
        union: bool = False,
        residual: bool = False,
        own: Tensor | None = None,
    ) -> None:
        self.flow, self.trajectory, self.layers, self.taken = flow, trajectory, layers, taken
        self.union, self.residual, self.own = union, residual, own

    def walk(self, run: Run) -> Tensor:
        model, flow = run.guider.inner_model, self.flow
        x = self.trajectory.states[0].to(run.latent)
        for i, sigma, below in run.steps():
            kept: dict[int, list[Tensor]] = {}

            def keep(block: int, tensors: list[Tensor], kept: dict = kept) -> None:
                kept[block] = [image_of(flow, t).clone() for t in tensors]

            def take(block: int, tensors: list[Tensor], kept: dict = kept) -> None:
                if block in self.layers:
                    for at in self.taken:
                        if self.union:
                            tensors[at] = torch.cat([tensors[at], kept[block][at]], 2 if flow.split else 1)
                        else:
                            image, new = image_of(flow, tensors[at]), kept[block][at]
                            if self.own is not None:
                                shape = [-1 if dim == (2 if flow.split else 1) else 1 for dim in range(image.ndim)]
                                new = torch.where(self.own.view(shape), image, new)
                            image.copy_(new)

            def estimate(prompt: str, state: Tensor, change: Callable, sigma: float = sigma) -> Tensor:
                options = run.model_options["transformer_options"]
                with attention(model.diffusion_model, flow, options, change) as changed:
                    model_options = {**run.model_options, "transformer_options": changed}
                    sigmas = state.new_full((len(state),), sigma)
                    return calc_cond_batch(model, [run.guider.conds[prompt]], state, sigmas, model_options)[0]

            state, after = (self.trajectory.states[at].to(x) for at in (i, i + 1))
            of_source = estimate("source", state, keep)
            positive, negative = estimate("positive", x, take), estimate("negative", x, take)
            denoised = negative + CFG * (positive - negative)
            x = x + (below - sigma) * (x - denoised) / sigma
            if self.residual:
                x = x + after - state - (below - sigma) * (state - of_source) / sigma
        return x


def pair(
    parts: Parts, flow: Flow, trajectory: Trajectory, layers: list[int], taken: tuple[int, ...], **kinds
) -> Tensor:
    guider = comfy.samplers.CFGGuider(parts.model)
    guider.inner_set_conds({"positive": parts.target, "negative": parts.negative, "source": parts.source})
    loop = PairLoop(flow, trajectory, layers, taken, **kinds)
    return guider.sample(torch.zeros_like(parts.image), parts.image, loop, parts.sigmas, disable_pbar=True, seed=0)


def setting(flow: Flow) -> tuple[Parts, Trajectory]:
    """In Lumina 2 positions depend on the length of a prompt, which is one here."""
    parts = Parts(flow)
    if flow.name == "Lumina2":
        parts.target, parts.negative = flow.prompt(2, 4), flow.prompt(3, 4)
    return parts, invert(parts.model, Guidance(parts.source), parts.image, parts.sigmas)


@every_flow
def test_masactrl_equals_a_pair_of_rows(flow: Flow) -> None:
    parts, trajectory = setting(flow)
    (edited,) = execute(MasaCtrlNode, model=parts.model, trajectory=trajectory, start=0.0, first_layer=1)
    ours = resample(edited, trajectory, Guidance(parts.target, parts.negative, CFG))
    layers = list(range(len(blocks_of(parts.model.model.diffusion_model, flow))))
    theirs = pair(parts, flow, trajectory, layers[1:], KV)
    assert close(ours, theirs, 1e-4)
    assert not close(ours, resample(parts.model, trajectory, Guidance(parts.target, parts.negative, CFG)), 1e-3)


@every_flow
def test_plug_and_play_equals_a_pair_of_rows(flow: Flow) -> None:
    parts, trajectory = setting(flow)
    (edited,) = execute(PnPFeatureInjector, model=parts.model, trajectory=trajectory, tau_a=1.0)
    ours = resample(edited, trajectory, Guidance(parts.target, parts.negative, CFG))
    layers = list(range(len(blocks_of(parts.model.model.diffusion_model, flow))))
    assert close(ours, pair(parts, flow, trajectory, layers, QK), 1e-4)


@pytest.mark.parametrize("name", ["Flux", "SD3.5 medium", "Lumina2", "Wan", "HiDream"])
@pytest.mark.parametrize(("reads", "taken"), [("values", (2,)), ("keys, values", KV)])
def test_other_reads_equal_a_pair_of_rows(name: str, reads: str, taken: tuple[int, ...]) -> None:
    flow = FLOWS[name]
    parts, trajectory = setting(flow)
    names = [f"{block} {number}" for block, number in dit_blocks(parts.model.model.diffusion_model)]
    inputs = {"tau_a": 1.0, "attention_blocks": ", ".join(names[1:]), "reads": reads}
    (edited,) = execute(PnPFeatureInjector, model=parts.model, trajectory=trajectory, **inputs)
    ours = resample(edited, trajectory, Guidance(parts.target, parts.negative, CFG))
    assert close(ours, pair(parts, flow, trajectory, list(range(1, len(names))), taken), 1e-4)


@every_flow
def test_a_rule_that_never_applies_changes_no_bit(flow: Flow) -> None:
    parts, trajectory = setting(flow)
    (edited,) = execute(PnPFeatureInjector, model=parts.model, trajectory=trajectory, tau_a=0.0, tau_f=0.0)
    guidance = Guidance(parts.target, parts.negative, CFG)
    before = resample(parts.model, trajectory, guidance)
    assert torch.equal(resample(edited, trajectory, guidance), before)
    (edited,) = execute(MasaCtrlNode, model=parts.model, trajectory=trajectory)
    first = resample(edited, trajectory, guidance)
    assert torch.equal(resample(edited, trajectory, guidance), first)
    assert torch.equal(resample(parts.model, trajectory, guidance), before)
    assert not any(module._forward_pre_hooks for module in parts.model.model.diffusion_model.modules())


@every_flow
def test_what_the_edit_costs(flow: Flow) -> None:
    """The source is one row, of the steps that read from it alone."""
    parts, trajectory = setting(flow)

    def rows(**widgets) -> int:
        (edited,) = execute(PnPFeatureInjector, model=parts.model, trajectory=trajectory, **widgets)
        edited, cost = metered(edited)
        resample(edited, trajectory, Guidance(parts.target, parts.negative, CFG))
        return sum(cost.rows)

    assert rows(tau_a=1.0) == 3 * STEPS
    assert rows(tau_a=0.4) == 2 * STEPS + 2
    assert rows(tau_a=0.0, tau_f=1.0) == 2 * STEPS


@pytest.mark.parametrize("name", ["Flux", "SD3.5 medium", "Wan", "HiDream"])
def test_union_attends_to_both_images(name: str) -> None:
    """softmax over the keys of the text, the source's image and its own."""
    flow = FLOWS[name]
    parts, trajectory = setting(flow)
    (edited,) = execute(MasaCtrlNode, model=parts.model, trajectory=trajectory, start=0.0, first_layer=1, union=True)
    ours = resample(edited, trajectory, Guidance(parts.target, parts.negative, CFG))
    layers = list(range(len(blocks_of(parts.model.model.diffusion_model, flow))))[1:]
    assert close(ours, pair(parts, flow, trajectory, layers, KV, union=True), 1e-4)
    assert not close(ours, pair(parts, flow, trajectory, layers, KV), 1e-3)


def drawn_mask(flow: Flow) -> tuple[Tensor, Tensor]:
    """A mask four times as large as the latent, and the tokens [n] that it covers: the first row but its last one."""
    height, width = flow.latent[-2:]
    side = 1 if flow.name == "Flux.2" else 2
    tokens = torch.zeros(height // side, width // side, dtype=torch.bool)
    tokens[0, :-1] = True
    mask = tokens.float().repeat_interleave(4 * side, 0).repeat_interleave(4 * side, 1)
    return mask[None], tokens.flatten().repeat(flow.latent[2] if len(flow.latent) == 5 else 1)


@every_flow
def test_a_mask_of_what_stays_the_targets_own(flow: Flow) -> None:
    """KV-Edit: keys and values outside it are the source's; in a video in every frame. All or none of it is known."""
    parts, trajectory = setting(flow)
    guidance = Guidance(parts.target, parts.negative, CFG)
    mask, own = drawn_mask(flow)

    def edited(**inputs) -> Tensor:
        (model,) = execute(MasaCtrlNode, model=parts.model, trajectory=trajectory, start=0.0, first_layer=1, **inputs)
        return resample(model, trajectory, guidance)

    layers = list(range(len(blocks_of(parts.model.model.diffusion_model, flow))))[1:]
    ours, everything = edited(mask=mask), edited()
    assert close(ours, pair(parts, flow, trajectory, layers, KV, own=own), 1e-4)
    assert not close(ours, everything, 1e-3)
    assert torch.equal(edited(mask=torch.zeros_like(mask)), everything)
    assert torch.equal(edited(mask=torch.ones_like(mask)), resample(parts.model, trajectory, guidance))


# In the others some attention of the image is none of the main blocks' first: refiners, and SD3.5 medium's second one.
@pytest.mark.parametrize("name", ["Flux", "Flux.2", "Chroma", "SD3", "Qwen-Image", "Wan", "HiDream"])
def test_kv_edit_sees_nothing_of_the_target_outside_its_mask(name: str) -> None:
    """Read in all layers and steps, what is inside is the same whether or not the rest is put back: as in the paper,
    where only what is inside is run. Outside stands exactly the image.
    """
    flow = FLOWS[name]
    parts, trajectory = setting(flow)
    guidance, inputs = Guidance(parts.target, parts.negative, CFG), {"trajectory": trajectory, "start": 0.0}
    mask, _ = drawn_mask(flow)
    (alone,) = execute(MasaCtrlNode, model=parts.model, **inputs, first_layer=0, mask=mask)
    (both,) = execute(LocalBlendNode, model=alone, **inputs, mask=mask)
    free, kept = resample(alone, trajectory, guidance), resample(both, trajectory, guidance)
    size = flow.latent[-2:]
    inside = torch.nn.functional.interpolate(mask[None], size, mode="area")[0, 0].bool().expand(free.shape)
    source = parts.model.model.process_latent_out(trajectory.states[-1])
    assert torch.equal(kept[~inside], source[~inside])
    assert close(kept[inside], free[inside], 1e-4)
    assert not close(free[~inside], source[~inside], 0.05)
    assert not close(kept[inside], source[inside], 0.05)


@pytest.mark.parametrize("name", ["Flux", "Wan"])
def test_kv_edit_without_inversion(name: str) -> None:
    """Beside Flow Edit and with the mask as the latent's own, the image outside it is kept to the last bit."""
    flow = FLOWS[name]
    parts = Parts(flow)
    mask, _ = drawn_mask(flow)
    noise_mask = torch.nn.functional.interpolate(mask[None], flow.latent[-2:], mode="area")
    model, trajectory = invert_virtually(
        parts.model, parts.source, parts.image, parts.sigmas, fresh=True, mask=noise_mask
    )
    (edited,) = execute(MasaCtrlNode, model=model, trajectory=trajectory, start=0.0, first_layer=0, mask=mask)
    guidance = Guidance(parts.target, parts.negative, CFG)
    result = resample(edited, trajectory, guidance)
    inside = noise_mask[0, 0].bool().expand(result.shape)
    assert torch.equal(result[~inside], parts.image[~inside])
    assert not close(result[inside], resample(model, trajectory, guidance)[inside], 1e-3)
    assert not close(result[inside], parts.image[inside], 0.05)


def test_keys_of_a_prompt_of_another_length_are_turned() -> None:
    """Lumina 2's image stands behind its prompt: in the first block nothing but that tells two prompts' keys apart."""
    flow = FLOWS["Lumina2"]
    parts = Parts(flow)
    network = parts.model.model.diffusion_model
    seen: list[Tensor] = []

    def keep(block: int, tensors: list[Tensor]) -> None:
        if block == 0:
            seen.append(image_of(flow, tensors[1]).transpose(1, 2))

    with attention(network, flow, {}, keep) as options:
        for tokens in (4, 9):
            context, kept = flow.prompt(1, tokens)[0]
            network(
                parts.image, torch.tensor([0.5]), context, tokens, kept["attention_mask"], transformer_options=options
            )
    assert not close(*seen, 0.1)
    assert close(turned(network, seen[0], 5), seen[1], 1e-5)


def test_prompts_of_other_lengths_where_that_moves_the_image() -> None:
    """The target's edit is the same in a call of its own and where a long negative stands beside it."""
    flow = FLOWS["Lumina2"]
    parts = Parts(flow)
    trajectory = invert(parts.model, Guidance(parts.source), parts.image, parts.sigmas)
    (edited,) = execute(PnPFeatureInjector, model=parts.model, trajectory=trajectory, tau_a=1.0)
    one, other = (
        resample(edited, trajectory, Guidance(parts.target, flow.prompt(3, tokens), 1.0)) for tokens in (5, 9)
    )
    assert close(one, other, 1e-5)
    plain = resample(parts.model, trajectory, Guidance(parts.target))
    assert not close(one, plain, 1e-3)


@pytest.mark.parametrize("name", ["Flux", "SD3", "Qwen-Image"])
def test_beside_flow_edit_on_one_row(name: str) -> None:
    """A target that reads the source's keys, its values and its prediction runs beside one row of it."""
    flow = FLOWS[name]
    parts, trajectory = setting(flow)
    edited = edit_trajectory(parts.model, trajectory)
    (both,) = execute(MasaCtrlNode, model=edited, trajectory=trajectory, start=0.0, first_layer=1)
    both, cost = metered(both)
    guidance = Guidance(parts.target, parts.negative, CFG)
    result = resample(both, trajectory, guidance)
    assert sum(cost.rows) == 3 * STEPS
    layers = list(range(len(blocks_of(parts.model.model.diffusion_model, flow))))[1:]
    assert close(result, pair(parts, flow, trajectory, layers, KV, residual=True), 2e-4)
    assert not close(result, pair(parts, flow, trajectory, layers, KV), 1e-3)


def test_another_packs_attention_is_called_beneath() -> None:
    flow = FLOWS["Flux"]
    parts, trajectory = setting(flow)
    calls = []

    def foreign(func: Callable, *args, **kwargs) -> Tensor:
        calls.append(args[0].shape)
        return func(*args, **kwargs)

    guidance = Guidance(parts.target, parts.negative, CFG)
    (plain,) = execute(MasaCtrlNode, model=parts.model, trajectory=trajectory)
    other = parts.model.clone()
    other.model_options["transformer_options"]["optimized_attention_override"] = foreign
    (edited,) = execute(MasaCtrlNode, model=other, trajectory=trajectory)
    assert torch.equal(resample(edited, trajectory, guidance), resample(plain, trajectory, guidance))
    assert calls


@every_flow
def test_local_blend_by_a_mask(flow: Flow) -> None:
    """Outside it every state is the source's, and so is the result."""
    parts, trajectory = setting(flow)
    mask = torch.zeros(1, *flow.latent[-2:])
    mask[..., : flow.latent[-1] // 2] = 1
    (edited,) = execute(LocalBlendNode, model=parts.model, trajectory=trajectory, mask=mask, start=0.0)
    result = resample(edited, trajectory, Guidance(parts.target, parts.negative, CFG))
    half = flow.latent[-1] // 2
    assert close(result[..., half:], parts.image[..., half:], 1e-6)
    assert not close(result[..., :half], parts.image[..., :half], 0.05)


def test_blocks_and_their_names() -> None:
    network = FLOWS["Flux"].make().model.diffusion_model
    blocks = dit_blocks(network)
    assert blocks == [("double", 0), ("double", 1), ("single", 0), ("single", 1), ("single", 2)]
    assert parse_blocks("double 1, single 0-1, 2", blocks, "x") == (*blocks[1:4], ("single", 2))
    assert layers_in(network, "single 1", "x") == {(("single", 1), 0)}
    assert last_layers(network, -1) == {(block, 0) for block in blocks[3:]}
    assert len(attention_layers(network)) == 5
    with pytest.raises(ValueError, match="x has 'output 3', but the blocks to choose from are double 0-1; single 0-2"):
        parse_blocks("output 3", blocks, "x")
    with pytest.raises(ValueError, match=r"x is vital, which is known of Flux.1's blocks alone"):
        layers_in(network, "vital", "x")
    for double, single, known in ((19, 38, True), (8, 48, False)):  # Flux.1 and Flux.2
        network.double_blocks = nn.ModuleList([network.double_blocks[0]] * double)
        network.single_blocks = nn.ModuleList([network.single_blocks[0]] * single)
        if known:
            assert {layer for layer, _ in layers_in(network, "vital", "x")} == set(VITAL_BLOCKS)
            continue
        with pytest.raises(ValueError, match="x is vital, .* this MODEL has double 0-7; single 0-47"):
            layers_in(network, "vital", "x")


def test_refusals() -> None:
    flow = FLOWS["Flux"]
    parts, trajectory = setting(flow)
    inputs = {"model": parts.model, "trajectory": trajectory}
    mask = torch.ones(1, 8, 8)
    for name, kind in (("Wan", "WanModel"), ("HiDream", "HiDreamImageTransformer2DModel")):
        model = FLOWS[name].make()
        with pytest.raises(
            ValueError, match=rf"P2P Attention Controller cannot tell words in .* MODEL \({kind}\): use"
        ):
            execute(P2PAttentionController, model=model, trajectory=trajectory, prompt_edit=None)
    with pytest.raises(ValueError, match=r"\(Flux\) is no UNet, and MasaCtrl's source_mask .* alone: connect the mask"):
        execute(MasaCtrlNode, **inputs, source_mask=mask, target_mask=mask)
    with pytest.raises(ValueError, match="MasaCtrl's mask says by itself where .* own: switch union off"):
        execute(MasaCtrlNode, **inputs, mask=mask, union=True)
    (several,) = execute(MasaCtrlNode, **inputs, mask=mask.repeat(3, 1, 1))
    with pytest.raises(ValueError, match="MasaCtrl has 3 masks for 1 images: connect one mask, or one for each image"):
        resample(several, trajectory, Guidance(parts.target))
    with pytest.raises(ValueError, match="is no UNet, but feature_blocks of PnP Feature Injector reads"):
        execute(PnPFeatureInjector, **inputs, feature_blocks="output 4")
    with pytest.raises(ValueError, match="is no UNet, but Cross Attention Guidance reads"):
        execute(CrossAttentionGuidanceNode, **inputs)
    with pytest.raises(ValueError, match="Local Blend cannot tell words"):
        attach_blend(FLOWS["Wan"].make(), trajectory, blend())


def test_unknown_classes_are_named() -> None:
    """Also kinds of known ones: what they do inside is their own."""
    flow = FLOWS["Flux"]
    parts, trajectory = setting(flow)
    network = parts.model.model.diffusion_model
    network.__class__ = type("Replaced", (type(network),), {})
    with pytest.raises(ValueError, match=r"This MODEL \(Replaced\) .* \(Chroma, Flux, .*: use Flow Edit"):
        execute(MasaCtrlNode, model=parts.model, trajectory=trajectory)
    assert torch.isfinite(parts.sample(edit_trajectory(parts.model, trajectory))).all()
