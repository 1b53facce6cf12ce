"""Processes that share the work of every training step.

Two of one thread each do twice the work of one with two threads on cores that other programs use as well: threads wait
for each other at every layer, processes once a step.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable

import torch
from torch import Tensor

PATIENCE = 900  # seconds after which a process takes the others for dead


class Team:
    """Averages the gradients of as many losses as there are processes; `loss` draws its own part of the batch."""

    def __init__(
        self, parameters: list[Tensor], loss: Callable[[torch.Generator], Tensor], size: int, seed: int
    ) -> None:
        torch.set_num_threads(1)
        self.parameters, self.loss, self.size, self.seed = parameters, loss, size, seed
        for parameter in parameters:
            parameter.share_memory_()
        self.gradients = torch.zeros(size, sum(p.numel() for p in parameters)).share_memory_()
        self.losses = torch.zeros(size).share_memory_()
        processes = multiprocessing.get_context("fork")
        self.barrier = processes.Barrier(size, timeout=PATIENCE)
        for member in range(1, size):
            processes.Process(target=self._serve, args=(member,), daemon=True).start()
        self.generator = self._generator(0)

    def backward(self) -> float:
        """Fills the parameters' gradients and returns the mean loss."""
        self.barrier.wait()
        self._work(0, self.generator)
        self.barrier.wait()
        parts = self.gradients.mean(0).split([p.numel() for p in self.parameters])
        for parameter, part in zip(self.parameters, parts, strict=True):
            parameter.grad = part.view_as(parameter)
        return self.losses.mean().item()

    def _serve(self, member: int) -> None:
        generator = self._generator(member)
        while True:
            self.barrier.wait()
            self._work(member, generator)
            self.barrier.wait()

    def _work(self, member: int, generator: torch.Generator) -> None:
        loss = self.loss(generator)
        gradients = torch.autograd.grad(loss, self.parameters)
        self.losses[member] = loss.detach()
        torch.cat([g.flatten() for g in gradients], out=self.gradients[member])

    def _generator(self, member: int) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed * self.size + member)
