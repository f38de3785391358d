"""Jobs of a workflow as forks of the tests' process, which has imported what each would import.

Snakemake plans, starts and waits as ever, with the Snakefile's command lines. Only its `python` is
another: it hands `python -m circuit.cli.job ...` to this process, which forks, and is the real one
for everything else. That saves five seconds of processor time a job.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread

from circuit.cli.job import run_commands

from circuit.pipelines.jobs import split_commands

PYTHON = """#!{python} -IS
import json, os, socket, sys
if sys.argv[1:3] != ["-m", "circuit.cli.job"]:
    os.execv({python!r}, [sys.argv[0], *sys.argv[1:]])
with socket.socket(socket.AF_UNIX) as tests:
    tests.connect({address!r})
    line = json.dumps([os.getcwd(), sys.argv[3:]]) + "\\n"
    socket.send_fds(tests, [line[:1].encode()], [1, 2])
    tests.sendall(line[1:].encode())
    sys.exit(tests.recv(1)[0])
"""


@contextmanager
def warm_python() -> Iterator[str]:
    """The path of that python, in an environment with the packages of this one."""
    with (
        tempfile.TemporaryDirectory() as folder,
        socket.socket(socket.AF_UNIX) as listener,
    ):
        address, python = f"{folder}/tests", Path(folder, "bin", "python")
        python.parent.mkdir()
        python.write_text(PYTHON.format(python=sys.executable, address=address))
        python.chmod(0o755)
        for name in ("pyvenv.cfg", "lib"):
            if Path(sys.prefix, name).exists():
                Path(folder, name).symlink_to(Path(sys.prefix, name))
        listener.bind(address)
        listener.listen()
        Thread(target=_answer, args=(listener,), daemon=True).start()
        yield str(python)
        listener.shutdown(socket.SHUT_RDWR)


def _answer(listener: socket.socket) -> None:
    while True:
        try:
            caller, _ = listener.accept()
        except OSError:  # shut down
            return
        first, outputs, *_ = socket.recv_fds(caller, 1, 2)
        with caller.makefile("rb") as rest:
            folder, words = json.loads(first + rest.readline())
        child = os.fork()
        if not child:
            _work(folder, words, outputs)
        for output in outputs:
            os.close(output)
        Thread(target=_tell, args=(caller, child), daemon=True).start()


def _work(folder: str, words: list[str], outputs: list[int]) -> None:
    code = 1
    try:
        for number, output in enumerate(outputs, start=1):
            os.dup2(output, number)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        os.chdir(folder)
        code = run_commands(split_commands(words))
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
