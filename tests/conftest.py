"""Tests run among the host's modules; whole edits use the demo model, everything structural a tiny random UNet."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from in_host import prepare

prepare()

import torch  # noqa: E402

from host_server import HostServer  # noqa: E402
from palimpsest.demo import model as demo_model  # noqa: E402
from tiny import Tiny  # noqa: E402


@pytest.fixture(autouse=True)
def _inference_mode() -> Iterator[None]:
    with torch.inference_mode():  # as the host does around every node
        yield


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
