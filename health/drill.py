"""Deliberate failures: each file in drills/ breaks a tiny run in one way, and states the expected symptom and
the fix. `python -m health drill NAME` shows all three in about a minute; `drill all` prints a table.

A drill changes options of a healthy run (drills/base), or adds a few lines of Python (`patch`) that run in
the broken process before the recipe: the recipes contain nothing about drills. The data are generated here:
copy three letters, a task that 100,000 weights learn in seconds.
"""

import hashlib
import importlib
import json
import multiprocessing
import os
import random
import re
import shutil
import string
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any, TypeVar

import torch
import yaml

from run.config import ConfigError, parse_config
from run.files import write_atomically

T = TypeVar("T")
HERE = Path(__file__).resolve().parent.parent / "drills"
FIXED = "fixed"  # cached outcomes of fixed runs, shared by drills with the same fixed run


@dataclass
class Drill:
    name: str
    breaks: str  # what, in a sentence
    why: str  # the mechanism
    theme: str  # its section of docs/stability.md
    sees: dict[str, Any]  # {rule: …, within: steps} or {error: a regular expression}
    fix: dict[str, Any]  # the options that fix it
    code: str  # module.name: where it is prevented, or caught
    base: str = "sft"
    options: dict[str, Any] = field(default_factory=dict)
    patch: str = ""
    keep_patch: bool = False  # the fix is an option; otherwise the fix is to remove the patch
    processes: int = 1

    @property
    def checkpoints(self) -> list[str]:
        """The checkpoints that the drill starts from; SFT drills need none."""
        named = Path(str(self.options.get("base_model", "../checkpoint/final"))).parent.name
        return [] if self.base == "sft" else [named]

    @staticmethod
    def read(name: str) -> "Drill":
        if name not in names():  # its patch is executed: only files in drills/ are allowed
            raise ConfigError("drill", name, f"is not a drill; there are {', '.join(names())}")
        return Drill(name=name, **yaml.safe_load((HERE / f"{name}.yaml").read_text(encoding="utf-8")))


@dataclass
class Outcome:
    """How a run ended: the first broken rule, all broken rules, and the error, if any."""

    code: int
    first: str = ""  # rule
    step: int = 0
    line: str = ""
    rules: list[str] = field(default_factory=list)
    error: str = ""
    seconds: float = 0.0
    place: str = ""  # its output_dir

    def shows(self, sees: dict[str, Any]) -> bool:
        if "error" in sees:
            return self.code == 2 and re.search(sees["error"], self.error) is not None
        return self.code == 0 and self.first == sees["rule"] and self.step <= sees["within"]

    @property
    def well(self) -> bool:
        return self.code == 0 and not self.rules

    def said(self) -> str:
        return self.error.removeprefix("error: ") if self.error else self.line or "well from beginning to end"


def names() -> list[str]:
    return sorted(p.stem for p in HERE.glob("*.yaml"))


CHECKPOINTS = {"checkpoint": "letters", "wordy_checkpoint": "uneven"}  # for RL drills: name → its data


def prepare(root: Path, checkpoints: Collection[str] = tuple(CHECKPOINTS)) -> None:
    """Create data, model, base configs and these checkpoints in `root`, unless they exist."""

    def rows(count: int, seed: int, right: float) -> str:
        rng, lines = random.Random(seed), []
        for _ in range(count):
            a, b, c = rng.sample(string.ascii_lowercase, 3)
            orders = [f"{a} {b} {c}", f"{c} {b} {a}", f"{b} {c} {a}", f"{c} {a} {b}"]
            answer = rng.choices(orders, [right, *[(1 - right) / 3] * 3])[0]
            turns = [{"role": "user", "content": orders[0]}, {"role": "assistant", "content": answer}]
            lines.append(json.dumps({"messages": turns}) + "\n")
        return "".join(lines)

    letters = rows(20000, 1, 0.4)
    few = letters.splitlines(keepends=True)
    noise = "".join(random.Random(5).choices(string.ascii_letters + string.digits, k=1500))
    odd, long = random.Random(6), "well " * 900
    files = {
        "letters": letters, "few_letters": rows(128, 2, 0.4), "held_out_letters": rows(200, 3, 0.4),
        "questions": rows(4000, 4, 1.0),
        "letters_and_noise": few[0].replace(json.loads(few[0])["messages"][1]["content"], noise) + letters,
        "long_questions": "".join(_after(long, r) for r in few[:200]),
        "uneven": "".join(_repeated(r, odd.choice([1, 1, 1, 2, 3, 4, 6, 8])) for r in few),
        "empty": "".join(few[:2]) + json.dumps({"messages": []}) + "\n" + "".join(few[2:]),
        "no_end.jinja": "{% for m in messages %}{{ m['role'] + ': ' + m['content'] }} {% endfor %}"
                        "{% if add_generation_prompt %}assistant: {% endif %}",
        "foreign_ids": '{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}\n'
                       '{"input_ids": [5, 151643, 7], "labels": [-100, 6, 7]}\n' * 40,
    }
    (root / "data").mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        path = root / "data" / (name if "." in name else f"{name}.jsonl")
        if not path.exists() or path.stat().st_size != len(text):
            path.write_text(text, encoding="utf-8")
    shutil.copytree(HERE / "model", root / "model", dirs_exist_ok=True)
    shutil.copytree(HERE / "base", root / "base", dirs_exist_ok=True)
    for name, rows_of in CHECKPOINTS.items():
        if name not in checkpoints or (root / name / "final").exists():
            continue
        print(f"making the {name} that RL drills begin from (once, about half a minute)", flush=True)
        data = [{"path": str(root / "data" / f"{rows_of}.jsonl"), "type": "chat"}]
        options = {"max_steps": 400, "optimizer": "muon", "output_dir": str(root / name), "datasets": data,
                   "eval_steps": 100, "logging_steps": 20}
        done = run(root, "sft", options)
        if done.code != 0:
            raise ConfigError("drill", None, f"its {name} could not be made: {done.said()}")


def _after(words: str, line: str) -> str:
    """The row with these words before its question."""
    row = json.loads(line)
    row["messages"][0]["content"] = words + row["messages"][0]["content"]
    return json.dumps(row) + "\n"


def _repeated(line: str, times: int) -> str:
    """The row with its answer repeated `times` times."""
    row = json.loads(line)
    row["messages"][1]["content"] = " ".join([row["messages"][1]["content"]] * times)
    return json.dumps(row) + "\n"


def _child(root: Path, recipe: str, arguments: list[str], patch: str, out: Path) -> None:
    """The body of the child process: run the recipe."""
    for stream, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(out / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    os.chdir(root)
    torch.set_num_threads(1)
    if patch:
        exec(compile(patch, "patch", "exec"), {"__name__": "patch"})  # noqa: S102 - from drills/ alone
    loop, module = importlib.import_module("run.loop"), importlib.import_module(recipe)
    loop.start(module.main, lambda: parse_config(module.Config, arguments))
    os._exit(0)


def run(
    root: Path, base: str, options: dict[str, Any], patch: str = "", processes: int = 1, seed: int = 42
) -> Outcome:
    """Run a base config with these options changed and return its outcome."""
    out = Path(options.get("output_dir") or root / "runs" / f"{base}-{time.monotonic_ns()}")
    shutil.rmtree(out, ignore_errors=True)
    options = {"seed": seed, **options, "output_dir": str(out)}
    begun = time.monotonic()
    if processes == 1:
        child = start(root, base, options, patch)
        child.join(600)
        if child.is_alive():
            child.kill()
        code = -1 if child.exitcode is None else child.exitcode
    else:
        out.mkdir(parents=True)
        job = json.dumps([str(root), recipe_of(base), arguments(root, base, options), patch, str(out)])
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone",
                  f"--nproc-per-node={processes}", "-m", "health", "drill-rank", job]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent)}
        with (out / "launch").open("w") as log:
            code = subprocess.run(launch, stdout=log, stderr=log, env=environment).returncode
        code = 2 if code else 0  # torchrun itself exits with 1
    return outcome(out, code, time.monotonic() - begun)


def recipe_of(base: str) -> str:
    return {"strided": "ebft"}.get(base, base)


def arguments(root: Path, base: str, options: dict[str, Any]) -> list[str]:
    """The command line of a base run with these options changed."""
    settings = [f"{key}={json.dumps(value)}" for key, value in options.items()]
    return ["--config", str(root / "base" / f"{base}.yaml"), *settings]


def start(root: Path, base: str, options: dict[str, Any], patch: str = "") -> ForkProcess:
    """Start a base run with these options in a child process, without emptying its output_dir. stdout and
    stderr go to files there."""
    return begin(root, recipe_of(base), arguments(root, base, options), Path(options["output_dir"]), patch)


def begin(root: Path, recipe: str, given: list[str], out: Path, patch: str = "") -> ForkProcess:
    """Start a recipe with this command line in a child process, in `root`; stdout and stderr go to files in
    `out`."""
    for name in ("sft", "grpo", "ebft"):  # imported once, before forking
        importlib.import_module(name)
    out.mkdir(parents=True, exist_ok=True)
    child = multiprocessing.get_context("fork").Process(
        target=_guarded, args=(root, recipe, given, patch, out)
    )
    child.start()
    return child


def _guarded(root: Path, recipe: str, arguments: list[str], patch: str, out: Path) -> None:
    try:
        _child(root, recipe, arguments, patch, out)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)


def outcome(out: Path, code: int, seconds: float = 0.0) -> Outcome:
    outcome = Outcome(code, seconds=seconds, place=str(out))
    log = out / "run.log"
    for line in log.read_text(encoding="utf-8").splitlines() if log.exists() else ():
        verdict = re.search(r" WARNING health: (?:step (\d+)|at the start): (\w+): (.*)", line)
        if verdict:
            outcome.rules.append(verdict[2])
            if not outcome.first and verdict[1]:  # a drill is about what happens, not about its settings
                outcome.step, outcome.first = int(verdict[1]), verdict[2]
                outcome.line = line.split(" WARNING ", 1)[1]
    errors = [
        p.read_text(errors="replace")
        for p in (out / "stderr", *sorted(out.glob("rank-*/stderr")))
        if p.exists()
    ]
    lines = [line for text in errors for line in text.splitlines() if line.startswith("error: ")]
    outcome.error = lines[0] if lines else ""
    if not lines and code and errors:
        outcome.error = (errors[0].strip().splitlines() or [""])[-1]
    return outcome


def attempt(name: str, root: Path, seed: int = 42) -> tuple[Drill, Outcome, Outcome]:
    """(the drill, the broken run, the fixed run)."""
    drill = Drill.read(name)

    def placed(options: dict[str, Any]) -> dict[str, Any]:
        return json.loads(json.dumps(options).replace("ROOT", str(root)))

    options = placed(drill.options)
    runs = root / "runs" / name
    broken = run(root, drill.base, {**options, "output_dir": str(runs / f"broken-{seed}")}, drill.patch,
                 drill.processes, seed)
    fixed = {**options, **placed(drill.fix)}
    patch = drill.patch if drill.keep_patch else ""
    # If the fix is to remove the patch, the fixed run is a base run that other drills share.
    key = json.dumps([drill.base, fixed, patch, drill.processes, seed], sort_keys=True)
    known = root / FIXED / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"
    if known.exists():
        after = Outcome(**json.loads(known.read_text(encoding="utf-8")))
    else:
        out = {"output_dir": str(runs / f"fixed-{seed}")}
        after = run(root, drill.base, {**fixed, **out}, patch, drill.processes, seed)
        known.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(known, json.dumps(asdict(after)))
    write_atomically(runs / f"fixed-{seed}.place", after.place)  # for scripts that plot it
    return drill, broken, after


def show(name: str, root: Path) -> bool:
    """`drill NAME`: print what breaks, the symptom and the fix; returns whether both are as expected."""
    drill = Drill.read(name)
    prepare(root, drill.checkpoints)
    print(f"{name}: {drill.breaks}\n  why    {drill.why}")
    changed = ", ".join(f"{k}: {v}" for k, v in drill.options.items())
    print(
        f"  broken {drill.base}.yaml"
        + (f" with {changed}" if changed else "")
        + (", patched" if drill.patch else "")
    )
    shutil.rmtree(root / FIXED, ignore_errors=True)
    _, broken, fixed = attempt(name, root)
    expected = drill.sees.get("rule") or f"an error: {drill.sees.get('error')}"
    print(f"  sees   {broken.said()}")
    seen = broken.shows(drill.sees)
    if not seen:
        print(f"  BUT    expected {expected} within {drill.sees.get('within', '—')} steps")
    fix = ", ".join(f"{k}: {v}" for k, v in drill.fix.items()) or "take the patch out"
    print(f"  fix    {fix}\n  then   {fixed.said()}  ({broken.seconds + fixed.seconds:.0f} s)")
    return seen and fixed.well


def in_parallel(work: Callable[..., T], wanted: Sequence[tuple], jobs: int) -> Iterator[tuple[tuple, T]]:
    """Yield (arguments, `work(*arguments)`) as they finish, from `jobs` processes of one thread each."""
    torch.set_num_threads(1)
    context = multiprocessing.get_context("fork")
    results: Any = context.Queue()

    def share(jobs: Sequence[tuple]) -> None:
        for arguments in jobs:
            try:
                results.put((arguments, work(*arguments)))
            except Exception as error:  # sent to the parent, which would wait forever
                results.put((arguments, error))

    workers = [context.Process(target=share, args=(wanted[k::jobs],)) for k in range(jobs)]
    for worker in workers:
        worker.start()
    try:
        for _ in wanted:
            arguments, result = results.get(timeout=1200)
            if isinstance(result, Exception):
                raise result
            yield arguments, result
    finally:
        for worker in workers:
            worker.terminate()  # all have finished, unless an error ended this early
            worker.join()


def show_all(
    root: Path, chosen: list[str] | None = None, seeds: tuple[int, ...] = (42,), jobs: int = 2
) -> bool:
    """`drill all`: print one line per drill, running `jobs` at a time."""
    chosen = chosen or names()
    prepare(root, {checkpoint for name in chosen for checkpoint in Drill.read(name).checkpoints})
    shutil.rmtree(root / FIXED, ignore_errors=True)
    wanted = [(name, root, seed) for name in chosen for seed in seeds]
    good = True
    print(f"{'drill':<26}{'seed':>5}  {'seen first':<28}{'step':>5}  {'fixed':<24}{'s':>4}")
    for (name, _, seed), (drill, broken, fixed) in in_parallel(attempt, wanted, jobs):
        sees = drill.sees
        right = broken.shows(sees)
        good &= right and fixed.well
        seen = "its error" if right else f"exit {broken.code}"
        seen = broken.first if "rule" in sees else seen
        seen = ("" if right else "NOT ") + (seen or "nothing")
        after = "well" if fixed.well else f"NOT WELL: {fixed.first or fixed.said()[:60]}"
        seconds = broken.seconds + fixed.seconds
        print(
            f"{name:<26}{seed:>5}  {seen:<28}{broken.step or '':>5}  {after:<24}{seconds:>4.0f}", flush=True
        )
    return good


def rank(job: str) -> None:
    """One rank of a drill on several processes, as `run` describes it."""
    output_dir, recipe_name, given, code, folder = json.loads(job)
    result_file = Path(folder) / f"rank-{os.environ['RANK']}"
    result_file.mkdir(exist_ok=True)
    _guarded(Path(output_dir), recipe_name, given, code, result_file)
