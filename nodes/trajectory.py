"""Nodes that keep trajectories on disk."""

from __future__ import annotations

from comfy_api.latest import io

from ..host.files.trajectory import Trajectory
from ..host.run.refusals import check_same_model
from . import files, sockets
from .telling import tell
from .widgets import noise_and_sigmas, noise_and_sigmas_of, saved_file, saved_name


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
                saved_name("trajectories/image"),
            ],
            outputs=[sockets.Trajectory.Output("trajectory", tooltip="The same trajectory, to go on with.")],
        )

    @classmethod
    def execute(cls, trajectory, filename_prefix) -> io.NodeOutput:
        path, shown = files.fresh(filename_prefix, "Save Trajectory")
        trajectory.save(path)
        return tell(cls, trajectory, ui={"text": [shown]})


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
                saved_file(),
            ],
            outputs=[
                sockets.Trajectory.Output("trajectory", tooltip="The image at every noise level, for the edit nodes."),
                *noise_and_sigmas(),
            ],
        )

    @classmethod
    def validate_inputs(cls, file: str) -> bool | str:
        return files.verdict(file, "Load Trajectory")

    @classmethod
    def fingerprint_inputs(cls, file: str) -> str:
        return files.version(file, "Load Trajectory")

    @classmethod
    def execute(cls, model, file) -> io.NodeOutput:
        trajectory = Trajectory.load(files.existing(file, "Load Trajectory"))
        check_same_model(model, trajectory)
        return io.NodeOutput(trajectory, *noise_and_sigmas_of(model, trajectory))
