"""Pieces of work on several ComfyUI servers: one at a time on each, whatever becomes of single pieces and servers."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from .servers import Refused, Server, Unusable

Work = TypeVar("Work")
TRIES = 3  # of a piece whose server ends over it


def usable(urls: Sequence[str], workflow: dict) -> tuple[list[Server], list[str]]:
    """The servers that can run the workflow, and a sentence for each other one."""
    found, faults = [], []
    for url in urls:
        server = Server(url)
        try:
            server.check(workflow)
        except (Unusable, Refused, ValueError) as fault:
            faults.append(str(fault))
        else:
            found.append(server)
    return found, faults


def spread(
    work: Sequence[Work], servers: Sequence[Server], run: Callable[[Server, Work], None]
) -> Iterator[tuple[Work | None, str]]:
    """Yields each piece as soon as it is done, with "" or the sentence why it is not; None with that of a lost server.

    A piece whose server ends goes to another one.
    """
    waiting, done = queue.Queue(), queue.Queue()
    for piece in work:
        waiting.put((piece, 1))
    left = len(work)

    def serve(server: Server) -> None:
        while True:
            piece, tries = waiting.get()
            try:
                run(server, piece)
            except Unusable as fault:
                done.put((None, str(fault)))
                if tries < TRIES:
                    waiting.put((piece, tries + 1))
                else:
                    done.put((piece, f"{TRIES} servers ended over it"))
                done.put((None, ""))  # this one takes no more
                return
            except (Refused, ValueError, OSError) as fault:
                done.put((piece, str(fault)))
            else:
                done.put((piece, ""))

    for server in servers:
        threading.Thread(target=serve, args=(server,), daemon=True).start()
    alive = len(servers)
    while left and alive:
        piece, fault = done.get()
        if piece is None and not fault:
            alive -= 1
            continue
        left -= piece is not None
        yield piece, fault
    while not waiting.empty() and left:
        yield waiting.get()[0], "no server is left"
        left -= 1
