"""The installed commands: each runs its file as `python FILE` does in a clone, with the folder of the sources
first on the path. So `ballast` is the only name that other packages meet.
"""

import runpy
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
SOURCE = HERE / "source" if (HERE / "source").is_dir() else HERE.parent  # of a clone (pip install -e)


def start(file: str) -> None:
    sys.path.insert(0, str(SOURCE))
    runpy.run_path(str(SOURCE / file), run_name="__main__")


def sft() -> None:
    start("sft.py")


def grpo() -> None:
    start("grpo.py")


def ebft() -> None:
    start("ebft.py")


def data() -> None:
    start("data.py")


def model() -> None:
    start("model.py")


def health() -> None:
    start("health/__main__.py")
