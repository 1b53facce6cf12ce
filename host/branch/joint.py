"""A flow transformer's joint attention as an edit sees it: self-attention of the image, and cross-attention to words.

Both lie under one softmax. What a rule reads in the words' place is an attention to words alone, of which each position
takes as much as it would have attended to words: the share of its own queries and keys. Pure torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..dit.attention import Attend, Joint, Parts
from ..layer import Inputs


def image_attention(
    joint: Joint, attend: Attend, query: Tensor, keys: Parts, values: Parts, terms: Sequence[Inputs]
) -> Tensor:
    """[rows, positions, heads * d]: the attention of the image's queries [rows, positions, ...].

    terms: what is attended to in the words' place, whose sum that is. A term by the same queries and keys is part of
    the one attention; any other has a call of its own.
    """
    key = joint.joined(*keys)
    within = [term.value for term in terms if term.query is query and term.key is keys.words]
    apart = [term for term in terms if term.query is not query or term.key is not keys.words]
    shape = *keys.words.shape[:2], *values.words.shape[2:]  # keys may have another than values
    own = values._replace(words=sum(within, values.words.new_zeros(shape)))
    result = attend(joint.joined(query), key, joint.joined(*own))
    if apart:
        share = Parts(*map(torch.zeros_like, values))._replace(words=values.words.new_ones(shape))
        share = attend(joint.joined(query), key, joint.joined(*share))
        result = result + share * sum(attend(*map(joint.joined, term)) for term in apart)
    return result


def joint_maps(joint: Joint, values: Parts, columns: Tensor, attention: Callable[[Parts], Tensor]) -> Tensor:
    """[b, positions, m] fp32: how much each position attends to chosen words, the mean over heads.

    columns: [b, tokens, m], 1 at the tokens of each phrase. values: those of the prompt that they belong to.
    attention: what `image_attention` makes of values; a map of chosen words is what it makes of values that are 1 at
    these and 0 elsewhere. One row of it serves all b.
    """
    images, rows = len(columns), len(values.words)
    if rows == 1:
        columns = columns.movedim(0, 1).flatten(1)[None]  # [1, tokens, b * m]
    nothing = Parts(*map(torch.zeros_like, values))
    channels = values.image.flatten(2).shape[2] // joint.heads
    maps = []
    for some in columns.to(values.words).split(channels, 2):
        words = pad(some, (0, channels - some.shape[2]))[:, :, None].expand(-1, -1, joint.heads, -1)
        seen = attention(nothing._replace(words=words.flatten(2).unflatten(-1, values.words.shape[2:])))
        maps.append(seen.unflatten(-1, (joint.heads, -1)).mean(2)[..., : some.shape[2]].float())
    found = torch.cat(maps, 2)
    return found.unflatten(2, (images, -1))[0].movedim(1, 0) if rows == 1 else found
