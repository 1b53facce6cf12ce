"""A prompt's tokens as texts, read from the host's CLIP tokenizers."""

from __future__ import annotations

from comfy.sd import CLIP


def token_texts(clip: CLIP, tokens: dict, prompt: str) -> list[str]:
    """The texts of all tokens of `tokens`, a tokenized prompt; `prompt` names it in errors.

    SDXL's two tokenizers split a prompt alike, so the first speaks for both. Raises ValueError for text encoders that
    are not CLIP, for empty prompts and for those that do not fit one chunk.
    """
    name, chunks = next(iter(tokens.items()))
    tokenizer = getattr(clip.tokenizer, f"clip_{name}", None)
    if tokenizer is None:
        raise ValueError(
            "Prompt Edit needs a CLIP text encoder: connect the CLIP of an SD1.x, SD2.x or SDXL checkpoint."
        )
    room = tokenizer.max_length - 2
    if len(chunks) > 1:
        special = (tokenizer.start_token, tokenizer.end_token, tokenizer.pad_token)
        used = sum(1 for chunk in chunks for token, _ in chunk if token not in special)
        raise ValueError(f"The {prompt} prompt has {used} tokens, but {room} fit: shorten it in Prompt Edit.")
    texts = [
        tokenizer.inv_vocab[token] if isinstance(token, int) else f"<embedding {i}></w>"
        for i, (token, _) in enumerate(chunks[0])
    ]
    if texts[1] == tokenizer.inv_vocab[tokenizer.end_token]:
        raise ValueError(f"The {prompt} prompt is empty: type what the image shows in Prompt Edit.")
    return texts
