"""A test run that is told to end leaves nothing behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
WAITING = """
import time
from pathlib import Path

def test_waits(server):
    Path("pid").write_text(str(server.process.pid))
    time.sleep(600)
"""


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="Windows ends a process without telling it")
@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_run_that_is_told_to_end_takes_its_server_along(workers: str, tmp_path: Path) -> None:
    (tmp_path / "test_inner.py").write_text(WAITING)
    path = os.pathsep.join([str(TESTS), str(TESTS.parent / "tools"), os.environ["PYTHONPATH"]])
    program = f"import pytest; raise SystemExit(pytest.main(['-p', 'conftest', '-n', '{workers}', 'test_inner.py']))"
    command = [sys.executable, "-c", program]
    pid_file = tmp_path / "pid"
    with subprocess.Popen(command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": path}) as run:
        try:
            while run.poll() is None and not (pid_file.exists() and pid_file.read_text()):
                time.sleep(0.2)
            server = int(pid_file.read_text())
            assert is_running(server)
        finally:
            run.terminate()
    assert run.returncode == 128 + signal.SIGTERM
    assert not is_running(server)
