"""python -m health COMMAND: diagnose, report and replay runs, plan memory, convert configs, run drills."""

import importlib
import sys
from pathlib import Path
from typing import Any

from checkpoints.adapters import adopt_adapter
from checkpoints.weights import read_architecture
from health.convert import convert_file, page
from health.drill import rank, show, show_all
from health.forensics import replay
from health.memory import table
from health.options import options_page
from health.report import ended_in, judge, read_history, write
from run.config import ConfigError, given_options, option_names, parse_config, resolve_checkpoint, run_command
from run.terminal import make_printable

USAGE = """usage: python -m health COMMAND …
    diagnose RUN          verdicts for a finished run: its directory, a metrics.jsonl, a trainer_state.json
                          (TRL, axolotl) or a table exported from wandb (.csv, .jsonl)
    report DIR [DIR …]    one page about a run, or several side by side: report.html; out=FILE
    replay DIR            rerun an incident (output_dir/incidents/step-N) in one CPU process
    memory --config X     the GPU memory a run needs, and how to reduce it; also key=value, processes=N
                          and recipe=sft|grpo|ebft
    convert [FILE]        print an axolotl or TRL config in our options; without FILE, the table of all
                          known options (docs/migration.md)
    options               every option of every recipe (docs/configs.md)
    drill NAME | all      break a tiny run on purpose, see it named, fix it (drills/*.yaml)"""


def recipe_configs() -> dict[str, Any]:
    """Each recipe's Config class. Only commands import recipes; libraries never do."""
    return {name: importlib.import_module(name).Config for name in ("sft", "grpo", "ebft")}


def recipe_config(arguments: list[str]) -> Any:
    """Parse a command line as the config of the recipe that knows most of its keys."""
    named = [a.partition("=")[2] for a in arguments if a.startswith("recipe=")]
    arguments = [a for a in arguments if not a.startswith("recipe=")]
    for name in named:
        if name not in ("sft", "grpo", "ebft"):
            raise ConfigError("recipe", name, "is not a recipe; choose sft, grpo or ebft")
    known = recipe_configs()
    configs = [known[name] for name in named or known]
    given = given_options(arguments)
    unknown = [len(given - option_names(config)) for config in configs]
    return parse_config(configs[unknown.index(min(unknown))], arguments)


def memory_table(arguments: list[str]) -> str:
    processes = [a.partition("=")[2] for a in arguments if a.startswith("processes=")]
    if processes and not (processes[-1].isdigit() and int(processes[-1])):
        raise ConfigError("processes", processes[-1], "must be a whole number of at least 1")
    config = recipe_config([a for a in arguments if not a.startswith("processes=")])
    directory = resolve_checkpoint(
        config.base_model, config.base_model_revision, Path(config.config_directory), only_config=True
    )
    arch = read_architecture(directory, config.ignore_config_fields)
    adopt_adapter(config, arch, None, Path(config.config_directory))
    return table(arch, config, int(processes[-1]) if processes else 1)


def diagnose(run: Path) -> int:
    """Print what was wrong with a finished run, the first cause first, and how much evidence there was."""
    history, config = read_history(run)
    doctor, _ = judge(history, config)
    for cause, consequences in doctor.causes():
        print(cause.line(config))
        for verdict in consequences:
            print(f"    with it: {verdict.line(config).removeprefix('health: ').partition(': Cause')[0]}")
    if (error := ended_in(run)) is not None:
        print(f"ended in an error: {error}")
    elif not doctor.ever:
        enough = doctor.steps is not None and doctor.steps[1] - doctor.steps[0] >= 9
        print("well, as far as the log shows" if enough else "too few steps to say whether it is well")
    if error is None:
        print(f"evidence: {doctor.evidence()}")
    return 1 if doctor.ever or error else 0


def command_line(arguments: list[str]) -> int:
    """Run a command and return its exit code: 0 healthy, 1 a problem was found, 2 bad usage."""
    command, *rest = arguments or [""]
    if command == "diagnose" and len(rest) == 1:
        return diagnose(Path(rest[0]))
    if command == "report" and rest:
        runs = [Path(a) for a in rest if not a.startswith("out=")]
        named = [Path(a.removeprefix("out=")) for a in rest if a.startswith("out=")]
        if runs:
            beside = runs[0] if len(runs) == 1 and runs[0].is_dir() else Path(".")
            print(write(runs, named[-1] if named else beside / "report.html"))
            return 0
    if command == "replay" and len(rest) == 1:
        return 0 if replay(Path(rest[0])) else 1
    if command == "memory" and rest:
        print(memory_table(rest))
        return 0
    if command == "convert" and len(rest) < 2:
        print(convert_file(Path(rest[0]), recipe_configs()) if rest else page(recipe_configs()), end="")
        return 0
    if command == "options" and not rest:
        print(options_page(recipe_configs()), end="")
        return 0
    if command == "drill-rank" and len(rest) == 1:  # started by `drill` for a run on several processes
        rank(rest[0])
        return 0
    if command == "drill" and len(rest) == 1:
        root = Path("outputs/drills").absolute()
        return 0 if (show_all(root) if rest[0] == "all" else show(rest[0], root)) else 1
    print(USAGE, file=sys.stderr)
    return 2


def cli() -> None:
    """python -m health, or ballast-health where the package is installed."""
    make_printable()
    run_command(lambda: command_line(sys.argv[1:]))


if __name__ == "__main__":
    cli()
