"""A ComfyUI server, as the runner of workflows uses it. Python's standard library alone."""

from __future__ import annotations

import http.client
import json
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from typing import Any

Prompt = dict[str, dict[str, Any]]
"""A workflow in the host's API format: node id to class_type and inputs."""

# A proxy from the environment must not come between this program and servers of one's own.
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class Unusable(Exception):
    """A server that is not there, has ended or lacks nodes, in one sentence."""


class Refused(Exception):
    """What a server says against a prompt, in one sentence."""


class Server:
    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")

    def check(self, workflow: Prompt) -> None:
        """Raises Unusable unless the server answers and knows the workflow's nodes."""
        known = json.loads(self._ask("/object_info"))
        missing = sorted({node["class_type"] for node in workflow.values()} - known.keys())
        if missing:
            raise Unusable(f"{self.url} runs without {', '.join(missing)}: install Palimpsest there and restart it")

    def upload(self, name: str, picture: bytes) -> None:
        """Puts a PNG into the server's input folder, over another of that name."""
        border = uuid.uuid4().hex
        parts = {f'name="image"; filename="{name}"': picture, 'name="overwrite"': b"true"}
        body = b"".join(
            f"--{border}\r\nContent-Disposition: form-data; {head}\r\n\r\n".encode() + content + b"\r\n"
            for head, content in parts.items()
        )
        self._ask("/upload/image", body + f"--{border}--\r\n".encode(), f"multipart/form-data; boundary={border}")

    def run(self, prompt: Prompt, node_id: str) -> list[bytes]:
        """The pictures that a node of the prompt saved. Raises Refused where it fails."""
        answer = json.loads(self._ask("/prompt", json.dumps({"prompt": prompt}).encode(), "application/json"))
        if answer.get("node_errors") or "prompt_id" not in answer:
            raise Refused(_refusal(answer))
        prompt_id = answer["prompt_id"]
        while not (history := json.loads(self._ask(f"/history/{prompt_id}"))):
            time.sleep(0.2)
        entry = history[prompt_id]
        errors = dict(entry["status"]["messages"])
        if error := errors.get("execution_error"):
            raise Refused(f"{error['node_type']} (node {error['node_id']}): {error['exception_message'].strip()}")
        images = entry["outputs"].get(node_id, {}).get("images", [])
        return [self._ask("/view?" + urllib.parse.urlencode(image)) for image in images]

    def _ask(self, path: str, body: bytes | None = None, content: str = "") -> bytes:
        request = urllib.request.Request(self.url + path, body, {"Content-Type": content} if content else {})
        try:
            with DIRECT.open(request, timeout=60) as answer:
                return answer.read()
        except urllib.error.HTTPError as error:
            if error.code == 400 and path == "/prompt":
                return error.read()
            kind = Unusable if error.code >= 500 else Refused
            raise kind(f"{self.url}{path.partition('?')[0]} answers {error.code} {error.reason}") from error
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise Unusable(f"{self.url} does not answer: {getattr(error, 'reason', None) or error}") from error


def _refusal(answer: dict[str, Any]) -> str:
    found = [
        f"{node['class_type']} (node {node_id}): {error['message']}, {error['details']}"
        for node_id, node in answer.get("node_errors", {}).items()
        for error in node["errors"]
    ]
    return "; ".join(found) or answer["error"]["message"]
