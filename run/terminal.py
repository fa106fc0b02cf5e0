"""What a terminal or a pipe can show: nothing that only reports may end a program."""

import codecs
import os
import sys
from typing import Any

# Written in the place of what an output's encoding lacks
ASCII = {
    "→": "->", "…": "...", "—": "-", "–": "-", "−": "-", "×": "x", "·": "*", "≥": ">=", "≤": "<=", "±": "+-",
    "⟦": "[[", "⟧": "]]", "─": "-", "█": "#", "π": "pi", "μ": "mu", "‖": "|", "“": '"', "”": '"',
}


def _replace(error: UnicodeError) -> tuple[str | bytes, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end]
    return "".join(ASCII.get(c, c.encode("ascii", "backslashreplace").decode()) for c in text), error.end


codecs.register_error("ballast", _replace)


def make_printable() -> None:
    """Let standard output and error take every character, whatever their encoding (PYTHONIOENCODING=ascii,
    PYTHONUTF8=0, file names that are not UTF-8); standard input is read as UTF-8."""
    for stream, how in ((sys.stdout, {"errors": "ballast"}), (sys.stderr, {"errors": "ballast"}),
                        (sys.stdin, {"encoding": "utf-8", "errors": "replace"})):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(**how)  # type: ignore[union-attr]


def is_terminal(stream: Any) -> bool:
    """Whether a stream is a terminal on which lines can be drawn over (TERM=dumb cannot)."""
    return stream is not None and stream.isatty() and os.environ.get("TERM") != "dumb"


def has_colour(stream: Any) -> bool:
    """Whether to write colours: on a terminal, unless NO_COLOR is set (no-color.org)."""
    return is_terminal(stream) and not os.environ.get("NO_COLOR")
