"""What a worker of Dask does beside its ComfyUI server. The code goes to the workers, which need not have the pack."""

from __future__ import annotations

import shlex
import socket
import subprocess
import time
from collections.abc import Callable, Mapping
from typing import Any

from distributed import Worker, WorkerPlugin, get_worker

from .servers import Prompt, Refused, Server, Unusable

DONE, REFUSED, LOST = "done", "refused", "lost"


def attempt(urls: Mapping[str, str], run: Callable[..., Any], *args: Any) -> tuple[str, Any]:
    """What `run` gives of this worker's server, by the worker's address: DONE and the result, or why there is none.

    REFUSED comes with a sentence and LOST, where the server is at fault, with the worker's address and a sentence.
    """
    address = get_worker().address
    try:
        return DONE, run(Server(urls[address]), *args)
    except Unusable as fault:
        return LOST, (address, str(fault))
    except (Refused, ValueError, OSError) as fault:
        return REFUSED, str(fault)


class Starting(WorkerPlugin):
    """A ComfyUI server for each worker, which ends with it.

    command: in it {port} becomes a free port of the worker's machine and {worker} the worker's name.
    """

    name = "palimpsest-comfyui"

    def __init__(self, command: str) -> None:
        self.command = command

    def setup(self, worker: Worker) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        filled = self.command.replace("{port}", str(port)).replace("{worker}", str(worker.name))
        self.url = f"http://127.0.0.1:{port}"
        self.process = subprocess.Popen(shlex.split(filled), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def answers(self, server: Server) -> bool:
        """Raises Unusable where the command has ended."""
        if self.process.poll() is not None:
            raise Unusable(f"{shlex.join(self.process.args)} ended before it answered")
        try:
            server.check({})
        except Unusable:
            return False
        return True

    def teardown(self, worker: Worker) -> None:
        self.process.terminate()
        self.process.wait()


def started_url(dask_worker: Worker) -> str:
    return dask_worker.plugins[Starting.name].url


def check(server: Server, workflow: Prompt) -> None:
    """Raises Unusable unless the server answers and knows the workflow's nodes; one that is starting is waited for."""
    starting = get_worker().plugins.get(Starting.name)
    while starting and not starting.answers(server):
        time.sleep(1)
    server.check(workflow)


def edited(server: Server, name: str, picture: bytes, prompt: Prompt, node_id: str) -> bytes:
    """The picture that a node of the prompt saves of this one. Raises ValueError where it is not one."""
    server.upload(name, picture)
    pictures = server.run(prompt, node_id)
    if len(pictures) != 1:
        raise ValueError(f"the workflow made {len(pictures)} pictures of it, not one")
    return pictures[0]
