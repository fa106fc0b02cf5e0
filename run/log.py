"""Console output of a run, and run.log."""

import contextlib
import logging
import os
import sys
import threading
import traceback
from pathlib import Path

from tqdm import tqdm

from run.config import ConfigError
from run.files import claim

log = logging.getLogger("ballast")


def start_log(output_dir: Path, main: bool) -> None:
    """Write log lines to the console and to run.log. LOG_LEVEL=DEBUG shows more on the console; the file
    always has everything."""
    name = os.environ.get("LOG_LEVEL", "INFO").upper()
    level = logging.getLevelNamesMapping().get(name)
    if level is None:
        raise ConfigError("LOG_LEVEL", name, "is not a level; use DEBUG, INFO, WARNING or ERROR")
    log.handlers.clear()
    log.setLevel(logging.DEBUG)
    log.propagate = False
    threading.excepthook = _thread_ended
    if main:
        log.addHandler(Console(level))
        claim(output_dir)
        logging.raiseExceptions = False  # a full disk ends no run because of its log
        try:
            to_file = logging.FileHandler(output_dir / "run.log", encoding="utf-8", errors="backslashreplace")
        except OSError as error:
            log.warning("run.log cannot be written (%s): the run goes without", error.strerror)
            return
        to_file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        log.addHandler(to_file)
    else:
        log.addHandler(logging.NullHandler())


def _thread_ended(what: threading.ExceptHookArgs) -> None:
    """One line where a thread of a library ends in an error, as TensorBoard's does on a full disk."""
    owner = type(what.thread).__module__.partition(".")[0] if what.thread else "threading"
    name = what.thread.name if what.thread and owner == "threading" else owner
    log.warning("%s: its thread has ended: %s", name, what.exc_value or what.exc_type.__name__)
    error = (what.exc_type, what.exc_value, what.exc_traceback)
    log.debug("%s", "".join(traceback.format_exception(*error)))


class Console(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(OSError, ValueError, AttributeError):  # a closed terminal
            tqdm.write(record.getMessage(), file=sys.stdout)  # above the progress bar, not through it
            sys.stdout.flush()
