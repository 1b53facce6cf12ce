"""How well pictures fit words, and an edit the change of the words, by the embeddings of a CLIP. Pure torch.

CLIPScore: Hessel et al., arXiv 2104.08718, as PIE-Bench and torchmetrics scale it: 100 times the cosine, and no less
than 0. The direction is that of StyleGAN-NADA (Gal et al., arXiv 2108.00946), which InstructPix2Pix reports.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize


def clip_score(image: Tensor, text: Tensor) -> Tensor:
    """[b] in 0..100, of embeddings [b, c]."""
    return (100 * cosine_similarity(image.double(), text.double(), dim=-1)).clamp_min(0)


def clip_direction(source: Tensor, edited: Tensor, source_text: Tensor, target_text: Tensor) -> Tensor:
    """[b] in -1..1: the cosine between the way from one picture to the other and that from one prompt to the other."""
    image = normalize(edited.double(), dim=-1) - normalize(source.double(), dim=-1)
    text = normalize(target_text.double(), dim=-1) - normalize(source_text.double(), dim=-1)
    return cosine_similarity(image, text, dim=-1)
