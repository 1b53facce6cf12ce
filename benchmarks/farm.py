"""Pieces of work on ComfyUI servers, by Dask: a server beside each worker, whatever becomes of pieces and of either."""

from __future__ import annotations

import argparse
import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import cloudpickle
import dask
from distributed import Client, Future, KilledWorker, LocalCluster, wait

from . import servers, worker
from .servers import Prompt
from .worker import DONE, LOST, Starting, attempt, check, started_url

Work = TypeVar("Work")
OWN = "http://127.0.0.1:8188"
TRIES = 3  # of a piece whose server or worker ends over it
ENDED = f"{TRIES} servers or workers ended over it"
LOOK = 2.0  # seconds between looks at who is there
GRACE = 60.0  # seconds in which a cluster without workers may get one
OF_DASK = {
    "distributed.admin.large-graph-warning-threshold": "1 GiB",  # a picture goes with the task that edits it
    "distributed.scheduler.allowed-failures": TRIES - 1,
}

for module in (servers, worker):
    cloudpickle.register_pickle_by_value(module)


def add_farm(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--servers", nargs="+", metavar="URL", help=f"one a worker; default: {OWN} as a worker sees it")
    parser.add_argument("--scheduler", metavar="ADDRESS", help="of a Dask cluster, whose workers do it")
    parser.add_argument("--start", metavar="COMMAND", help="starts a worker's server; fills in {port} and {worker}")
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="here, with --start (default: %(default)s)")


@contextmanager
def farm(workflow: Prompt, arguments: argparse.Namespace) -> Iterator[Farm]:
    """The servers that `arguments`, those of add_farm, tell of. Raises ValueError where they contradict one another."""
    urls, command = arguments.servers, arguments.start
    if urls and command:
        raise ValueError("--servers are running already and --start starts others: give one of the two")
    if command and "{port}" not in command:
        raise ValueError(f"--start has no {{port}}, by which its servers are found: {command}")
    with dask.config.set(OF_DASK), scheduler(arguments) as client:
        print(f"Dask's dashboard: {client.dashboard_link}", flush=True)
        if command:
            client.register_plugin(Starting(command))
        try:
            yield Farm(client, workflow, urls, bool(command))
        finally:
            if command:
                client.unregister_worker_plugin(Starting.name)


@contextmanager
def scheduler(arguments: argparse.Namespace) -> Iterator[Client]:
    if arguments.scheduler:
        try:
            client = Client(arguments.scheduler)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"--scheduler {arguments.scheduler} is no scheduler of Dask that answers: {error}"
            ) from error
        with client:
            yield client
        return
    count = arguments.workers if arguments.start else len(arguments.servers or [OWN])
    # Threads are enough for workers that wait for their servers.
    options = {"processes": False, "threads_per_worker": 1, "memory_limit": 0, "silence_logs": logging.CRITICAL}
    with LocalCluster(n_workers=count, dashboard_address=":0", **options) as cluster, Client(cluster) as client:
        yield client


class Farm:
    """Workers of Dask with a ComfyUI server each: one of `urls`, one that the worker started, or its machine's own.

    found: the URL of each worker's server, by the worker's address.
    """

    def __init__(self, client: Client, workflow: Prompt, urls: Sequence[str] | None, starting: bool) -> None:
        self.client = client
        self.workflow = workflow
        self.free = deque(urls or ())
        self.given = urls is not None
        self.starting = starting
        self.found: dict[str, str] = {}
        self.unfit: set[str] = set()
        self.gone = False

    def muster(self) -> list[str]:
        """Takes in workers that have come and lets go of those that went; a sentence for each server that is no use."""
        present = self.present()
        for address in self.found.keys() - present:
            self.gone = True
            self.free.append(self.found.pop(address))  # another worker may use its server
        checks = {}
        for address in sorted(present - self.found.keys() - self.unfit):
            if not self.given or self.free:
                self.found[address] = self.free.popleft() if self.given else self.own(address)
                checks[address] = self.submit([address], check, self.workflow)
        faults = []
        for address, future in checks.items():
            while not first_done([future]) and address in self.present():
                pass
            outcome, value = future.result() if future.done() else (DONE, None)  # it went, as the next muster finds
            if outcome != DONE:
                faults.append(value[1] if outcome == LOST else value)
                self.dismiss(address)
        return faults

    def present(self) -> set[str]:
        return set(self.client.scheduler_info(n_workers=-1)["workers"])

    def comes(self) -> bool:
        """Whether a worker comes in the place of those that are gone, and a server is left for it."""
        present = self.present()
        if (present and not self.gone) or (self.given and not self.free):
            return False
        try:
            self.client.wait_for_workers(len(self.unfit & present) + 1, timeout=GRACE)
        except TimeoutError:
            return False
        return True

    def own(self, address: str) -> str:
        return self.client.run(started_url, workers=[address])[address] if self.starting else OWN

    def dismiss(self, address: str) -> None:
        """Gives the worker no more work."""
        del self.found[address]
        self.unfit.add(address)

    def submit(self, addresses: Sequence[str], run: Callable[..., Any], *args: Any) -> Future:
        """`run` with the server of one of the workers and with `args`; the future is that of attempt."""
        urls = {address: self.found[address] for address in addresses}

        # A closure, since Dask pickles what it can by reference to modules, which workers lack.
        def task() -> tuple[str, Any]:
            return attempt(urls, run, *args)

        return self.client.submit(task, workers=list(addresses), pure=False)


def spread(
    work: Sequence[Work], farm: Farm, load: Callable[[Work], Sequence[Any]], run: Callable[..., Any]
) -> Iterator[tuple[Work | None, Any, str]]:
    """Yields each piece as soon as it is done, with what `run` gave or with the sentence why there is nothing.

    None in a piece's place comes with the sentence of a lost server. `run` is called on a worker, with its server and
    with what `load` gives of the piece here; a piece whose server or worker ends goes to another one.
    """
    waiting = deque((piece, 1) for piece in work)
    running: dict[Future, tuple[Work, int, set[str]]] = {}
    while waiting or running:
        for fault in farm.muster():
            yield None, None, fault
        if not farm.found and not farm.comes():
            break
        for future, (piece, tries, addresses) in list(running.items()):
            if not addresses & farm.found.keys():  # it would wait for workers that have gone
                future.cancel()
                del running[future]
                if tries < TRIES:
                    waiting.appendleft((piece, tries + 1))
                else:
                    yield piece, None, ENDED
        while farm.found and waiting and len(running) < len(farm.found):
            piece, tries = waiting.popleft()
            try:
                loaded = load(piece)
            except (OSError, ValueError) as fault:
                yield piece, None, str(fault)
                continue
            addresses = sorted(farm.found)
            running[farm.submit(addresses, run, *loaded)] = (piece, tries, set(addresses))
        for future in first_done(list(running)):
            piece, tries, _ = running.pop(future)
            try:
                outcome, value = future.result()
            except KilledWorker:
                yield piece, None, ENDED
                continue
            if outcome == DONE:
                yield piece, value, ""
            elif outcome != LOST:
                yield piece, None, value
            else:
                address, sentence = value
                if address in farm.found:  # another piece may have told
                    farm.dismiss(address)
                    yield None, None, sentence
                if tries < TRIES:
                    waiting.appendleft((piece, tries + 1))
                else:
                    yield piece, None, ENDED
    for piece, *_ in (*running.values(), *waiting):
        yield piece, None, "no server is left"


def first_done(futures: Sequence[Future]) -> list[Future]:
    """Those that are done as soon as one is; none when it is time to look at the workers again."""
    if not futures:
        return []
    try:
        return list(wait(futures, timeout=LOOK, return_when="FIRST_COMPLETED").done)
    except TimeoutError:
        return []
