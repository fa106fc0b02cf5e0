"""docs/configs.md, from the recipes' own options."""

import dataclasses
import inspect
import typing

import docstring_parser

from run.config import type_name, yaml_of

# ------------------------------------------------------------------------------------------------------------
# docs/configs.md
# ------------------------------------------------------------------------------------------------------------


def options_page(recipes: dict[str, type]) -> str:
    """Every option of these recipes' configs, by the dataclass that holds it, as Markdown."""
    owners: dict[type, list[str]] = {}  # dataclass → recipes
    for name, config_class in recipes.items():
        for part in config_class.__mro__:
            if dataclasses.is_dataclass(part):
                owners.setdefault(part, []).append(name)
    lines = [
        "# Options", "",
        "Made from the dataclasses by `python -m health options > docs/configs.md`; a test compares. A flat "
        "YAML file sets them, `key=value` on the command line goes before it.",
    ]  # fmt: skip
    for part, names in sorted(owners.items(), key=lambda entry: (-len(entry[1]), entry[0].__module__)):
        declared = inspect.get_annotations(part)
        own = [f for f in dataclasses.fields(part) if f.name in declared and f.name != "config_directory"]
        if not own:
            continue
        hints = typing.get_type_hints(part)
        meanings = {p.arg_name: p.description for p in docstring_parser.parse_from_object(part).params}
        title = part.__module__.replace(".", "/") + ".py"
        title = title if part.__name__ == "Config" else f"{part.__name__} ({title})"
        lines += ["", f"## {title}", "", f"In {', '.join(f'`{name}.py`' for name in names)}.", "",
                  "| option | type | default | meaning |", "|---|---|---|---|"]  # fmt: skip
        for field in own:
            default = field.default_factory() if callable(field.default_factory) else field.default  # type: ignore[misc]
            shown = "must be set" if default is dataclasses.MISSING else f"`{yaml_of(default)}`"
            meaning = " ".join((meanings.get(field.name) or "").split()).replace("|", "\\|")
            kind = type_name(hints[field.name]).replace("|", "\\|")
            lines.append(f"| `{field.name}` | {kind} | {shown} | {meaning} |")
    return "\n".join(lines) + "\n"
