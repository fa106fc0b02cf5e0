"""Run a recipe and print the attribute names in the code of ours that it executed, as JSON.

    python tests/executed.py grpo key=value …

What an option's name stands in none of, no run of this kind reads.
"""

import importlib
import json
import sys
import threading
from pathlib import Path
from types import CodeType

ROOT = str(Path(__file__).resolve().parent.parent)
CHECKS = {"check", "__post_init__", "check_every_part", "refuse_unread"}  # these look at every option


def names_in(code: CodeType) -> set[str]:
    inner = [const for const in code.co_consts if isinstance(const, CodeType)]
    return set(code.co_names).union(*(names_in(part) for part in inner if part.co_name not in CHECKS))


def main() -> None:
    sys.path.insert(0, ROOT)
    from run.config import parse_config

    recipe = importlib.import_module(sys.argv[1])
    seen: set[CodeType] = set()

    def profile(frame, event, arg):
        if event == "call":
            seen.add(frame.f_code)

    config = parse_config(recipe.Config, sys.argv[2:])
    threading.setprofile(profile)
    sys.setprofile(profile)
    recipe.main(config)
    sys.setprofile(None)
    threading.setprofile(None)
    folders = ("numerics", "checkpoints", "text", "rollouts", "health", "run")
    paths = [*Path(ROOT).glob("*.py"), *(p for f in folders for p in Path(ROOT, f).glob("*.py"))]
    files = {str(path) for path in paths}
    ours = [code for code in list(seen) if code.co_filename in files and code.co_name not in CHECKS]
    print(json.dumps(sorted(set().union(*(names_in(code) for code in ours)))))


if __name__ == "__main__":
    main()
