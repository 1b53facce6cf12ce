"""The pack's own socket types."""

from __future__ import annotations

from comfy_api.latest import io

Trajectory = io.Custom("TRAJECTORY")
PromptEdit = io.Custom("PROMPT_EDIT")
AttentionStore = io.Custom("ATTENTION_STORE")
EditDirection = io.Custom("EDIT_DIRECTION")
NoisedClip = io.Custom("NOISED_CLIP")
HDirection = io.Custom("H_DIRECTION")
