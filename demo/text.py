"""The demo text encoder for training, and for the demo CLIP."""

from __future__ import annotations

import math

import comfy.ops
import torch
from comfy.clip_model import CLIPTextModel
from comfy.sd1_clip import SDTokenizer
from torch import Tensor, nn

from . import scenes
from .model import TEXT


def attention(_: object, q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None, **__) -> Tensor:
    """Attention written out: in training it is several times as fast on a processor as the host's fused one."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    scores = (q * q.shape[-1] ** -0.5) @ k.mT
    if mask is not None:
        scores = scores + mask
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


class TextEncoder(nn.Module):
    """The host's CLIP text model with only the token rows that scene captions use.

    Its forward pass is the host's written without in-place additions, which autograd refuses.
    """

    def __init__(self) -> None:
        super().__init__()
        tokenizer = SDTokenizer(embedding_size=TEXT["hidden_size"])
        self.tokenizer = tokenizer.tokenizer
        self.padding = tokenizer.pad_token
        self.ids = sorted({token for word in scenes.WORDS for token in self.tokenizer(word)["input_ids"]})
        self.row = {token: row for row, token in enumerate(self.ids)}
        self.tokens = nn.Parameter(torch.randn(len(self.ids), TEXT["hidden_size"]) * 0.3)
        self.model = CLIPTextModel(TEXT, torch.float32, "cpu", comfy.ops.disable_weight_init).text_model
        self.model.embeddings.token_embedding = None
        for name, parameter in self.model.named_parameters():
            if "layer_norm" in name:
                nn.init.constant_(parameter, 1.0 if name.endswith("weight") else 0.0)
            elif parameter.ndim == 1:
                nn.init.zeros_(parameter)
            elif "embedding" in name:
                nn.init.normal_(parameter, std=0.1)
            else:
                nn.init.xavier_uniform_(parameter)

    def rows(self, captions: list[str]) -> Tensor:
        """The captions' token rows, [n, 77] uint8."""
        length, rows = TEXT["max_position_embeddings"], []
        for caption in captions:
            tokens = self.tokenizer(caption)["input_ids"]
            rows.append([self.row[token] for token in tokens + [self.padding] * (length - len(tokens))])
        return torch.tensor(rows, dtype=torch.uint8)

    def forward(self, rows: Tensor) -> Tensor:
        x = self.tokens[rows.long()] + self.model.embeddings.position_embedding.weight[: rows.shape[1]]
        mask = torch.full((x.shape[1], x.shape[1]), -math.inf).triu(1)
        for layer in self.model.encoder.layers:
            x = x + layer.self_attn(layer.layer_norm1(x), mask, lambda *args, **kw: attention(None, *args, **kw))
            x = x + layer.mlp(layer.layer_norm2(x))
        return self.model.final_layer_norm(x)
