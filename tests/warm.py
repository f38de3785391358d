"""A program as forks of the tests' process, which has imported what each would import.

Whoever starts the program starts a small script, which hands its words, folder, variables and
outputs to this process; that forks, and the script ends with the fork's exit code. It saves the
imports: half a second of processor time for a line of completion, five for a job of a workflow.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread

Work = Callable[[list[str]], int]
"""Does what the words after the program's name say; the exit code."""

SCRIPT = """#!{python} -IS
import json, os, socket, sys
{first}
with socket.socket(socket.AF_UNIX) as tests:
    tests.connect({address!r})
    line = json.dumps([os.getcwd(), dict(os.environ), sys.argv[1:]]) + "\\n"
    socket.send_fds(tests, [line[:1].encode()], [1, 2])
    tests.sendall(line[1:].encode())
    sys.exit(tests.recv(1)[0])
"""


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


def _answer(listener: socket.socket, work: Work) -> None:
    while True:
        try:
            caller, _ = listener.accept()
        except OSError:  # shut down
            return
        message, outputs, *_ = socket.recv_fds(caller, 1, 2)
        with caller.makefile("rb") as rest:
            folder, variables, words = json.loads(message + rest.readline())
        child = os.fork()
        if not child:
            _work(folder, variables, words, outputs, work)
        for output in outputs:
            os.close(output)
        Thread(target=_tell, args=(caller, child), daemon=True).start()


def _work(
    folder: str, variables: dict[str, str], words: list[str], outputs: list[int], work: Work
) -> None:
    code = 1
    try:
        for number, output in enumerate(outputs, start=1):
            os.dup2(output, number)
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


def _tell(caller: socket.socket, child: int) -> None:
    with caller:
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        caller.sendall(bytes([code if code >= 0 else 1]))
