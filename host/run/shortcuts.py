"""Other nodes' shortcuts past the UNet: caches, which leave calls of it out, and compilers, which replay them.

Both know nothing of what a call reads from the source. A cache may leave out the target's call, and then nothing of
that call is read; but never one that others read from. Code that was compiled for one call is run for all that follow,
on every MODEL of the checkpoint, whatever attention patches they carry.
"""

from __future__ import annotations

from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from comfy_api.torch_helpers.torch_compile import COMPILE_KEY

CACHE = "easycache"  # of EasyCache's wrapper around the UNet, and of its or LazyCache's settings


def cache_on(model: ModelPatcher) -> str | None:
    """The display name of the host's node that leaves out calls of this model, if any does."""
    settings = model.model_options["transformer_options"].get(CACHE)
    return None if settings is None else settings.name


def uncached(options: dict) -> dict:
    """Transformer options of a call that is not left out, and that the cache's decisions do not depend on."""
    return _without(options, WrappersMP.DIFFUSION_MODEL, CACHE)


def decided_once(options: dict) -> None:
    """Puts the cache's wrapper around all others, in the options of one run: it then leaves out either all the model
    calls that they make of one, or none.
    """
    wrappers = options["wrappers"].get(WrappersMP.CALC_COND_BATCH, {})
    if CACHE in wrappers:
        options["wrappers"][WrappersMP.CALC_COND_BATCH] = {CACHE: wrappers[CACHE], **wrappers}


def uncompiled(options: dict) -> dict:
    """Transformer options of a call that runs the UNet as it stands."""
    return _without(options, WrappersMP.APPLY_MODEL, COMPILE_KEY)


def unread(options: dict, key: str) -> dict:
    """Transformer options of a call inside which nothing is read, and which may run compiled.

    key: of the wrapper around the UNet by which edits read, of which the code for all calls is to hold nothing.
    """
    return _without(options, WrappersMP.DIFFUSION_MODEL, key)


def _without(options: dict, kind: str, key: str) -> dict:
    wrappers = options.get("wrappers", {})
    kept = {name: value for name, value in wrappers.get(kind, {}).items() if name != key}
    return {**options, "wrappers": {**wrappers, kind: kept}}
