"""The real ComfyUI as a server of its own, with nothing in it but this pack."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

PACK = Path(__file__).resolve().parents[1]
FLAGS = (
    "--disable-api-nodes",
    "--use-pytorch-cross-attention",
    *("--database-url", "sqlite:///:memory:"),
    *("--preview-method", "auto"),
)
# A proxy from the environment must not come between the tests and their server.
LOCAL = urllib.request.build_opener(urllib.request.ProxyHandler({}))

Prompt = dict[str, dict[str, Any]]
"""A workflow in the host's API format: node id to class_type and inputs."""


@dataclass(frozen=True)
class Run:
    """What became of a prompt: the outputs by node id, and one sentence for each error."""

    outputs: dict[str, dict[str, Any]] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)

    def images(self, kind: str = "output") -> list[dict[str, str]]:
        """The pictures of this kind ("output" are saved ones, "temp" previews), as HostServer.view takes them."""
        images = [image for output in self.outputs.values() for image in output.get("images", [])]
        return [image for image in images if image["type"] == kind]


class HostServer:
    """Runs while the `with` block does; everything that it reads and writes is in `folder`, which should be empty."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.log = folder / "server.log"
        self.url = f"http://127.0.0.1:{free_port()}"

    def __enter__(self) -> HostServer:
        for name in ("custom_nodes", "models/checkpoints", "input", "output", "temp", "user"):
            (self.folder / name).mkdir(parents=True)
        (self.folder / "custom_nodes" / "palimpsest").symlink_to(PACK, target_is_directory=True)
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(self.command(), stdout=log, stderr=subprocess.STDOUT, env=environment)
        try:
            self.wait_until_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def command(self) -> list[str]:
        main = Path(os.environ["COMFYUI_PATH"]) / "main.py"
        port = self.url.rpartition(":")[2]
        command = [sys.executable, str(main), "--base-directory", str(self.folder), "--port", port, *FLAGS]
        if root := os.environ.get("FRONTEND_ROOT"):  # another frontend than the host's own
            command += ["--front-end-root", root]
        return command if torch.accelerator.is_available() else [*command, "--cpu"]

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def wait_until_ready(self, seconds: float = 180) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end and self.process.poll() is None:
            try:
                self.get("/system_stats")
            except OSError:
                time.sleep(0.3)
            else:
                return
        log = self.log.read_text(encoding="utf-8", errors="replace")
        raise RuntimeError(f"the server did not start (exit code {self.process.poll()}):\n{log[-3000:]}")

    def get(self, path: str) -> bytes:
        with LOCAL.open(self.url + path, timeout=60) as answer:
            return answer.read()

    def get_json(self, path: str) -> Any:
        return json.loads(self.get(path))

    def post(self, path: str, body: Any) -> bytes:
        request = urllib.request.Request(self.url + path, json.dumps(body).encode())
        with LOCAL.open(request, timeout=60) as answer:
            return answer.read()

    @cached_property
    def object_info(self) -> dict[str, dict[str, Any]]:
        return self.get_json("/object_info")

    def run(self, prompt: Prompt, seconds: float = 600, workflow: dict[str, Any] | None = None) -> Run:
        """Queues a prompt and waits for its end. A prompt that fails, or is refused, is a Run with errors.

        The frontend sends its workflow as well.
        """
        try:
            extra = {"extra_pnginfo": {"workflow": workflow}} if workflow else {}
            answer = json.loads(self.post("/prompt", {"prompt": prompt, "extra_data": extra}))
        except urllib.error.HTTPError as error:
            answer = json.loads(error.read())
            return Run(errors=refusals(answer) or [answer["error"]["message"]])
        run = self.finished(answer["prompt_id"], seconds)
        # The host runs the valid outputs of a prompt and leaves out the others.
        return Run(run.outputs, refusals(answer) + run.errors)

    def finished(self, prompt_id: str, seconds: float = 600) -> Run:
        """Waits for the end of a prompt that is queued already."""
        end = time.monotonic() + seconds
        while not (history := self.get_json(f"/history/{prompt_id}")):
            if time.monotonic() > end or self.process.poll() is not None:
                raise TimeoutError(f"the prompt did not end within {seconds} s; the server's log is {self.log}")
            time.sleep(0.1)
        entry = history[prompt_id]
        return Run(entry["outputs"], failures(entry["status"]))

    def view(self, image: dict[str, str]) -> bytes:
        """The file of a picture out of a Run's images."""
        return self.get("/view?" + urllib.parse.urlencode(image))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def refusals(answer: dict[str, Any]) -> list[str]:
    """What the host found wrong with single nodes before it ran anything."""
    return [
        f"{node['class_type']} (node {node_id}): {error['message']}, {error['details']}"
        for node_id, node in answer["node_errors"].items()
        for error in node["errors"]
    ]


def failures(status: dict[str, Any]) -> list[str]:
    """Why a prompt did not end well."""
    return [
        f"{message['node_type']} (node {message['node_id']}): {message.get('exception_message', kind).strip()}"
        for kind, message in status["messages"]
        if kind in ("execution_error", "execution_interrupted")
    ]
