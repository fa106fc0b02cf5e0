"""Convert every YAML file of a folder that is a config of axolotl or of a TRL trainer; count how it ended.

    python bench/convert.py DIRECTORY [--show]      --show: every refusal and everything that was lost

parses: `python -m health convert` wrote a config that its recipe reads, with nothing lost, or with losses
that the result names. refused: with the reason. failed: neither, which is a defect. Files that are no config
of a training run (deployment, accelerate, datasets) are listed as such.
"""

import argparse
import sys
import tempfile
from collections import Counter
from pathlib import Path

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import ebft
import grpo
import sft
from health.convert import CHANGED, NAMES, NESTED, STEERS, convert_file
from run.config import BallastError, parse_config

RECIPES = {"sft": sft.Config, "grpo": grpo.Config, "ebft": ebft.Config}


def keys_said(text: str) -> set[str]:
    """The options that the result holds, or that a comment of it names."""
    comments = [line for line in text.splitlines() if line.startswith("# ")]
    named = {name.split()[0] for line in comments[1:] for name in line[14:].split(":")[0].split(",") if name}
    return named | set(yaml.safe_load(text))


def outcome(file: Path, out: Path) -> tuple[str, str, list[str]]:
    """(how it ended, why, what was lost)."""
    try:
        theirs = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError):
        return "no config", "not YAML", []
    if not isinstance(theirs, dict) or not {"base_model", "model_name_or_path"} & theirs.keys():
        return "no config", "names no model", []
    try:
        text = convert_file(file, RECIPES)
    except BallastError as error:
        return "refused", str(error), []
    except Exception as error:  # a defect, which is what this program looks for
        return "failed", f"{type(error).__name__}: {error}", []
    out.write_text(text, encoding="utf-8")
    recipe = text.split("torchrun ")[1].split(".py")[0]
    try:
        parse_config(RECIPES[recipe], ["--config", str(out)])
    except BallastError as error:
        return "failed", f"does not parse: {error}", []
    blocks = [theirs[name] for name in NESTED if isinstance(theirs.get(name), dict)]
    given = {k for block in ({k: v for k, v in theirs.items() if k not in (*NESTED, "vllm")}, *blocks)
             for k, value in block.items() if value not in (None, False, "", [], {})}
    said = keys_said(text) | set(CHANGED) | STEERS
    silent = sorted(key for key in given if not {key, NAMES.get(key, key)} & said)
    if silent:
        return "failed", f"silent about {', '.join(silent)}", []
    lost = [line[14:] for line in text.splitlines() if line.startswith("# LOST")]
    return ("parses, with losses named" if lost else "parses"), recipe, lost


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--show", action="store_true", help="every refusal, loss and failure")
    arguments = parser.parse_args()
    files = sorted(f for f in arguments.directory.rglob("*") if f.suffix in (".yaml", ".yml") and f.is_file())
    if not files:
        print(f"error: {arguments.directory} holds no YAML file", file=sys.stderr)
        return 2
    counts: Counter[str] = Counter()
    losses: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        for file in files:
            ended, why, lost = outcome(file, Path(folder) / "ours.yaml")
            counts[ended] += 1
            losses.update(name.strip() for line in lost for name in line.split(":")[0].split(","))
            if ended == "refused":
                reasons[why.split(": ", 1)[0]] += 1
            if arguments.show and (ended in ("refused", "failed") or lost):
                print(f"{ended:<26} {file.relative_to(arguments.directory)}: {why}")
                for line in lost:
                    print(f"{'':<26}   LOST {line}")
    print(f"{len(files)} files")
    for ended in ("parses", "parses, with losses named", "refused", "failed", "no config"):
        print(f"  {counts[ended]:>4}  {ended}")
    for title, table in (("lost", losses), ("refused for", reasons)):
        if table:
            print(f"{title}: " + ", ".join(f"{name} {n}" for name, n in table.most_common(40)))
    return 1 if counts["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
