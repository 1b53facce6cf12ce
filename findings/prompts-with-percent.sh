#!/usr/bin/env bash
# Plain prompts with a per cent or dollar sign, given to dynamicprompts.
#
# Guess, written first: a prompt without braces, wildcards or variables comes back as it is, whatever else is in it; signs
# that the template language uses in pairs ($name, ${name}) are text when they stand alone.
#
# Seen with dynamicprompts 0.31.0: weights, embeddings, LoRA tags, BREAK, [a:b:0.5] and escaped brackets come back as they
# are. A per cent sign or a dollar sign anywhere is a ParseException, so "a sign with 50% off" cannot be a prompt; and "#"
# begins a comment within a line too, so what follows it is left out without a word.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check dynamicprompts==0.31.0
"$folder/venv/bin/python" - <<'PYTHON'
from dynamicprompts.generators import RandomPromptGenerator
from dynamicprompts.wildcards.wildcard_manager import WildcardManager

KEPT = ["a (red:1.2) cat, embedding:nice", "<lora:cats:0.8> a cat BREAK a dog", "a [cat:dog:0.5]", r"a cat \(sitting\)"]
EXPECTED = {
    **{prompt: prompt for prompt in KEPT},
    "a sign with 50% off": "ParseException",
    "a price tag of $5": "ParseException",
    "house #5 on a street": "house ",
}


def generated(prompt):
    try:
        (text,) = RandomPromptGenerator(WildcardManager()).generate(prompt, 1)
        return text
    except Exception as error:
        return type(error).__name__


seen = {prompt: generated(prompt) for prompt in EXPECTED}
for prompt, text in seen.items():
    print(f"{prompt!r}: {text!r}")
assert seen == EXPECTED
PYTHON
