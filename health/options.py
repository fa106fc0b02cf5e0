"""Generates docs/configs.md from the recipes' options."""

import dataclasses
import inspect
import typing

from run.config import FIRST, default_of, meanings_of, type_name, yaml_of


def options_page(recipes: dict[str, type]) -> str:
    """Every option of these recipes' configs as Markdown, by dataclass, in the order of --help."""
    owners: dict[type, list[str]] = {}  # dataclass → recipes
    for name, config_class in recipes.items():
        for part in config_class.__mro__:
            if dataclasses.is_dataclass(part):
                owners.setdefault(part, []).append(name)
    lines = [
        "# Options", "",
        "Generated from the dataclasses by `python -m health options > docs/configs.md`; a test checks that "
        "it is current. A flat YAML file sets options; `key=value` on the command line overrides it. "
        "A recipe's `--help` prints its own options.",
        "", f"Most runs set some of these: {', '.join(f'`{name}`' for name in FIRST)}.",
    ]
    for part, names in owners.items():
        declared = inspect.get_annotations(part)
        own = [f for f in dataclasses.fields(part) if f.name in declared and f.name != "config_directory"]
        if not own:
            continue
        own.sort(key=lambda field: FIRST.index(field.name) if field.name in FIRST else len(FIRST))
        hints, meanings = typing.get_type_hints(part), meanings_of(part)
        title = part.__module__.replace(".", "/") + ".py"
        title = title if part.__name__ == "Config" else f"{part.__name__} ({title})"
        lines += ["", f"## {title}", "", f"In {', '.join(f'`{name}.py`' for name in names)}.", "",
                  "| option | type | default | meaning |", "|---|---|---|---|"]
        for field in own:
            default = default_of(field)
            shown = "must be set" if default is dataclasses.MISSING else f"`{yaml_of(default)}`"
            meaning = meanings.get(field.name, "").replace("|", "\\|")
            kind = type_name(hints[field.name]).replace("|", "\\|")
            lines.append(f"| `{field.name}` | {kind} | {shown} | {meaning} |")
    return "\n".join(lines) + "\n"
