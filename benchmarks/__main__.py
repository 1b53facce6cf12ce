"""`python dev.py bench NAME`: what the edits and the demo model are worth, and what they cost."""

from __future__ import annotations

import argparse

import torch

from . import batch, distil, edits, flows, gradients, p2p, pairs, pie, reconstruction, samples, steps, truth

MODULES = {
    "truth": truth,
    "edits": edits,
    "pie": pie,
    "batch": batch,
    "pairs": pairs,
    "distil": distil,
    "steps": steps,
    "samples": samples,
    "p2p": p2p,
    "flows": flows,
    "gradients": gradients,
    "reconstruction": reconstruction,
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="dev.py bench", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, module in MODULES.items():
        command = commands.add_parser(name, help=module.__doc__.splitlines()[0])
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    arguments = parser.parse_args()
    with torch.inference_mode():
        arguments.run(arguments)


main()
