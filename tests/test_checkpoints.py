"""True SD1.5 and SDXL architectures through the host's stock checkpoint loader."""

from __future__ import annotations

from pathlib import Path

import comfy.cli_args
import comfy.model_management
import folder_paths
import nodes
import pytest
import torch

from checkpoints import write_checkpoint
from palimpsest.benchmarks.picture import sample
from palimpsest.inversion.run import Guidance
from palimpsest.nodes.inversion import LEADING, DDIMInversion
from palimpsest.nodes.p2p import P2PAttentionController
from palimpsest.nodes.prompt import PromptEdit
from tiny import execute, rows_of


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_edit_through_the_stock_loader(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps of a 128 pixel image: finite, three rows a step, and the edit differs from plain sampling."""
    write_checkpoint(kind, tmp_path / "random.ckpt")
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "checkpoints", ([str(tmp_path)], {".ckpt"}))
    if kind == "sdxl":  # in fp32, as the host loads it on a CPU, it would take 14 GB
        monkeypatch.setattr(comfy.cli_args.args, "fp8_e4m3fn_unet", True)
    model, clip, vae = nodes.CheckpointLoaderSimple().load_checkpoint("random.ckpt")
    source, target, prompt_edit, _ = PromptEdit.execute(clip, "a photo of a cat", "a photo of a squirrel").result
    negative = clip.encode_from_tokens_scheduled(clip.tokenize(""))
    assert source[0][0].shape[-1] == {"sd15": 768, "sdxl": 2048}[kind]
    image = {"samples": vae.encode(torch.rand(1, 128, 128, 3))}
    trajectory, noise, sigmas = DDIMInversion.execute(model, source, image, 2, 1.0, LEADING).result
    parts = {"model": model, "trajectory": trajectory, "prompt_edit": prompt_edit}
    (edited,) = execute(P2PAttentionController, **parts, cross_replace=1.0, self_replace=1.0)
    counted, rows = rows_of(edited)
    guidance = Guidance(target, negative, 5.0)
    result = sample(counted, guidance, noise["samples"], sigmas)
    assert rows == [3, 3]
    assert torch.isfinite(result).all()
    assert not torch.allclose(result, sample(model, guidance, noise["samples"], sigmas), rtol=1e-3, atol=1e-3)
    assert vae.decode(result).shape == (1, 128, 128, 3)
    del model, clip, vae, edited, counted
    comfy.model_management.unload_all_models()
    comfy.model_management.cleanup_models()
