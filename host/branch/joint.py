"""A flow transformer's joint attention as an edit sees it: self-attention of the image, and cross-attention to words.

Both lie under one softmax. What a rule reads in the words' place is an attention to words alone, of which each position
takes as much as it would have attended to words: the share of its own queries and keys.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..dit.attention import Attend, Joint, Parts
from ..layer import Inputs, Read
from ..run.refusals import UNION, WORDS, check_prompt_in_place, check_unmasked

ReadWords = Callable[[Inputs, Inputs], Sequence[Read]]
"""Takes the image's queries and the words' keys and values of source and target; returns a rule's terms."""


@dataclass(frozen=True)
class JointRows:
    """The rows of one attention, in equal chunks, and what goes on with them."""

    joint: Joint
    attend: Attend
    tensors: tuple[Tensor, Tensor, Tensor]
    chunks: int

    def chunk(self, at: int) -> list[Tensor]:
        return [tensor.chunk(self.chunks)[at] for tensor in self.tensors]

    def image(self, at: int) -> Inputs:
        """What the image's tokens of a chunk have."""
        return Inputs(*map(self.joint.image, self.chunk(at)))

    def parts(self, at: int, tokens: int, padded: int) -> list[Parts]:
        """The keys and the values of a chunk, its prompt of so many tokens apart, which may be `padded` to so many."""
        start = self.joint.where.start
        check_unmasked(self.joint.masked, WORDS)
        check_prompt_in_place(start, tokens, padded)
        return [self.joint.parts(tensor, min(tokens, start)) for tensor in self.chunk(at)[1:]]

    def attended(self, images: Sequence[Inputs], changed: dict[int, Inputs]) -> Tensor:
        """The attention of all rows, where the image's tokens of some chunks have others than their `images`, or more.

        Tensors are copied where they change.
        """
        tensors = list(self.tensors)
        longer: dict[int, Inputs] = {}
        for at, image in changed.items():
            if image.key.shape[1] != images[at].key.shape[1]:
                check_unmasked(self.joint.masked, UNION)
                longer[at] = image
                continue
            for i, (new, old) in enumerate(zip(image, images[at], strict=True)):
                if new is not old:
                    if tensors[i] is self.tensors[i]:
                        tensors[i] = self.tensors[i].clone()
                    self.joint.image(tensors[i].chunk(self.chunks)[at]).copy_(new)
        result = self.attend(*tensors)
        for at, image in longer.items():
            whole = self.attend(*map(self.joint.with_image, self.chunk(at), image))
            result.chunk(self.chunks)[at].copy_(whole)
        return result


def image_attention(
    joint: Joint, attend: Attend, query: Tensor, keys: Parts, values: Parts, terms: Sequence[Inputs] | None = None
) -> Tensor:
    """[rows, positions, heads * d]: the attention of the image's queries [rows, positions, ...].

    terms: what is attended to in the words' place, whose sum that is. A term by the same queries and keys is part of
    the one attention; any other has a call of its own.
    """
    query_, key = joint.joined(query), joint.joined(*keys)
    if terms is None:
        return attend(query_, key, joint.joined(*values))
    within = [term.value for term in terms if term.query is query and term.key is keys.words]
    apart = [term for term in terms if term.query is not query or term.key is not keys.words]
    shape = *keys.words.shape[:2], *values.words.shape[2:]  # keys may be shaped otherwise
    result = attend(query_, key, joint.joined(*values._replace(words=sum(within, values.words.new_zeros(shape)))))
    if apart:
        share = Parts(*map(torch.zeros_like, values))._replace(words=values.words.new_ones(shape))
        share = attend(query_, key, joint.joined(*share))
        result = result + share * sum(attend(*map(joint.joined, term)) for term in apart)
    return result


def edited_attention(
    joint: Joint, attend: Attend, query: Tensor, keys: Parts, values: Parts, source: Inputs, read: ReadWords
) -> Tensor:
    """`image_attention` where a rule reads words of the source.

    Where the image's queries are the source's, its map is, and so is the share of words in it; but an image of whose
    words nothing is carried over any more keeps the share of its own.
    """
    reads = read(source, Inputs(query, keys.words, values.words))
    terms = [term.inputs for term in reads]
    if query is not source.query:
        return image_attention(joint, attend, query, keys, values, terms)
    result = image_attention(joint, attend, query, keys._replace(words=source.key), values, terms)
    if all(reads[0].carries):
        return result
    alone = image_attention(joint, attend, query, keys, values, terms)
    return torch.stack(
        [one if carries else other for carries, one, other in zip(reads[0].carries, result, alone, strict=True)]
    )


def joint_maps(joint: Joint, values: Parts, columns: Tensor, attention: Callable[[Parts], Tensor]) -> Tensor:
    """[b, positions, m] fp32: how much each position attends to chosen words, the mean over heads.

    columns: [b, tokens, m], 1 at the tokens of each phrase. values: those of the prompt that they belong to.
    attention: what is made of values; a map of chosen words is what it makes of values that are 1 at these and 0
    elsewhere. One row of it serves all b.
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
