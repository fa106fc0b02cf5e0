"""Our programs, each in a process of its own, begun in a moment: a server that has imported everything forks
for every run, where a new interpreter takes five seconds to import torch. It is started with the first
run; a run sees nothing of the process of the tests.
"""

import functools
import multiprocessing
import multiprocessing.forkserver
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
context = multiprocessing.get_context("forkserver")


@functools.cache
def _start_server() -> None:
    """With the paths of our modules: the server imports before it is told sys.path."""
    context.set_forkserver_preload(
        [
            "sft",
            "grpo",
            "ebft",
            "health.convert",
            "health.drill",
            "health.options",
            "health.report",
            "programs",
        ]
    )
    with mock.patch.dict(os.environ, PYTHONPATH=f"{ROOT}{os.pathsep}{ROOT / 'tests'}"):
        multiprocessing.forkserver.ensure_running()


def _child(script: str, arguments: list[str], environment: dict[str, str], out: str, err: str) -> None:
    for number, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY), number)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv, sys.path[0] = [script, *arguments], str(Path(script).parent)
    os.chdir(ROOT)
    if script.endswith(".py"):
        runpy.run_path(script, run_name="__main__")
    else:
        sys.path[0] = str(ROOT)
        runpy.run_module(script, run_name="__main__", alter_sys=True)


def run_forked(script: str | Path, *arguments: str, timeout: float) -> subprocess.CompletedProcess:
    """The finished run of a script of ours, or of a module (python -m), as subprocess.run with text would
    give it."""
    _start_server()
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        out.touch()
        err.touch()
        given = (str(script), list(arguments), dict(os.environ), str(out), str(err))
        child = context.Process(target=_child, args=given)
        child.start()
        child.join(timeout)
        if child.exitcode is None:
            child.kill()
            child.join()
            raise subprocess.TimeoutExpired(
                [str(script), *arguments], timeout, out.read_text(), err.read_text()
            )
        said = (path.read_text(encoding="utf-8", errors="replace") for path in (out, err))
        return subprocess.CompletedProcess([str(script), *arguments], child.exitcode, *said)
