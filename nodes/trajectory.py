"""Nodes that keep trajectories on disk."""

from __future__ import annotations

import hashlib
from pathlib import Path

import folder_paths
from comfy_api.latest import io

from ..host.model import noise_latent
from ..host.refusals import check_same_model
from ..host.trajectory import Trajectory
from . import sockets


class SaveTrajectory(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PalimpsestSaveTrajectory",
            display_name="Save Trajectory",
            category="Palimpsest/invert",
            description="Writes a trajectory to the output folder, so that an image need be inverted only once.",
            search_aliases=["save inversion", "export trajectory", "cache inversion"],
            is_output_node=True,
            inputs=[
                sockets.Trajectory.Input(
                    "trajectory", tooltip="What to write: about 3.6 MB for a 512 pixel image at 50 steps."
                ),
                io.String.Input(
                    "filename_prefix",
                    default="trajectories/image",
                    tooltip="File name in the output folder, folders allowed; a number is added.",
                ),
            ],
            outputs=[sockets.Trajectory.Output("trajectory", tooltip="The same trajectory, to go on with.")],
        )

    @classmethod
    def execute(cls, trajectory, filename_prefix) -> io.NodeOutput:
        root = Path(folder_paths.get_output_directory()).resolve()
        if not (root / filename_prefix).resolve().is_relative_to(root):
            raise ValueError(
                f"Save Trajectory may not write to '{filename_prefix}': choose a name in the output folder."
            )
        folder, name, counter, subfolder, _ = folder_paths.get_save_image_path(filename_prefix, str(root))
        file = f"{name}_{counter:05}_.safetensors"
        trajectory.save(Path(folder) / file)
        return io.NodeOutput(trajectory, ui={"text": [str(Path(subfolder) / file)]})


class LoadTrajectory(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PalimpsestLoadTrajectory",
            display_name="Load Trajectory",
            category="Palimpsest/invert",
            description="Reads a trajectory that Save Trajectory wrote, from the output or the input folder.",
            search_aliases=["load inversion", "import trajectory"],
            inputs=[
                io.Model.Input("model", tooltip="The model that made the trajectory; clearly another one is refused."),
                io.Combo.Input(
                    "file",
                    options=_listed(),
                    tooltip="A file of the input folder, or of the output folder where it ends in [output].",
                ),
            ],
            outputs=[
                sockets.Trajectory.Output("trajectory", tooltip="The image at every noise level, for the edit nodes."),
                io.Latent.Output(
                    "noise", tooltip="The inverted noise: latent_image of the sampler, add_noise disabled."
                ),
                io.Sigmas.Output("sigmas", tooltip="The schedule, for SamplerCustom."),
            ],
        )

    @classmethod
    def validate_inputs(cls, file: str) -> bool | str:
        try:
            _path(file)
        except ValueError as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, file: str) -> str:
        return hashlib.sha256(_path(file).read_bytes()).hexdigest()

    @classmethod
    def execute(cls, model, file) -> io.NodeOutput:
        trajectory = Trajectory.load(_path(file))
        check_same_model(model, trajectory)
        return io.NodeOutput(trajectory, {"samples": noise_latent(model, trajectory)}, trajectory.sigmas)


def _listed() -> list[str]:
    """The trajectories in the input and output folders, in the host's notation ("name" or "name [output]")."""
    files = []
    for folder, mark in ((folder_paths.get_input_directory(), ""), (folder_paths.get_output_directory(), " [output]")):
        root = Path(folder)
        files += sorted(path.relative_to(root).as_posix() + mark for path in root.rglob("*.safetensors"))
    return files


def _path(file: str) -> Path:
    """The path of a listed file. Raises ValueError for one that is missing or outside the host's folders."""
    name, root = folder_paths.annotated_filepath(file)
    root = Path(root or folder_paths.get_input_directory()).resolve()
    path = (root / name).resolve()
    if not path.is_relative_to(root):
        raise ValueError(f"Load Trajectory may not read '{file}': choose a file inside the input or output folder.")
    if not path.is_file():
        raise ValueError(f"Load Trajectory finds no file '{file}': choose one from its list.")
    return path
