"""How much of a batch fits into one model call."""

from __future__ import annotations

from comfy.model_base import BaseModel
from torch import Tensor

MARGIN = 1.5  # times what the host estimates, as where it decides which prompts share a call


def copies_at_once(model: BaseModel, x: Tensor, most: int) -> int:
    """How many copies of the rows of x [b, c, h, w], at most `most`, one call of one prompt has memory for."""
    free = model.current_patcher.get_free_memory(x.device)
    sizes = range(most, 1, -1)
    return next((n for n in sizes if model.memory_required([n * len(x), *x.shape[1:]]) * MARGIN < free), 1)
