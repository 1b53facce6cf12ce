"""What runs of a MODEL cost."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from torch import Tensor

KEY = "palimpsest.cost"


@dataclass
class Cost:
    """rows: of each evaluation of the network, in order. began: when the count did, of `time.perf_counter`."""

    rows: list[int] = field(default_factory=list)
    began: float = field(default_factory=time.perf_counter)

    @property
    def told(self) -> str:
        seconds = time.perf_counter() - self.began
        return f"{len(self.rows):,} network evaluations, {sum(self.rows):,} rows, {seconds:.1f} s"


def metered(model: ModelPatcher, cost: Cost | None = None) -> tuple[ModelPatcher, Cost]:
    """A clone of `model`, and what all runs of it have cost so far, another model's `cost` among it where given.

    The wrapper is the innermost of its kind: it stands outside of what is compiled, and counts no call that another
    node leaves out.
    """
    cost = Cost() if cost is None else cost

    def count(executor, x: Tensor, *args, **kwargs):
        cost.rows.append(len(x))
        return executor(x, *args, **kwargs)

    model = model.clone()
    model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, KEY, count)
    return model, cost
