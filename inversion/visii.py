"""Visii (arXiv 2307.14331): an instruction for an InstructPix2Pix, learned from a picture before and after an edit.

Adam fits a prompt's embedding c, nothing else, to min E_(t, eps) ||eps - e(z_t, t, c_I, c)||^2, where z_t is the latent
of the picture after the edit under the noise eps and c_I that of the picture before. Only the rows of the instruction's
tokens change: not the first one, the start of the text, nor those from its end on. Several pairs have one c, which is
fitted to the mean of their losses.

A CLIP adds a second loss: minus the cosine between the way that it sees the picture go, E(after) - E(before), the mean
of all pairs, and the instruction, which is the mean of c's rows in the CLIP's projection. The losses count 4 to 0.1.

As in the public code every update has another of the model's timesteps, evenly spaced and shuffled, the cosine counts
up to 0.5 only, and the instruction of the lowest first loss is kept. There that is the loss of one update, which tells
little but its timestep; here it is looked for at timesteps and noises of its own, always the same. The public code fits
the guided prediction, of three times the price; the paper's formula, and this, has that of the instruction alone.

The host's sampler space is x = z sqrt(1 + sigma^2), where eps - e is (D - image) / sigma of the denoised estimate D.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor
from torch.nn.functional import cosine_similarity

from ..host.branch.call import POSITIVE, estimate
from ..host.branch.instructed import KEY
from ..host.files.unfinished import Unfinished
from ..host.run.model import prompt_width
from ..host.run.refusals import (
    check_attention,
    check_every_call,
    check_instructed,
    check_latent,
    check_one_gpu,
    check_plain,
    check_unet,
    check_unguided,
    check_width,
)
from ..host.run.sampler import OwnSampler, Run
from ..host.unet.gradients import differentiable, gradients, refusing
from .null_text import with_embedding
from .run import Guidance, asked_twice, check_unedited, sample

NODE = "Learn Edit from Pair"
EVERY = 20  # updates between two looks at the loss
LOOKS = 8  # timesteps of such a look
DIRECTED = 0.1 / 4  # what the cosine counts beside the mean square
ENOUGH = 0.5  # of the cosine


class Settings(NamedTuple):
    """tokens: how many of the embedding's rows, behind the first, are the instruction."""

    updates: int = 60
    learning_rate: float = 0.003
    tokens: int = 8
    seed: int = 0


class Direction(NamedTuple):
    """What a CLIP sees change, [n], and its projection [n, channels] of prompts to where pictures are."""

    change: Tensor
    projection: Tensor

    def agreement(self, embedding: Tensor) -> Tensor:
        """The cosine between the change and an embedding [1, tokens, channels], ENOUGH at most."""
        change, projection = (tensor.to(embedding) for tensor in self)
        return cosine_similarity(embedding.mean(1) @ projection.T, change[None]).squeeze(0).clamp_max(ENOUGH)


class Learned(NamedTuple):
    """embedding: [1, tokens, channels]. losses: by the number of updates before each look, its own among them."""

    embedding: Tensor
    losses: dict[int, float]

    @property
    def at(self) -> int:
        """The updates that led to it."""
        return min(self.losses, key=self.losses.__getitem__)


class LearningSampler(OwnSampler):
    """Fits the embedding to the latents that it is given. Made anew for each run."""

    def __init__(self, start: Tensor, settings: Settings, direction: Direction | None = None) -> None:
        self.start, self.settings, self.direction = start, settings, direction
        self.best = start
        self.losses: dict[int, float] = {}

    def walk(self, run: Run) -> Tensor:
        unfinished = self._unfinished(run)
        with gradients(), refusing(NODE):
            embedding = self.start.to(run.latent, copy=True).requires_grad_()
            adam = torch.optim.Adam([embedding], self.settings.learning_rate)
            done = self._resume(unfinished.load(), embedding, adam)
            try:
                while True:
                    if done not in self.losses and (done % EVERY == 0 or done == self.settings.updates):
                        self._look(run, embedding, done)
                    if done == self.settings.updates:
                        break
                    self._update(run, embedding, adam, done)
                    done += 1
            finally:  # an interrupt too keeps what is done
                if self.settings.updates in self.losses:
                    unfinished.remove()
                elif done:
                    unfinished.save(self._kept(embedding, adam))
        return run.latent

    def _update(self, run: Run, embedding: Tensor, adam: torch.optim.Adam, done: int) -> None:
        sigma, noise = self.drawn(run, done)
        loss, denoised, x = self._loss(run, embedding, sigma, noise)
        if not torch.isfinite(loss):
            raise ValueError(
                f"{NODE} came to NaN or infinite values at update {done + 1} of {self.settings.updates}, with "
                f"learning_rate {self.settings.learning_rate:g}: lower learning_rate."
            )
        if self.direction is not None:
            loss = loss - DIRECTED * self.direction.agreement(embedding)
        (gradient,) = torch.autograd.grad(loss, embedding)
        gradient[:, 0] = gradient[:, self.settings.tokens + 1 :] = 0
        embedding.grad = gradient
        adam.step()
        run.report(done, denoised.detach(), x, self.settings.updates)

    def _look(self, run: Run, embedding: Tensor, done: int) -> None:
        """The loss at every timestep of a look; the embedding is kept where none was lower before."""
        generator = torch.Generator().manual_seed(self.settings.seed)
        levels = _spread(run, LOOKS)
        with torch.no_grad():
            losses = [self._loss(run, embedding, sigma, _noise(run, generator))[0] for sigma in levels]
        loss = float(torch.stack(losses).mean())
        if loss < min(self.losses.values(), default=float("inf")):
            self.best = embedding.detach().to("cpu", torch.float32, copy=True)
        self.losses[done] = loss

    def drawn(self, run: Run, update: int) -> tuple[float, Tensor]:
        """Sigma and noise [b, c, h, w] of an update, the same whenever it is run."""
        settings = self.settings
        generator = torch.Generator().manual_seed(settings.seed)
        order = torch.randperm(settings.updates, generator=generator)
        seeds = torch.randint(1 << 62, (settings.updates,), generator=generator)
        noise = _noise(run, torch.Generator().manual_seed(int(seeds[update])))
        return _spread(run, settings.updates)[int(order[update])], noise

    def _loss(self, run: Run, embedding: Tensor, sigma: float, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The mean square of eps - e, and the denoised estimate at x."""
        image = run.latent.clone()
        x = image + sigma * noise
        cond = with_embedding(run.guider.conds["positive"][0], embedding)
        timestep = x.new_full((len(x),), sigma)
        denoised = estimate(run.guider.inner_model, POSITIVE, cond, x, timestep, run.model_options)
        return ((denoised - image) / sigma).square().mean(), denoised, x

    def _unfinished(self, run: Run) -> Unfinished:
        """Known by the inputs, and by what the model, with all that patches it and its prompt, first answers."""
        sigma = _spread(run, 1)[0]
        with torch.no_grad():
            answer = asked_twice(run.denoise, NODE)(run.latent + sigma * torch.ones_like(run.latent), sigma)
        return Unfinished("visii", self.settings, run.latent, self.start, answer, *(self.direction or ()))

    def _kept(self, embedding: Tensor, adam: torch.optim.Adam) -> dict[str, Tensor]:
        kept = {"embedding": embedding.detach(), "best": self.best, **adam.state[embedding]}
        kept["looks"], kept["losses"] = torch.tensor([*self.losses]), torch.tensor([*self.losses.values()]).double()
        return {name: tensor.cpu().clone() for name, tensor in kept.items()}

    def _resume(self, kept: dict[str, Tensor], embedding: Tensor, adam: torch.optim.Adam) -> int:
        """How many updates are done."""
        if not kept:
            return 0
        with torch.no_grad():
            embedding.copy_(kept.pop("embedding"))
        self.best = kept.pop("best")
        self.losses = dict(zip(kept.pop("looks").tolist(), kept.pop("losses").tolist(), strict=True))
        adam.load_state_dict({**adam.state_dict(), "state": {0: kept}})
        return int(kept["step"])


def _spread(run: Run, number: int) -> list[float]:
    """Sigmas of so many of the model's timesteps, each from the middle of an equal share of them."""
    table = run.guider.inner_model.model_sampling.sigmas
    return [float(table[int((i + 0.5) / number * len(table))]) for i in range(number)]


def _noise(run: Run, generator: torch.Generator) -> Tensor:
    return torch.randn(run.latent.shape, generator=generator).to(run.latent)


def check_pair(before: Tensor, after: Tensor) -> None:
    """Raises ValueError where images [b, h, w, c] before an edit and after it do not make pairs."""
    if len(before) != len(after):
        raise ValueError(
            f"{NODE} was given {len(before)} in before but {len(after)} in after: connect as many images to both."
        )
    if before.shape[1:3] != after.shape[1:3]:
        (height, width), (other, wide) = before.shape[1:3], after.shape[1:3]
        raise ValueError(
            f"{NODE} was given images of {width} x {height} in before but of {wide} x {other} in after: bring both to "
            "one size by Upscale Image."
        )


def check(model: ModelPatcher, after: Tensor, start: list, direction: Direction | None = None) -> None:
    """Raises ValueError for models, latents, prompts and CLIPs that an instruction cannot be learned with."""
    check_unedited(model, NODE)
    check_every_call(model, NODE)
    check_unguided(model)
    check_unet(model, NODE)
    check_instructed(model, NODE, KEY)
    check_one_gpu(model)
    check_attention(model, NODE)
    check_latent(model, after)
    name = f"The start of {NODE}"
    check_width(model, start, name)
    check_plain(start, name, torch.empty(prompt_width(model)))
    ((embedding, options),) = start
    if found := [key for key in ("control", "gligen") if options.get(key) is not None]:
        raise ValueError(f"{name} carries '{found[0]}': connect a plain prompt, straight from CLIP Text Encode.")
    if len(embedding) != 1:
        raise ValueError(
            f"{name} holds {len(embedding)} prompts, but one instruction is learned: connect a single one."
        )
    if direction is not None and direction.projection.shape[1] != embedding.shape[2]:
        raise ValueError(
            f"The clip of {NODE} has tokens of {direction.projection.shape[1]} channels, but this MODEL's prompts have "
            f"{embedding.shape[2]}: connect the CLIP that the MODEL was trained with, or neither clip nor clip_vision."
        )


def visii(
    model: ModelPatcher,
    before: Tensor,
    after: Tensor,
    start: list,
    settings: Settings,
    checkpointing: bool,
    direction: Direction | None = None,
) -> Learned:
    """The instruction that leads from latents `before` to those `after`, [b, c, h, w] as VAE Encode makes them.

    It begins at `start`'s, and follows `direction` too where there is one. Raises ValueError as `check`.
    """
    check(model, after, start, direction)
    ((embedding, options),) = start
    sampler = LearningSampler(embedding.to("cpu", torch.float32), settings, direction)
    working = differentiable(model, checkpointing)
    if working.model.get_dtype_inference() != torch.float32:
        working.set_model_compute_dtype(torch.float32)  # gradients of 1e-5 are lost in half precision
    shown = Guidance([[embedding, {**options, "concat_latent_image": before}]])
    model_sampling = model.get_model_object("model_sampling")
    sigmas = torch.tensor([float(model_sampling.sigma_max), 0.0])
    sample(working, shown, sampler, sigmas, torch.zeros_like(after), after, seed=0)
    return Learned(sampler.best, sampler.losses)
