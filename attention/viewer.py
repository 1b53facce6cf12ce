"""Pictures of what a diffusion model sees: leading components of features and of self-attention, as in the figures of
Plug-and-Play (arXiv 2211.12572, figures 3 and 6). Pure torch.
"""

from __future__ import annotations

import torch
from torch import Tensor


def components(features: Tensor, count: int = 3) -> Tensor:
    """[n, positions, count] in 0..1: the leading principal components of features [n, positions, channels].

    All n share one basis, so that their colours can be compared. A component points to where most of it lies, and is
    scaled from its least to its greatest value. The basis is found by randomised SVD (arXiv 0909.4061), for
    self-attention has as many channels as positions.
    """
    flat = features.flatten(0, 1).float()
    flat = flat - flat.mean(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        _, _, basis = torch.pca_lowrank(flat, min(16, *flat.shape), center=False, niter=8)
    found = (flat @ basis[:, :count]).unflatten(0, features.shape[:2])
    skew = (found**3).sum((0, 1))
    found = torch.where(skew < 0, -found, found)
    low, high = found.amin((0, 1)), found.amax((0, 1))
    return (found - low) / (high - low).clamp_min(1e-12)


def self_attention(query: Tensor, key: Tensor, heads: int) -> Tensor:
    """[b, positions, positions] fp32: softmax(query key^T / sqrt(d)) of projections [b, positions, heads * d], its mean
    over heads; one head at a time, for a map of 64 x 64 positions takes 64 MB.
    """
    queries, keys = (t.float().unflatten(-1, (heads, -1)).unbind(2) for t in (query, key))
    maps = 0
    for one, other in zip(queries, keys, strict=True):
        maps = maps + torch.softmax(one @ other.transpose(1, 2) * one.shape[-1] ** -0.5, -1)
    return maps / heads
