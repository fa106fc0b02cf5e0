"""The package as it is installed: one name in site-packages, and commands that run beside anything."""

import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
from test_docs import FOLDERS

from conftest import ROOT, run_program

OURS = [*FOLDERS, *(path.stem for path in ROOT.glob("*.py"))]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from the files that are part of the project."""
    directory = tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE", "ballast", "drills", *FOLDERS):
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, directory / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, directory)
    for path in ROOT.glob("*.py"):
        shutil.copy(path, directory)
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w",
         str(directory / "out"), str(directory)],
        check=True,
    )
    (made,) = (directory / "out").glob("*.whl")
    return made


def installed(wheel: Path, directory: Path, *more: str) -> Path:
    """The bin folder of an environment with the wheel, `more` from the index, and the dependencies of
    ours."""
    venv.create(directory, with_pip=True, symlinks=True)
    (packages,) = directory.glob("lib/*/site-packages")
    ours = next(path for path in sys.path if path.endswith("site-packages"))
    (packages / "dependencies.pth").write_text(f"{ours}\n")
    pip = [str(directory / "bin" / "python"), "-m", "pip", "install", "-q", "--no-deps"]
    subprocess.run([*pip, str(wheel), *more], check=True)
    return directory / "bin"


def run_alone(program: Path, *arguments: str, cwd: Path) -> subprocess.CompletedProcess:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return subprocess.run(
        [str(program), *arguments], capture_output=True, text=True, cwd=cwd, env=environment
    )


def test_the_wheel_has_one_name_and_all_that_its_commands_read(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"ballast"}
    here = {f"ballast/source/{path.relative_to(ROOT)}" for name in (*FOLDERS, "drills")
            for path in (ROOT / name).rglob("*") if path.suffix in (".py", ".yaml", ".json")}
    assert here <= set(names) and {f"ballast/source/{path.name}" for path in ROOT.glob("*.py")} <= set(names)


def test_commands_run_beside_packages_of_the_same_names_and_leave_them_alone(wheel, tmp_path):
    bin_ = installed(wheel, tmp_path / "venv")
    (packages,) = (tmp_path / "venv").glob("lib/*/site-packages")
    for name in (*OURS, "rules", "config", "memory", "report", "tokenizer"):
        (packages / f"{name}.py").write_text("THEIRS = True\n")
    for command in ("ballast-sft", "ballast-grpo", "ballast-ebft"):
        done = run_alone(bin_ / command, "--help", cwd=tmp_path)
        assert done.returncode == 0 and "base_model" in done.stdout, done.stderr
    assert run_alone(bin_ / "ballast-health", "diagnose", str(tmp_path), cwd=tmp_path).returncode == 2
    program = "import importlib; assert all(importlib.import_module(n).THEIRS for n in {!r}.split())"
    done = run_alone(bin_ / "python", "-c", program.format(" ".join(OURS)), cwd=tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow  # it asks the index
def test_commands_run_beside_the_packages_of_the_index_whose_names_were_ours(wheel, tmp_path):
    bin_ = installed(wheel, tmp_path / "venv", "rules", "config", "kernels")
    done = run_alone(bin_ / "ballast-sft", "--help", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    program = "import rules, config, kernels; assert 'site-packages' in kernels.__file__"
    assert run_alone(bin_ / "python", "-c", program, cwd=tmp_path).returncode == 0


@pytest.mark.parametrize("name", ["rewards", "memory", "config", "data", "health"])
def test_a_users_module_may_be_called_as_one_of_ours(name, tmp_path, small_checkpoint, task):
    """It is found beside the YAML, and hides nothing: the run ends with its report."""
    shutil.copy(task / "letters.py", tmp_path / f"{name}.py")
    shutil.copy(task / "rows.jsonl", tmp_path)
    (tmp_path / "c.yaml").write_text(
        f"base_model: {small_checkpoint[0]}\ndatasets: [{{path: rows.jsonl, type: chat}}]\n"
        f"reward_funcs: [{name}.spread]\nnum_generations: 4\nmicro_batch_size: 4\nmax_completion_length: 4\n"
        "max_steps: 10\nlearning_rate: 1.0e-4\n"
    )
    done = run_program(ROOT / "grpo.py", "--config", str(tmp_path / "c.yaml"), f"output_dir={tmp_path / 'o'}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "o" / "report.html").exists()
