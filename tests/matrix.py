"""Many short runs in one process, or under torchrun, for test_matrix.py: matrix.py RUNS.json OUT.json.

RUNS.json: [[name, recipe, [key=value, …]], …]. OUT.json: name → metrics of every step, or the error; what
comes after an error is not run, for the ranks may no longer be together.
"""

import json
import sys
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import dist
import ebft
import grpo
import sft
from dist import DistOptions
from run.config import parse_config

RECIPES = {"sft": sft, "grpo": grpo, "ebft": ebft}


def main(runs: str, out: str) -> None:
    world = dist.init(DistOptions(gpu_timeout_minutes=0.5))
    finish, dist.finish = dist.finish, lambda: None  # one process group for all runs
    results: dict[str, object] = {}
    for name, recipe, arguments in json.loads(Path(runs).read_text()):
        config = parse_config(RECIPES[recipe].Config, arguments)
        try:
            RECIPES[recipe].main(config)
        except BaseException as error:
            results[name] = (
                f"rank {world.rank}: {type(error).__name__}: {error}\n{traceback.format_exc()[-1500:]}"
            )
            break
        lines = (Path(config.output_dir) / "metrics.jsonl").read_text().splitlines() if world.main else []
        results[name] = [json.loads(line) for line in lines]
    if world.main or any(isinstance(result, str) for result in results.values()):
        Path(out + ("" if world.main else f".{world.rank}")).write_text(json.dumps(results))
    finish()


if __name__ == "__main__":
    main(*sys.argv[1:])
