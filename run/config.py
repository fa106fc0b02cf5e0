"""Configuration: a flat YAML file and `key=value` overrides become one dataclass, or one line that says what
is wrong.

Every option is a field of a dataclass that stands beside the code that reads it, with its meaning as the
string under the field; a recipe's config inherits those dataclasses, so a YAML file stays flat and an option
is documented once. jsonargparse does the parsing, the type checks and `--help`; this file adds the
`key=value` form, the nearest name for a misspelt key, and errors of one line.
"""

import contextlib
import dataclasses
import difflib
import functools
import hashlib
import importlib
import importlib.util
import inspect
import math
import os
import re
import reprlib
import shlex
import shutil
import sys
import textwrap
import types
import typing
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn, TypeVar

import docstring_parser
import jsonargparse
import yaml


def check_interval(options: Any, steps: str, per_epoch: str) -> None:
    """ConfigError unless the option `steps` is a count or a fraction of the run, and `per_epoch` is unset."""
    every = getattr(options, steps)
    if every is not None and not (0 < every < 1 or (every >= 1 and every == int(every))):
        raise ConfigError(steps, every, "must be a number of steps, or a share of the run below 1")
    check_at_least_one(options, per_epoch)
    if every is not None and getattr(options, per_epoch) is not None:
        raise ConfigError(per_epoch, getattr(options, per_epoch), f"contradicts {steps}; keep one of the two")


Config = TypeVar("Config")
jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)


def run_command(work: Callable[[], int | None]) -> NoReturn:
    """Run a command other than training and exit with its code; user errors: one line, exit code 2."""
    try:
        sys.exit(work())
    except BallastError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # the reader closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # otherwise the interpreter's flush at exit fails
        sys.exit(0)


class BallastError(Exception):
    """A fault that the user can fix: printed as one line, exit code 2. The traceback goes to run.log
    only."""

    def __init__(self, message: str):
        super().__init__(one_line(message))


def one_line(text: str, longest: int = 1000) -> str:
    """`text` made safe for a terminal: line ends, control characters and lone surrogates are escaped, and
    very long text loses its middle."""
    if len(text) > longest:
        text = f"{text[: longest * 2 // 3]} … {text[-longest // 3 :]}"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def shown(value: Any) -> str:
    """A short repr(value): a few levels deep, a few entries per level."""
    return _SHORT.repr(value)


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 200
_SHORT.maxlist = _SHORT.maxdict = 4


class ConfigError(BallastError):
    """An option with an impossible value. `key` names it, `remedy` says what to do."""

    def __init__(self, key: str, value: Any, remedy: str):
        self.key, self.value, self.remedy = key, value, remedy
        super().__init__(f"{key}: {remedy}" if value is None else f"{key}: {shown(value)} {remedy}")


class UnknownOption(ConfigError):
    """A key that the config class does not have."""


class CheckpointError(BallastError):
    """A checkpoint that cannot be read, or that this decoder would compute wrongly."""


class DataError(BallastError):
    """A row or file that training must not use. One line: file:line, reason, remedy."""

    def __init__(self, file: str, line: int | None, reason: str, remedy: str = ""):
        self.file, self.line, self.reason, self.remedy = file, line, reason, remedy
        where = f"{file}:{line}" if line is not None else file
        super().__init__(f"{where}: {reason}" + (f"; {remedy}" if remedy else ""))


def _parser(config_class: type) -> jsonargparse.ArgumentParser:
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(config_class, as_group=False)
    return parser


def read_yaml_file(path: Path, key: str) -> Any:
    """The contents of a YAML file. Raises ConfigError if it cannot be read (`key` names the option that
    refers to it), or, with the line, if it is not valid YAML."""
    try:
        return load_yaml(path.read_text(encoding="utf-8"), str(path))
    except OSError as error:
        raise ConfigError(key, str(path), f"cannot be read ({error.strerror}); give a YAML file") from None
    except (yaml.YAMLError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise ConfigError(where, None, f"is not valid YAML: {problem}") from None


def read_options(path: Path, key: str = "--config") -> dict:
    """The `key: value` lines of a YAML file. Raises like `read_yaml_file`, and if it holds other values."""
    values = read_yaml_file(path, key)
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(str(path), None, "must hold `key: value` lines at the top level")
    return values


MOST_NODES = 100_000  # in a YAML file, with every alias written out


class _Loader(yaml.SafeLoader):
    """PyYAML reads YAML 1.1. Some of its surprises are avoided, as in YAML 1.2: 1e-4 is a number, 010 is ten,
    1:30 and 2026-11-27 are text. yes, no, on and off stay booleans. A key that is given twice is refused."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    problem = f"the key {key.value} is given twice"
                    raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        text = self.construct_scalar(node).replace("_", "")
        return int(text, 0 if re.match(r"[-+]?0[xob]", text) else 10)


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)
_RETYPED = tuple(f"tag:yaml.org,2002:{name}" for name in ("int", "float", "timestamp", "value"))
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in _RETYPED]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    _RETYPED[0], re.compile(r"^[-+]?(0x[\da-fA-F_]+|0o[0-7_]+|0b[01_]+|\d[\d_]*)$"), list("-+0123456789")
)
_Loader.add_implicit_resolver(
    _RETYPED[1],
    re.compile(r"^([-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)([eE][-+]?\d+)?|[-+]?\.(inf|Inf|INF)|"
               r"\.(nan|NaN|NAN))$"),
    list("-+.0123456789"),
)


def load_yaml(text: str, name: str) -> Any:
    """yaml.safe_load for a file that may be hostile. Raises ConfigError if aliases make it huge or it is
    nested too deeply; yaml.YAMLError, or ValueError for a malformed number, if it is not valid YAML."""
    sizes: dict[int, int] = {}  # size by id(node); 0 while it is being counted

    def size(node: yaml.Node) -> int:
        if id(node) not in sizes:
            sizes[id(node)] = 0
            pairs = node.value if isinstance(node.value, list) else []
            parts = [part for pair in pairs for part in (pair if isinstance(pair, tuple) else (pair,))]
            sizes[id(node)] = min(MOST_NODES + 1, 1 + sum(size(part) for part in parts))
        elif sizes[id(node)] == 0:
            raise ConfigError(name, None, "holds a value that contains itself")
        return sizes[id(node)]

    try:
        loader = _Loader(text)
        root = loader.get_single_node()
        if root is None:
            return None
        if size(root) > MOST_NODES:
            raise ConfigError(name, None, f"has more than {MOST_NODES:,} values: too many for a config")
        return loader.construct_document(root)
    except RecursionError:
        raise ConfigError(name, None, "is nested too deeply") from None


def type_name(typehint: Any) -> str:
    """`int`, `str | None`, `one of cosine, linear`, …, as a reader of YAML would say it."""
    if typing.get_origin(typehint) is typing.Literal:
        return "one of " + ", ".join(str(choice) for choice in typing.get_args(typehint))
    if typing.get_origin(typehint) in (typing.Union, types.UnionType):
        return " or ".join(type_name(part) for part in typing.get_args(typehint))
    if typehint is type(None):
        return "null"
    return (
        typehint.__name__ if isinstance(typehint, type) and not typing.get_args(typehint) else str(typehint)
    )


@functools.cache
def _checker(config_class: type) -> jsonargparse.ArgumentParser:
    return _parser(config_class)


def _checked(config_class: type, hints: dict[str, Any], values: dict[str, tuple[Any, str]]) -> dict[str, Any]:
    """Convert option → (value, where it was set) to option → value of the option's type. Raises ConfigError
    for the first value that does not fit."""
    parser = _checker(config_class)
    given = {key: value for key, (value, _) in values.items()}
    if all(value is not None for value in given.values()):  # all in one go, which is ten times as fast
        with contextlib.suppress(*_UNFIT):
            parsed = parser.parse_object(given)
            return {key: parsed[key] for key in given}
    return {key: _check(parser, key, hints[key], value, where) for key, (value, where) in values.items()}


_UNFIT = (jsonargparse.ArgumentError, TypeError, ValueError, KeyError, AttributeError, RecursionError)


def _check(parser: jsonargparse.ArgumentParser, name: str, typehint: Any, value: Any, where: str) -> Any:
    """`value` converted to the type of option `name`. Raises ConfigError if it does not fit."""
    try:
        if value is None and type(None) not in typing.get_args(typehint):
            raise TypeError
        return parser.parse_object({name: value})[name]
    except _UNFIT:
        quotes = type(value) in (bool, int, float) and str in (typehint, *typing.get_args(typehint))
        hint = "; put it in quotes" if quotes else ""
        raise ConfigError(where, value, f"must be {type_name(typehint)}{hint}") from None


def _given(argv: list[str], names: set[str]) -> tuple[dict[str, tuple[Any, str]], Path]:
    """Parse a command line: option → (value, where it was set), and the folder of its YAML file. `names` are
    the known options; a key such as option.entry sets one entry of a dict."""
    values: dict[str, tuple[Any, str]] = {}
    directory = Path.cwd()
    position = 0
    while position < len(argv):
        word = argv[position]
        position += 1
        if word == "--config" or word.startswith("--config="):
            if "=" not in word and position == len(argv):
                raise ConfigError("--config", None, "needs a file: --config x.yaml")
            path = Path(word.split("=", 1)[1] if "=" in word else argv[position])
            position += 0 if "=" in word else 1
            options = read_options(path)
            # The config.yaml of a run names the folder that its relative paths begin in.
            directory = Path(options.pop("config_directory", path.resolve().parent))
            values |= {str(key): (value, f"{path}: {key}") for key, value in options.items()}
            continue
        key, equals, text = word.removeprefix("--").partition("=")
        if not equals:
            raise ConfigError(
                word, None, "is not understood; options are given as key=value, e.g. learning_rate=2e-5"
            )
        key = key.replace("-", "_")
        try:
            value = load_yaml(text, key)
        except (yaml.YAMLError, ValueError):
            value = text
        root, dot, inner = key.partition(".")
        if dot and root in names:  # gradient_checkpointing_kwargs.use_reentrant=true sets one entry of a dict
            before = values[root][0] if root in values else {}
            values[root] = ({**(before if isinstance(before, dict) else {}), inner: value}, key)
        else:
            values[key] = (value, key)
    return values, directory


def given_options(argv: list[str]) -> set[str]:
    """The names of the options that a command line and its YAML file set."""
    return {key.partition(".")[0] for key in _given(list(argv), set())[0]}


RETIRED = {  # options of earlier versions
    "lora_target_linear": "all linear layers of the blocks are the default; leave it out"
}


def parse_config(
    config_class: type[Config],
    argv: list[str] | None = None,
    *,
    description: str = "",
    ignore_unknown: bool = False,
) -> Config:
    """The config that `--config FILE key=value …` describes; later arguments win over earlier ones and over
    the file.

    `ignore_unknown` lets a tool that needs some of a recipe's options read the recipe's whole file. Raises
    ConfigError: unknown key (with the nearest known one), wrong type, unreadable file, or what the class's
    own `__post_init__` refuses. `--help` prints every option and exits.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if "-h" in argv or "--help" in argv:
        run_command(lambda: print(help_text(config_class, description), flush=True))
    names = {field.name for field in dataclasses.fields(config_class) if field.init}  # type: ignore[arg-type]
    values, directory = _given(argv, names)

    for key, (_, where) in list(values.items()):
        if key not in names:
            if ignore_unknown:
                values.pop(key)
                continue
            if why := getattr(config_class, "not_here", {}).get(key) or RETIRED.get(key):
                raise UnknownOption(where, None, f"is not an option here: {why}")
            near = difflib.get_close_matches(key, sorted(names), n=1, cutoff=0.6)
            hint = f"did you mean `{near[0]}`?" if near else "run with --help to see every option"
            raise UnknownOption(where, None, f"is not an option; {hint}")
    config = config_of(config_class, values)
    config.given = frozenset(values)  # type: ignore[attr-defined]
    if hasattr(config, "config_directory"):
        config.config_directory = str(directory)  # type: ignore[attr-defined]
    for key in ("output_dir", "dataset_prepared_path"):
        if isinstance(place := getattr(config, key, None), str):
            setattr(config, key, str(expanded(place)))
    return config


# Options that most runs set, in the order in which users decide on them.
FIRST = (
    "mode", "base_model", "datasets", "val_set_size", "test_datasets", "reward_funcs", "num_generations",
    "max_completion_length", "sequence_len", "sample_packing", "adapter", "micro_batch_size",
    "gradient_accumulation_steps", "learning_rate", "num_epochs", "max_steps", "rollout_engine", "output_dir",
)


def option_groups(config_class: type) -> list[tuple[str, list[dataclasses.Field]]]:
    """(title, options) groups of a config: those that most runs set, then the rest by dataclass, the recipe's
    own before shared ones."""
    fields = {f.name: f for f in dataclasses.fields(config_class) if f.init and f.name != "config_directory"}
    groups = [("What most runs set", [fields.pop(name) for name in FIRST if name in fields])]
    for part in config_class.__mro__:
        own = [fields.pop(name) for name in inspect.get_annotations(part) if name in fields]
        if own:
            title = "Only in this recipe" if part is config_class else part.__name__.removesuffix("Options")
            groups.append((title, own))
    return groups


def default_of(field: dataclasses.Field) -> Any:
    """The default of an option; dataclasses.MISSING if it must be set."""
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def meanings_of(config_class: type) -> dict[str, str]:
    """Option → its docstring, on one line."""
    parts = [part for part in config_class.__mro__ if dataclasses.is_dataclass(part)]
    meanings: dict[str, str | None] = {}
    for part in parts:
        meanings |= {p.arg_name: p.description for p in docstring_parser.parse_from_object(part).params}
    return {name: " ".join((text or "").split()) for name, text in meanings.items()}


def help_text(config_class: type, description: str) -> str:
    """What --help prints: every option with its type, default and meaning."""
    meanings, hints = meanings_of(config_class), typing.get_type_hints(config_class)
    width = min(110, shutil.get_terminal_size().columns)
    wrap = functools.partial(textwrap.wrap, width=width)
    usage = f"usage: {Path(sys.argv[0]).name} --config FILE.yaml [key=value …]"
    lines = [usage, "", *wrap(description), "", "FILE.yaml has the same options, one `key: value` per line."]
    for title, fields in option_groups(config_class):
        lines += ["", f"{title}:"]
        for field in fields:
            default = default_of(field)
            value = "must be set" if default in (dataclasses.MISSING, "") else yaml_of(default)
            lines.append(f"  {field.name}  ({type_name(hints[field.name])}; {value})")
            lines += wrap(meanings.get(field.name, ""), initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines)


def config_of(config_class: type[Config], values: dict[str, tuple[Any, str]]) -> Config:
    """The config from option → (value, where it was set). Raises ConfigError for a value of the wrong type or
    one that the class refuses."""
    checked = _checked(config_class, typing.get_type_hints(config_class), values)
    return config_class(**{key: _plain(value) for key, value in checked.items()})


def _plain(value: Any) -> Any:
    """jsonargparse's Namespace back to dicts, so that a config prints and compares as the YAML that it came
    from."""
    if isinstance(value, jsonargparse.Namespace):
        return {key: _plain(item) for key, item in vars(value).items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value


def check_every_part(options: Any) -> None:
    """Run the `check` of every dataclass that a config inherits. Raises ConfigError."""
    for part in reversed(type(options).__mro__):
        if "check" in vars(part):
            part.check(options)


def refuse_unread(options: Any, names: set[str], reason: str) -> None:
    """ConfigError for the first of these options that is not at its default: nothing would read it."""
    for entry in dataclasses.fields(options):
        default = entry.default_factory() if callable(entry.default_factory) else entry.default  # type: ignore[misc]
        if entry.name in names and getattr(options, entry.name) != default:
            raise ConfigError(entry.name, getattr(options, entry.name), reason)


def option_names(*parts: type) -> set[str]:
    """The options of some dataclasses."""
    return {entry.name for part in parts for entry in dataclasses.fields(part)}


def check_at_least_one(options: Any, *keys: str) -> None:
    """ConfigError for the first of these options that is set and below 1."""
    for key in keys:
        value = getattr(options, key)
        if value is not None and value < 1:
            hint = (
                "must be at least 1, or left out" if _default(options, key) is None else "must be at least 1"
            )
            raise ConfigError(key, value, hint)


def _default(options: Any, key: str) -> Any:
    return next(f.default for f in dataclasses.fields(options) if f.name == key)


def check_ranges(options: Any, *ranges: tuple[str, float, float]) -> None:
    """ConfigError for the first (option, low, high) that is set and outside its range, or not finite."""
    for key, low, high in ranges:
        value = getattr(options, key)
        if value is not None and not (low <= value <= high and math.isfinite(value)):
            raise ConfigError(key, value, f"must lie between {low} and {high}")


def import_attribute(key: str, name: str, directory: str | Path) -> Any:
    """Import `name` (module.attribute) from `directory` (of the config) or an installed package.

    A file in `directory` is loaded by its path under a unique name, so it may have the name of one of our
    modules. Raises ConfigError that names `key`, the path that was searched and the command that tests it.
    """
    module, _, attribute = name.rpartition(".")
    path = Path(directory).resolve() / (module.replace(".", "/") + ".py")
    if str(path.parent) not in sys.path:  # last: lets the file import from its own folder
        sys.path.append(str(path.parent))
    try:
        return getattr(_load_file(path) if path.is_file() else importlib.import_module(module), attribute)
    except Exception as error:  # user code may raise anything at import
        raise ConfigError(
            key, name,
            f"cannot be imported ({type(error).__name__}: {error}); looked in {Path(directory).resolve()}, "
            f"then among installed packages; try: cd {shlex.quote(str(directory))} && python -c "
            f"'import {module or name}; {name}'",
        ) from error


def _load_file(path: Path) -> ModuleType:
    """Load the module in this file, once."""
    name = f"ballast_user.{hashlib.sha256(str(path).encode()).hexdigest()[:8]}.{path.stem}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]


def expanded(path: str) -> Path:
    """With the home folder for ~, where there is one."""
    try:
        return Path(path).expanduser()
    except RuntimeError:  # a user id without a name, and no HOME
        return Path(path)


def resolve_checkpoint(
    path_or_repo_id: str,
    revision: str | None = None,
    directory: Path | None = None,
    *,
    only_config: bool = False,
) -> Path:
    """The local directory of a checkpoint: as given, relative to `directory` (of the config) first, or by hub
    id. With `only_config` no weights are downloaded.

    Raises CheckpointError where there is none.
    """
    path = expanded(path_or_repo_id)
    for candidate in (directory / path if directory else path, path):
        if candidate.is_dir():
            return candidate
    if (
        path.exists()
        or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", path_or_repo_id)
        or path_or_repo_id.startswith(".")
    ):
        raise CheckpointError(
            f"{path_or_repo_id}: not a directory with a checkpoint, and not a hub id (owner/name)"
        )
    from huggingface_hub import snapshot_download  # slow to import; most checkpoints are directories
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    patterns = ["config.json"] if only_config else ["*.json", "*.safetensors", "*.jinja", "*.model"]
    try:
        return Path(snapshot_download(path_or_repo_id, revision=revision, allow_patterns=patterns))
    except RepositoryNotFoundError:
        raise CheckpointError(
            f"{path_or_repo_id}: no such directory, and no such model on the hub (private? `hf auth login`)"
        ) from None
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(
            f"{path_or_repo_id}: no such directory, and the hub did not answer: {reason}"
        ) from None


def yaml_of(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True).splitlines()[0].removesuffix("...").strip()
