"""Work on several ComfyUI servers by Dask: whatever becomes of servers and workers, each piece is done or told of."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from distributed import Client, LocalCluster

from host_server import free_port
from palimpsest.benchmarks.farm import Farm, add_farm, farm, spread
from palimpsest.benchmarks.servers import Refused, Server, Unusable

ANSWERING = """
import http.server, sys

class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b'{"LoadImage": {}}')

    def log_message(self, *_):
        pass

http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Answer).serve_forever()
"""
WORKFLOW = {"1": {"class_type": "LoadImage", "inputs": {}}}


@pytest.fixture
def programs() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def started(programs: ExitStack, *command: object) -> subprocess.Popen:
    """Outside of the repository, as on another machine."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    process = subprocess.Popen(
        [str(part) for part in command], cwd="/", env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    programs.callback(process.wait)
    programs.callback(process.kill)
    return process


@pytest.fixture
def answering(tmp_path: Path) -> Path:
    path = tmp_path / "answering.py"
    path.write_text(ANSWERING)
    return path


@pytest.fixture
def urls(programs: ExitStack, answering: Path) -> list[str]:
    ports = [free_port() for _ in range(2)]
    for port in ports:
        started(programs, sys.executable, answering, port)
    urls = [f"http://127.0.0.1:{port}" for port in ports]
    for url in urls:
        wait_for(url)
    return urls


def wait_for(url: str) -> None:
    end = time.monotonic() + 20
    while True:
        try:
            return Server(url).check(WORKFLOW)
        except Unusable:
            assert time.monotonic() < end
        time.sleep(0.05)


def parsed(*arguments: object) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_farm(parser)
    return parser.parse_args([str(argument) for argument in arguments])


def loaded(piece: Any) -> tuple[Any]:
    return (piece,)


def told(work: list, run: Any, *arguments: object, load: Any = loaded) -> list[tuple]:
    with farm(WORKFLOW, parsed(*arguments)) as servers:
        return list(spread(work, servers, load, run))


def test_each_server_takes_its_share(urls: list[str]) -> None:
    def run(server: Server, piece: int) -> tuple[str, int]:
        time.sleep(0.2)
        return server.url, piece**2

    found = told(list(range(6)), run, "--servers", *urls)
    assert sorted((piece, value[1], fault) for piece, value, fault in found) == [(n, n * n, "") for n in range(6)]
    assert {value[0] for _, value, _ in found} == set(urls)


def test_a_server_that_ends_costs_nothing_else(urls: list[str]) -> None:
    def run(server: Server, piece: int) -> int:
        if server.url == urls[0]:
            raise Unusable("the first does not answer")
        if piece == 3:
            raise Refused("three is not liked")
        return piece

    found = told(list(range(6)), run, "--servers", *urls)
    done = sorted(done for done in found if done[0] is not None)
    assert done == [(n, None, "three is not liked") if n == 3 else (n, n, "") for n in range(6)]
    assert [done for done in found if done[0] is None] == [(None, None, "the first does not answer")]


def test_pieces_that_no_server_is_left_for(urls: list[str]) -> None:
    def run(server: Server, piece: int) -> None:
        raise Unusable(f"{server.url} does not answer")

    found = told([0, 1, 2, 3], run, "--servers", *urls)
    assert sorted(fault for piece, _, fault in found if piece is None) == sorted(
        f"{url} does not answer" for url in urls
    )
    assert sorted(piece for piece, *_ in found if piece is not None) == [0, 1, 2, 3]
    assert {fault for piece, _, fault in found if piece is not None} == {"no server is left"}


def test_a_piece_that_ends_every_server(programs: ExitStack, answering: Path, urls: list[str]) -> None:
    others = [free_port() for _ in range(2)]
    for port in others:
        started(programs, sys.executable, answering, port)
    urls += [f"http://127.0.0.1:{port}" for port in others]
    for url in urls:
        wait_for(url)

    def run(server: Server, piece: str) -> str:
        if piece == "heavy":
            raise Unusable(f"{server.url} ran out of memory")
        return piece

    found = told(["heavy", "light"], run, "--servers", *urls)
    assert ("heavy", None, "3 servers or workers ended over it") in found
    assert ("light", "light", "") in found


def test_servers_that_cannot_be_used(urls: list[str]) -> None:
    nowhere = f"http://127.0.0.1:{free_port()}"
    with farm({"1": {"class_type": "Palimpsest"}}, parsed("--servers", nowhere, urls[0])) as servers:
        found = list(spread([1], servers, loaded, lambda server, piece: piece))
    absent, bare = sorted((fault for piece, _, fault in found if piece is None), key=lambda fault: "without" in fault)
    assert absent.startswith(f"{nowhere} does not answer")
    assert bare == f"{urls[0]} runs without Palimpsest: install Palimpsest there and restart it"
    assert found[-1] == (1, None, "no server is left")


def test_a_piece_that_cannot_be_read(urls: list[str]) -> None:
    def load(piece: int) -> tuple[int]:
        if piece == 1:
            raise OSError("cannot identify image file")
        return (piece,)

    found = told([0, 1, 2], lambda server, piece: piece, "--servers", *urls, load=load)
    assert sorted(found) == [(0, 0, ""), (1, None, "cannot identify image file"), (2, 2, "")]


@pytest.fixture
def scheduler(programs: ExitStack) -> str:
    port = free_port()
    dask = (sys.executable, "-m", "distributed.cli.dask_scheduler")
    started(programs, *dask, "--port", port, "--dashboard-address", ":0")
    return f"tcp://127.0.0.1:{port}"


@pytest.fixture
def dask_worker(scheduler: str, tmp_path: Path) -> tuple:
    worker = (sys.executable, "-m", "distributed.cli.dask_worker", scheduler, "--nthreads", 1, "--no-dashboard")
    return *worker, "--local-directory", tmp_path, "--death-timeout", 20


def test_a_worker_that_is_killed_costs_time_alone(
    programs: ExitStack, scheduler: str, dask_worker: tuple, urls: list[str]
) -> None:
    """On a cluster of its own processes, which know nothing of the pack. A worker that comes later helps."""
    doomed, _ = (started(programs, *dask_worker, "--no-nanny") for _ in range(2))
    with Client(scheduler) as client:
        client.wait_for_workers(2, timeout=30)

    def run(server: Server, piece: int) -> tuple[int, str]:
        time.sleep(0.3)
        return piece, server.url

    found = []
    with farm(WORKFLOW, parsed("--scheduler", scheduler, "--servers", *urls)) as servers:
        for done in spread(list(range(12)), servers, loaded, run):
            found.append(done)
            if len(found) == 2:
                doomed.kill()
            if len(found) == 4:
                while len(servers.present()) > 1:
                    time.sleep(0.05)
                started(programs, *dask_worker, "--no-nanny")
                servers.client.wait_for_workers(2, timeout=30)
    assert sorted((piece, value[0], fault) for piece, value, fault in found) == [(n, n, "") for n in range(12)]
    assert {value[1] for _, value, _ in found[4:]} == set(urls)


def test_nothing_is_waited_for_where_no_server_is_left_for_a_worker(urls: list[str]) -> None:
    """One of three workers has gone, one has lost the only server, and the third never had one."""
    options = {"processes": False, "threads_per_worker": 1, "memory_limit": 0, "dashboard_address": ":0"}
    with LocalCluster(n_workers=3, **options) as cluster, Client(cluster) as client:
        servers = Farm(client, WORKFLOW, urls[:1], starting=False)
        for _ in range(2):
            assert servers.muster() == []
            (address,) = servers.found
            assert servers.found[address] == urls[0]
            if not servers.gone:
                client.retire_workers([address])
        servers.dismiss(address)
        assert len(servers.present()) == 2
        assert not servers.comes()


def test_a_piece_that_ends_every_worker(
    programs: ExitStack, scheduler: str, dask_worker: tuple, urls: list[str]
) -> None:
    """Dask's nanny starts the worker anew, which takes the next piece."""
    started(programs, *dask_worker)

    def run(server: Server, piece: str) -> str:
        if piece == "heavy":
            os._exit(1)
        return piece

    found = told(["heavy", "light"], run, "--scheduler", scheduler, "--servers", urls[0])
    assert found == [("heavy", None, "3 servers or workers ended over it"), ("light", "light", "")]


def test_servers_that_the_workers_start(answering: Path) -> None:
    command = f"{sys.executable} {answering} {{port}} {{worker}}"
    with farm(WORKFLOW, parsed("--start", command, "--workers", 2)) as servers:
        found = list(spread(list(range(4)), servers, loaded, lambda server, piece: (server.url, time.sleep(0.2))[0]))
        own = set(servers.found.values())
    assert len(own) == 2
    assert {url for _, url, _ in found} == own
    for url in own:
        with pytest.raises(Unusable, match="does not answer"):
            Server(url).check(WORKFLOW)


def test_a_command_that_starts_no_server(answering: Path) -> None:
    found = told([1], loaded, "--start", f"{sys.executable} -c pass {{port}}")
    assert found[-1] == (1, None, "no server is left")
    assert "ended before it answered" in found[0][2]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--servers", "http://a", "--start", "x {port}"), "--servers are running already and --start starts others"),
        (("--start", "python main.py"), "--start has no {port}, by which its servers are found: python main.py"),
        (("--scheduler", "nonsense://a:1"), "--scheduler nonsense://a:1 is no scheduler of Dask that answers"),
    ],
)
def test_arguments_of_no_use(arguments: tuple, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence), farm(WORKFLOW, parsed(*arguments)):
        pass
