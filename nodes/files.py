"""Files of the pack in the host's folders."""

from __future__ import annotations

import os
from pathlib import Path

import folder_paths

from ..host.quote import quoted


def listed() -> list[str]:
    """The safetensors of the input and output folders, in the host's notation ("name" or "name [output]")."""
    files = []
    for folder, mark in ((folder_paths.get_input_directory(), ""), (folder_paths.get_output_directory(), " [output]")):
        root = Path(folder)
        files += sorted(path.relative_to(root).as_posix() + mark for path in root.rglob("*.safetensors"))
    return files


def texts() -> list[str]:
    """The text files of the input folder."""
    root = Path(folder_paths.get_input_directory())
    return sorted(path.relative_to(root).as_posix() for path in root.rglob("*.txt"))


def text(file: str, node: str) -> str:
    """What a listed text file says. Raises ValueError as `existing`, and for other files than text."""
    path = existing(file, node)
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{node} cannot read {quoted(file)}: save it as UTF-8 text.") from error


def existing(file: str, node: str) -> Path:
    """The path of a listed file. Raises ValueError for one that is missing or outside the host's folders."""
    name, root = folder_paths.annotated_filepath(file)
    path = _within(Path(root or folder_paths.get_input_directory()), name)
    if path is None:
        raise ValueError(f"{node} may not read {quoted(file)}: choose a file inside the input or output folder.")
    if not os.path.isfile(path):  # Path.is_file raises for a name that is too long
        raise ValueError(f"{node} finds no file {quoted(file)}: choose one from its list.")
    return path


def verdict(file: str, node: str) -> bool | str:
    """What a node's validate_inputs answers."""
    try:
        existing(file, node)
    except ValueError as error:
        return str(error)
    return True


def version(file: str, node: str) -> str:
    """What a node's fingerprint_inputs answers: a file written anew is read anew."""
    stat = existing(file, node).stat()
    return f"{stat.st_mtime_ns} {stat.st_size}"


def fresh(prefix: str, node: str) -> tuple[Path, str]:
    """A new numbered safetensors path in the output folder, and how the host shows it.

    Raises ValueError outside, and where the folder cannot be made.
    """
    root = Path(folder_paths.get_output_directory()).resolve()
    if _within(root, prefix) is None:
        raise ValueError(f"{node} may not write to {quoted(prefix)}: choose a name in the output folder.")
    try:
        folder, name, counter, subfolder, _ = folder_paths.get_save_image_path(prefix, str(root))
    except OSError as error:
        raise ValueError(
            f"{node} cannot make the folder of {quoted(prefix)} ({error.strerror}): choose another filename_prefix."
        ) from error
    file = f"{name}_{counter:05}_.safetensors"
    return Path(folder) / file, str(Path(subfolder) / file)


def folder(name: str, node: str) -> Path:
    """A folder in the output folder, made where it is missing. Raises ValueError outside, and where that fails."""
    path = _within(Path(folder_paths.get_output_directory()), name)
    if path is None:
        raise ValueError(f"{node} may not write to {quoted(name)}: choose a folder in the output folder.")
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"{node} cannot make the folder {quoted(name)} ({error.strerror}): choose another name."
        ) from error
    return path


def _within(root: Path, name: str) -> Path | None:
    """The path of a name in a folder, None where it leads out of it."""
    root = root.resolve()
    try:
        path = (root / name).resolve()
    except ValueError:  # the name holds a zero byte
        return None
    return path if path.is_relative_to(root) else None
