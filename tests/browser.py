"""A headless Chromium, driven over the DevTools protocol."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import websocket

PROGRAMS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-dev-shm-usage",
    "--disable-sync",
    "--hide-scrollbars",
    "--no-first-run",
    "--no-proxy-server",
    # Pages see this machine and nothing else, wherever the tests run.
    "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1",
    "--remote-debugging-port=0",
)
MIDDLE = """(() => {
    const element = document.querySelector(%s), box = element?.getBoundingClientRect();
    if (!box) return null;
    const [x, y] = [box.x + box.width / 2, box.y + box.height / 2];
    return element.contains(document.elementFromPoint(x, y)) ? [x, y] : null;
})()"""
LOCAL = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def find_browser() -> str | None:
    return next(filter(None, map(shutil.which, PROGRAMS)), None)


class PageError(Exception):
    """A script that failed in the page, or a page that did not become what was waited for."""


class Page:
    """One tab. `errors` collects what went wrong in it: uncaught exceptions and messages of console.error."""

    def __init__(self, address: str) -> None:
        self.errors: list[str] = []
        self.last_id = 0
        # Chromium refuses debugging connections that name an origin.
        self.socket = websocket.create_connection(address, timeout=60, suppress_origin=True, http_no_proxy=["*"])
        for domain in ("Page", "Runtime"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        self.last_id += 1
        self.socket.send(json.dumps({"id": self.last_id, "method": method, "params": params}))
        while True:
            message = json.loads(self.socket.recv())
            if message.get("id") == self.last_id:
                if "error" in message:
                    raise PageError(f"{method}: {message['error']['message']}")
                return message["result"]
            self.note(message)

    def note(self, event: dict[str, Any]) -> None:
        params = event.get("params", {})
        if event["method"] == "Runtime.exceptionThrown":
            self.errors.append(exception_text(params["exceptionDetails"]))
        elif event["method"] == "Runtime.consoleAPICalled" and params["type"] == "error":
            self.errors.append(" ".join(map(console_text, params["args"])))

    def open(self, url: str) -> None:
        self.send("Page.navigate", url=url)

    def evaluate(self, script: str) -> Any:
        """The value of a JavaScript expression; a promise is awaited."""
        result = self.send("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in result:
            raise PageError(f"{script}: {exception_text(result['exceptionDetails'])}")
        return result["result"].get("value")

    def wait_for(self, condition: str, seconds: float = 30) -> Any:
        """Waits until a JavaScript expression is true, and returns its value."""
        end = time.monotonic() + seconds
        while not (value := self.evaluate(condition)):
            if time.monotonic() > end:
                raise PageError(f"not true within {seconds} s: {condition} (errors of the page: {self.errors})")
            time.sleep(0.2)
        return value

    def click(self, selector: str) -> None:
        """Presses the mouse in the middle of the element, as soon as that is what one would hit there."""
        x, y = self.wait_for(MIDDLE % json.dumps(selector))
        for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
            button = "none" if kind == "mouseMoved" else "left"
            self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button=button, clickCount=1)

    def screenshot(self, path: Path) -> Path:
        path.write_bytes(base64.b64decode(self.send("Page.captureScreenshot", format="png")["data"]))
        return path


def exception_text(details: dict[str, Any]) -> str:
    return details.get("exception", {}).get("description") or details["text"]


def console_text(argument: dict[str, Any]) -> str:
    return str(argument.get("value", argument.get("description", argument["type"])))


@contextmanager
def open_browser(program: str, profile: Path, width: int = 1920, height: int = 1080) -> Iterator[Page]:
    """Starts the browser with a profile of its own in a new folder, and gives its one tab."""
    command = [program, *FLAGS, f"--window-size={width},{height}", f"--user-data-dir={profile}", "about:blank"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        page = Page(tab_address(process, profile / "DevToolsActivePort"))
        page.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        yield page
        page.socket.close()
    finally:
        process.terminate()
        process.wait(20)


def tab_address(process: subprocess.Popen[bytes], port_file: Path, seconds: float = 60) -> str:
    """Where to debug the first tab; Chromium writes the port that it chose into a file."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        time.sleep(0.1)
        lines = port_file.read_text().splitlines() if port_file.exists() else []
        if len(lines) < 2:
            continue
        with LOCAL.open(f"http://127.0.0.1:{lines[0]}/json/list", timeout=20) as answer:
            tabs = json.load(answer)
        if pages := [tab for tab in tabs if tab["type"] == "page"]:
            return pages[0]["webSocketDebuggerUrl"]
    raise PageError(f"the browser did not start (exit code {process.poll()})")
