"""A program as forks of the tests' process, which has imported what each would import.

Whoever starts the program starts a small script, which hands its words, folder, variables and
open files to this process; that forks, and the script ends with the fork's exit code. A signal to
the script is one to the fork, and the fork ends with the script. It saves the imports: half a
second of processor time for a line of completion, ten for a job of a workflow, a kernel of a
notebook, or a worker.
"""

from __future__ import annotations

import fcntl
import json
import os
import runpy
import signal
import socket
import sys
import tempfile
import traceback
import types
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Thread

Work = Callable[[list[str]], int]
"""Does what the words after the program's name say; the exit code."""

SCRIPT = """#!{python} -IS
import json, os, signal, socket, sys
{first}
files = [int(n) for n in os.listdir("/dev/fd") if os.path.exists(f"/dev/fd/{{n}}")]
with socket.socket(socket.AF_UNIX) as tests:
    tests.connect({address!r})
    line = json.dumps([os.getcwd(), dict(os.environ), sys.argv[1:], files]) + "\\n"
    socket.send_fds(tests, [line[:1].encode()], files)
    tests.sendall(line[1:].encode())
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: tests.send(bytes([number])))
    sys.exit(tests.recv(1)[0])
"""
MOST = 64
"""Files that the script may hand over."""


@contextmanager
def warm_program(program: Path, work: Work, first: str = "") -> Iterator[None]:
    """Within the block `program` is there, and does that work; it begins with lines of its own."""
    with (
        tempfile.TemporaryDirectory() as folder,
        socket.socket(socket.AF_UNIX) as listener,
    ):
        address = f"{folder}/tests"
        program.parent.mkdir(parents=True, exist_ok=True)
        program.write_text(SCRIPT.format(python=sys.executable, address=address, first=first))
        program.chmod(0o755)
        listener.bind(address)
        listener.listen()
        Thread(target=_answer, args=(listener, work), daemon=True).start()
        yield
        listener.shutdown(socket.SHUT_RDWR)


@contextmanager
def warm_python(work: Work | None = None, first: str = "") -> Iterator[str]:
    """The path of a python, in an environment with the packages of this one, that does that work.

    By default it is `python -m MODULE` and `python -c CODE`.
    """
    with tempfile.TemporaryDirectory() as folder:
        for name in ("pyvenv.cfg", "lib"):
            if Path(sys.prefix, name).exists():
                Path(folder, name).symlink_to(Path(sys.prefix, name))
        python = Path(folder, "bin", "python")
        with warm_program(python, work or _as_python, first):
            yield str(python)


def _as_python(words: list[str]) -> int:
    """Runs a module, or a line of code, as a new interpreter's first one."""
    warnings.resetwarnings()  # pytest's make errors of them
    warnings.simplefilter("ignore")
    at = next(i for i, word in enumerate(words) if word in ("-m", "-c"))
    kind, what, *rest = words[at:]
    sys.argv, sys.modules["__main__"] = [kind, *rest], types.ModuleType("__main__")
    try:
        if kind == "-m":
            runpy.run_module(what, run_name="__main__", alter_sys=True)
        else:
            exec(what, sys.modules["__main__"].__dict__)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


def _answer(listener: socket.socket, work: Work) -> None:
    while True:
        try:
            caller, _ = listener.accept()
        except OSError:  # shut down
            return
        message, received, *_ = socket.recv_fds(caller, 1, MOST)
        with caller.makefile("rb") as rest:
            folder, variables, words, numbers = json.loads(message + rest.readline())
        child = os.fork()
        if not child:
            _take(received, numbers)
            _work(folder, variables, words, work)
        for file in received:
            os.close(file)
        ended: list[int] = []
        Thread(target=_tell, args=(caller, child, ended), daemon=True).start()
        Thread(target=_pass_on, args=(caller, child, ended), daemon=True).start()


def _take(received: list[int], numbers: list[int]) -> None:
    """Gives files the numbers that they had where they come from, by which words may name them."""
    aside = [fcntl.fcntl(file, fcntl.F_DUPFD, 1000) for file in received]
    for file, number in zip(aside, numbers, strict=True):
        os.dup2(file, number)
        os.close(file)


def _work(folder: str, variables: dict[str, str], words: list[str], work: Work) -> None:
    code = 1
    try:
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(variables)
        code = work(words)
    except BaseException:
        traceback.print_exc()  # the fork ends before anybody could
        raise
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _tell(caller: socket.socket, child: int, ended: list[int]) -> None:
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    ended.append(code)
    with suppress(OSError):  # the script is gone
        caller.sendall(bytes([code if code >= 0 else 1]))


def _pass_on(caller: socket.socket, child: int, ended: list[int]) -> None:
    """Sends the fork each signal that the script got, and the last one when it is gone."""
    number = 0
    with caller, suppress(OSError):  # either is gone
        while number != signal.SIGKILL:
            number = (caller.recv(1) or bytes([signal.SIGKILL]))[0]
            if not ended:
                os.kill(child, number)
