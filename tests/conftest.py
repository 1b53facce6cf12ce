"""Tests run among the host's modules; whole edits use the demo model, everything structural a tiny random UNet."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

# Tests that run side by side, and their servers, share the processor: torch reads this when it is first imported.
if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, os.cpu_count() // int(workers))))

from in_host import prepare  # noqa: E402

prepare()

import comfy.model_management  # noqa: E402
import torch  # noqa: E402
from execnet import Gateway  # noqa: E402

from browser import PROGRAMS, Page, find_browser, open_browser  # noqa: E402
from host_server import HostServer  # noqa: E402
from palimpsest.demo import model as demo_model  # noqa: E402
from tiny import Tiny  # noqa: E402


class Ending:
    """A run that is told to end takes down its fixtures first, and those of its workers: servers would outlive it."""

    def __init__(self) -> None:
        self.workers: list[int] = []

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_newgateway(self, gateway: Gateway) -> None:
        self.workers.append(gateway._rinfo().pid)

    def end(self, number: int, _: object) -> None:
        for worker in self.workers:
            os.kill(worker, number)
        pytest.exit("told to end", 128 + number)


def pytest_configure(config: pytest.Config) -> None:
    ending = Ending()
    config.pluginmanager.register(ending)
    for name in ("SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), ending.end)


@pytest.fixture(autouse=True)
def _inference_mode() -> Iterator[None]:
    with torch.inference_mode():  # as the host does around every node
        yield


@pytest.fixture(scope="module", autouse=True)
def _empty_handed() -> Iterator[None]:
    """What the tests of a file loaded does not stay in memory during those of the next."""
    yield
    comfy.model_management.unload_all_models()
    comfy.model_management.cleanup_models()
    gc.collect()


@pytest.fixture(scope="session")
def demo() -> tuple:
    """MODEL, CLIP and VAE of the embedded demo model."""
    return demo_model.load()


@pytest.fixture
def tiny() -> Tiny:
    return Tiny()


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HostServer]:
    with HostServer(tmp_path_factory.mktemp("server")) as running:
        yield running


@pytest.fixture
def page(server: HostServer, tmp_path: Path) -> Iterator[Page]:
    program = find_browser()
    if program is None:
        missing = f"no browser found: install one of {', '.join(PROGRAMS)}"
        if os.environ.get("CI"):
            pytest.fail(missing)
        pytest.skip(missing)
    # Else a new user is greeted with a dialog.
    server.post("/settings/Comfy.TutorialCompleted", True)
    with open_browser(program, tmp_path / "profile") as page:
        yield page
