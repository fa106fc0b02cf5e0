"""Kill, fill, cut and confuse: every way in which a run can be stopped, and what was lost.

    python bench/crash.py --kills 6      what CI runs, a few minutes
    python bench/crash.py --kills 50     the whole proof, about half an hour on two cores

Each trial stops a tiny run in one way, lets the same command go on, and compares everything that it wrote
(weights, metrics, rollouts) byte for byte with a run that nothing disturbed; only what a clock or the memory
measured may differ. Half of the kills come at a random moment, half within a few milliseconds of a save. The
trials with a disk that fills up or cannot be written need root (they mount a small tmpfs) and say so where
they cannot run. Prints a table; exit code 1 where anything was lost.
"""

import argparse
import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from health import drill
from health.doctor import MEASURED

RECIPES = ("sft", "grpo", "ebft")
STEPS = {"sft": 48, "grpo": 16, "ebft": 16}
NOT_COMPARED = {"run.log", "stdout", "stderr", ".lock", "config.yaml"}  # they tell of the restarts
PATIENCE = 300  # seconds for a run of a few


class Lost(Exception):
    """Something that a run had written, or should have, is not there."""


def options(base: str, out: Path, **more) -> dict:
    steps = STEPS[base]
    return {"output_dir": str(out), "seed": 7, "max_steps": steps, "save_steps": steps // 8, **more}


def written(out: Path) -> dict[str, bytes | list]:
    """What a run has made, by file."""
    found: dict[str, bytes | list] = {}
    for path in sorted(out.rglob("*")):
        name = str(path.relative_to(out))
        if path.is_dir() or path.name in NOT_COMPARED or name.startswith(("checkpoints", "tensorboard")):
            continue
        found[name] = path.read_bytes()
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    found["metrics.jsonl"] = [{k: v for k, v in row.items() if not MEASURED.search(k)} for row in lines]
    return found


def compare(out: Path, undisturbed: Path) -> None:
    a, b = written(out), written(undisturbed)
    if a.keys() != b.keys():
        raise Lost(f"{out.name}: other files: {sorted(a.keys() ^ b.keys())[:5]}")
    for name, value in a.items():
        if value != b[name]:
            raise Lost(f"{out.name}: {name} differs from the undisturbed run's")
    left = [p.name for p in out.glob("**/.*") if p.name.startswith((".step", ".final"))]
    if left:
        raise Lost(f"{out.name}: left behind {left}")


def ended(child, out: Path, code: int = 0) -> drill.Outcome:
    child.join(PATIENCE)
    if child.exitcode is None:
        child.kill()
        raise Lost(f"{out.name}: hangs")
    done = drill.outcome(out, child.exitcode)
    if done.code != code:
        raise Lost(f"{out.name}: exit code {done.code}, not {code}: {done.said()[:150]}")
    return done


def undisturbed(root: Path, base: str) -> Path:
    return root / "crash" / f"{base}-undisturbed"


def finish(root: Path, base: str, out: Path) -> drill.Outcome:
    """The same command again, to its end, and nothing is missing."""
    done = ended(drill.start(root, base, options(base, out)), out)
    compare(out, undisturbed(root, base))
    return done


def as_a_user(root: Path, base: str, out: Path) -> subprocess.CompletedProcess:
    """The command itself, in a new interpreter; of one thread like the others: two sum in another order."""
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    program = Path(__file__).resolve().parent.parent / f"{base}.py"
    command = [sys.executable, str(program), *drill.arguments(root, base, options(base, out))]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=PATIENCE, env=env)


def wait_for(out: Path, child, pattern: str) -> None:
    end = time.monotonic() + PATIENCE
    while child.is_alive() and not list(out.glob(pattern)) and time.monotonic() < end:
        time.sleep(0.001)


def log_of(out: Path) -> str:
    return (out / "run.log").read_text(encoding="utf-8")


# ------------------------------------------------------------------------------------------------------------
# Trials: each returns how many faults it has tried
# ------------------------------------------------------------------------------------------------------------


def kills(root: Path, base: str, out: Path, seed: int, wanted: int = 3) -> int:
    """kill -9, several times in one run where it lives long enough."""
    rng = random.Random(seed)
    whole = float((root / "crash" / f"{base}-seconds").read_text())
    hit = 0
    for _ in range(4 * wanted):
        if hit == wanted:
            break
        child = drill.start(root, base, options(base, out))
        if rng.random() < 0.5:
            time.sleep(rng.uniform(0.1, whole * 0.7))
        else:
            saves = ["checkpoints/.step-*", "checkpoints/.step-*/*.distcp", ".final*"]
            wait_for(out, child, rng.choice(saves))
            time.sleep(rng.uniform(0, 0.03))
        if child.is_alive():
            hit += 1
            child.kill()
            child.join()
        else:  # done before it was hit: the next run begins afresh
            ended(child, out)
            compare(out, undisturbed(root, base))
            shutil.rmtree(out)
    finish(root, base, out)
    return hit


def terminated(root: Path, base: str, out: Path, seed: int) -> int:
    """SIGTERM: saved, exit code 0, and on."""
    child = drill.start(root, base, options(base, out, save_steps=None))
    wait_for(out, child, "metrics.jsonl")
    time.sleep(random.Random(seed).uniform(0, 0.5))
    os.kill(child.pid, signal.SIGTERM)
    ended(child, out)
    if "stopped by a signal" not in log_of(out):
        raise Lost(f"{out.name}: SIGTERM was not answered")
    finish(root, base, out)
    return 1


def interrupted_twice(root: Path, base: str, out: Path, seed: int) -> int:
    """SIGINT twice: at once."""
    child = drill.start(root, base, options(base, out))
    wait_for(out, child, "checkpoints/step-*")
    for _ in range(2):
        os.kill(child.pid, signal.SIGINT)
        time.sleep(0.01)
    child.join(PATIENCE)
    if child.exitcode not in (0, 130):  # 0: it was done with its step between the two
        raise Lost(f"{out.name}: exit code {child.exitcode}, not 130")
    finish(root, base, out)
    return 1


def damaged(root: Path, base: str, out: Path, seed: int) -> int:
    """The newest checkpoint with a bit flipped, or cut off: the one before it is used, and that is said."""
    rng = random.Random(seed)
    child = drill.start(root, base, options(base, out))
    wait_for(out, child, "checkpoints/step-*")
    wait_for(out, child, f"checkpoints/step-{STEPS[base] // 8 * 3}")
    child.kill()
    child.join()
    newest = max((out / "checkpoints").glob("step-*"), key=lambda p: int(p.name.removeprefix("step-")))
    victim = rng.choice(sorted(newest.iterdir()))
    raw = bytearray(victim.read_bytes())
    if rng.random() < 0.5:
        raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
    else:
        raw = raw[: rng.randrange(len(raw))]
    victim.write_bytes(raw)
    before = len(log_of(out))
    finish(root, base, out)
    said = log_of(out)[before:]
    harmless = victim.name == "checksums.json" and "is damaged" not in said  # a flipped blank
    if f"{newest.name} is damaged" not in said and not harmless:
        raise Lost(f"{out.name}: damage to {victim.name} was not said")
    if not harmless and not (newest.parent / f"damaged-{newest.name}").exists():
        raise Lost(f"{out.name}: the damaged checkpoint was thrown away")
    return 1


def in_one_directory(root: Path, base: str, out: Path, seed: int) -> int:
    """A second run in the same output_dir is refused, and the first does not notice."""
    first = drill.start(root, base, options(base, out))
    wait_for(out, first, "metrics.jsonl")
    os.kill(first.pid, signal.SIGSTOP)  # it must not be done before the second has come
    try:
        second = as_a_user(root, base, out)
    finally:
        os.kill(first.pid, signal.SIGCONT)
    if second.returncode != 2 or "in use by another run" not in second.stderr:
        raise Lost(f"{out.name}: two runs in one directory: {second.stderr[-200:]}")
    ended(first, out)
    compare(out, undisturbed(root, base))
    return 1


JUMPS = """
import random, time
now, jump = time.time, random.Random(1)
time.time = lambda: now() + jump.choice([-86400.0, 0.0, 3600.0, 86400.0])
"""


def clock_jumps(root: Path, base: str, out: Path, seed: int) -> int:
    """The wall clock jumps by hours and days at every look."""
    ended(drill.start(root, base, options(base, out), patch=JUMPS), out)
    compare(out, undisturbed(root, base))
    return 1


@contextlib.contextmanager
def small_disk(place: Path, flags: str) -> Iterator[Callable[[str], None]]:
    """A tmpfs at `place`, and a function that mounts it with other flags."""

    def mount(*options: str) -> None:
        subprocess.run(["mount", *options, str(place)], check=True, capture_output=True)

    place.mkdir(parents=True, exist_ok=True)
    mount("-t", "tmpfs", "-o", flags, "none")
    try:
        yield lambda other: mount("-o", f"remount,{other}")
    finally:
        subprocess.run(["umount", str(place)], check=True, capture_output=True)


def can_mount(root: Path) -> bool:
    """Root in a container may not mount either."""
    try:
        with small_disk(root / "mount", "size=1m"):
            return True
    except (OSError, subprocess.CalledProcessError):
        return False


def refused(root: Path, base: str, out: Path, words: str) -> None:
    """The command ends with exit code 2 and a line with these words, no traceback."""
    done = as_a_user(root, base, out)
    if done.returncode != 2 or not re.search(words, done.stderr) or "Traceback" in done.stderr:
        raise Lost(f"{out.name}: exit code {done.returncode}, not 2 with {words!r}: {done.stderr[-200:]}")


def full_disk(root: Path, base: str, out: Path, seed: int) -> int:
    """The disk fills up in the middle: one line, exit code 2; with room, the same command continues."""
    whole = sum(p.stat().st_size for p in undisturbed(root, base).rglob("*") if p.is_file())
    room = int(random.Random(seed).uniform(0.3, 0.8) * whole)
    with small_disk(out, f"size={room}") as remount:
        refused(root, base, out, "No space left|free disk space|disk is full")
        remount("size=200m")
        finish(root, base, out)
    return 1


def read_only(root: Path, base: str, out: Path, seed: int) -> int:
    """output_dir turns read-only in the middle, as a failing disk does."""
    with small_disk(out, "size=200m") as remount:
        child = drill.start(root, base, options(base, out))
        wait_for(out, child, "checkpoints/step-*")
        child.kill()
        child.join()
        remount("ro")
        refused(root, base, out, "cannot be written")
        remount("rw")
        finish(root, base, out)
    return 1


# ------------------------------------------------------------------------------------------------------------


def reference(root: Path, base: str) -> None:
    out = undisturbed(root, base)
    shutil.rmtree(out, ignore_errors=True)
    begun = time.monotonic()
    ended(drill.start(root, base, options(base, out)), out)
    (out.parent / f"{base}-seconds").write_text(f"{time.monotonic() - begun:.3f}")


def trial(root: Path, base: str, name: str, seed: int) -> tuple[int, str]:
    """(faults tried, what was lost)."""
    out = root / "crash" / f"{base}-{name}-{seed}"
    shutil.rmtree(out, ignore_errors=True)
    try:
        return FAULTS[name](root, base, out, seed), ""
    except Lost as error:
        return 1, str(error)
    except Exception:
        return 1, traceback.format_exc()


FAULTS: dict[str, Callable[[Path, str, Path, int], int]] = {
    "kill -9": kills, "SIGTERM": terminated, "SIGINT twice": interrupted_twice,
    "checkpoint damaged": damaged, "two runs in one directory": in_one_directory,
    "clock jumps": clock_jumps, "disk full": full_disk, "disk read-only": read_only,
}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=6, help="kill -9 of each recipe")
    parser.add_argument("--others", type=int, default=2, help="trials of each other fault and recipe")
    parser.add_argument("--only", nargs="+", choices=list(FAULTS))
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES), choices=RECIPES)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--root", type=Path, default=Path("outputs/drills"))
    given = parser.parse_args()
    place = given.root.absolute()
    drill.prepare(place)
    for _ in drill.in_parallel(reference, [(place, base) for base in given.recipes], given.jobs):
        pass
    wanted, mounting = [], can_mount(place)
    for fault in given.only or FAULTS:
        if fault.startswith("disk") and not mounting:
            print(f"{fault}: not tried, no tmpfs can be mounted here (it needs root)")
            continue
        for base in given.recipes:
            count = -(-given.kills // 3) if fault == "kill -9" else given.others
            wanted += [(place, base, fault, seed) for seed in range(count)]
    table = {(fault, base): [0, 0] for _, base, fault, _ in wanted}
    for (_, base, fault, _), (tried, lost) in drill.in_parallel(trial, wanted, given.jobs):
        table[fault, base][0] += tried
        table[fault, base][1] += bool(lost)
        if lost:
            print(f"LOST: {lost}", flush=True)
    print(f"{'fault':<28}{'recipe':<8}{'tried':>6}{'survived':>10}{'lost':>6}")
    for (fault, base), (tried, bad) in table.items():
        print(f"{fault:<28}{base:<8}{tried:>6}{tried - bad:>10}{bad:>6}")
    sys.exit(1 if any(bad for _, bad in table.values()) else 0)
