"""Bad input by the thousand: configs, rows, Parquet files, tokenizers, templates, weights, adapters, recorded
rollouts, metrics and incidents, each broken at random in one or a few places.

    python bench/fuzz.py --cases 2000     what CI runs
    python bench/fuzz.py --cases 20000    the whole proof, some minutes on two cores

A case is good if it is read, or refused by one line that names the file or the key: never another exception,
never more than some seconds, never much memory. A share of the refused ones is run again as a whole program,
which must print that one line, no traceback, and end with exit code 2. A case that fails is kept under --keep
with what it raised; --only KIND --seed N runs it again.
"""

import argparse
import contextlib
import copy
import io
import json
import logging
import math
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pyarrow
import pyarrow.parquet
import torch
import yaml
from safetensors import safe_open

import ebft
import grpo
import sft
from checkpoints.adapters import adopt_adapter, apply_lora, load_adapter, read_adapter_options, save_adapter
from checkpoints.weights import initialize, load_weights, read_architecture
from data import RowOptions, encode_dataset, read_prompts
from health import drill, report
from health.forensics import replay
from model import Transformer
from rollouts.records import ReplayEngine
from run.config import BallastError, parse_config
from text.tokenizer import Tokenizer

PATIENCE = 20  # seconds for one case
ROOM = 1 << 30  # bytes that all cases together may add to the process
ODD: list[Any] = [
    None, True, False, -1, 0, 1, 3.5, 2**31, 2**63, -(2**70), 1e308, float("nan"), float("inf"), "", "x",
    " ", "\x00", "\ud800", "é" * 50, "a" * 20000, "../../etc/passwd", "/", [], {}, [[]], [None], [{}],
    {"a": {"b": {"c": []}}}, ["x", 1, None], "null", "!!python/object:os.system", "{{ 1/0 }}", "<script>",
    7, {"": 1},
]


def deep(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


def odd(rng: random.Random) -> Any:
    return deep(rng.choice([20, 200])) if rng.random() < 0.03 else copy.deepcopy(rng.choice(ODD))


def mutated(value: Any, rng: random.Random, times: int = 1) -> Any:
    """A JSON-like value with a few of its parts replaced, left out, renamed or repeated."""
    value = copy.deepcopy(value)
    for _ in range(times):
        places: list[tuple[Any, Any]] = []
        stack = [value]
        while stack:
            top = stack.pop()
            keys = list(top) if isinstance(top, dict) else range(len(top)) if isinstance(top, list) else ()
            for key in keys:
                places.append((top, key))
                if isinstance(top[key], dict | list):
                    stack.append(top[key])
        if not places:
            return odd(rng)
        owner, key = rng.choice(places)
        way = rng.random()
        if way < 0.6:
            owner[key] = odd(rng)
        elif way < 0.75:
            owner.pop(key)
        elif way < 0.9 and isinstance(owner, dict):
            owner[rng.choice(["", "extra", key + "_", "é"])] = owner[key]
        elif isinstance(owner, list):
            owner.insert(key, copy.deepcopy(owner[key]))
    return value


def broken(raw: bytes, rng: random.Random) -> bytes:
    """Bytes with a cut, flips, zeros, a piece twice, another encoding, or a mountain of brackets."""
    if not raw:
        return rng.randbytes(20)
    way, at = rng.randrange(9), rng.randrange(len(raw))
    if way == 0:
        return raw[:at]
    if way == 1:
        made = bytearray(raw)
        for _ in range(rng.choice([1, 1, 3, 30])):
            made[rng.randrange(len(made))] ^= 1 << rng.randrange(8)
        return bytes(made)
    if way == 2:
        return raw[:at] + b"\x00" * rng.choice([1, 100]) + raw[at:]
    if way == 3:
        return raw[:at] + raw[at // 2 :]
    if way == 4:
        return raw.decode("utf-8", "replace").encode(
            rng.choice(["utf-16", "utf-8-sig", "latin-1"]), "replace"
        )
    if way == 5:
        return (
            raw[:at] + rng.choice([b"[", b'{"a":', b"(", b"- "]) * rng.choice([60, 5000, 100000]) + raw[at:]
        )
    if way == 6:
        return raw[:at] + b"a" * rng.choice([10, 10**6]) + raw[at:]
    if way == 7:
        return raw[:at] + rng.randbytes(rng.choice([1, 8, 200])) + raw[at:]
    return (
        raw[:at] + rng.choice([b"1e999", b"9" * 5000, b"NaN", b"\\ud800", b"\r", b"\xff\xfe"]) + raw[at + 1 :]
    )


def either(value: Any, rng: random.Random, write: Callable[[Any], str]) -> bytes:
    """Broken as a structure, or as text."""
    if rng.random() < 0.7:
        text = write(mutated(value, rng, rng.choice([1, 1, 2, 4])))
        return text.encode("utf-8", "surrogatepass")
    return broken(write(value).encode(), rng)


# ------------------------------------------------------------------------------------------------------------
# What is well, to be broken
# ------------------------------------------------------------------------------------------------------------


POISON = """
from checkpoints import building
build = building.build_model
def poisoned(*given, **named):
    model = build(*given, **named)
    model.layers[1].mlp.down_proj.weight.data[0, 0] = float("nan")
    return model
building.build_model = poisoned
"""


class Bench:
    """A directory with one good example of everything, and the tiny model that reads it."""

    def __init__(self, root: Path):
        self.root = root
        drill.prepare(root)
        self.checkpoint = root / "checkpoint" / "final"
        self.tokenizer = Tokenizer.load(self.checkpoint)
        self.arch = read_architecture(self.checkpoint)
        self.model = Transformer(self.arch)
        self.configs = [
            (module, yaml.safe_load((root / "base" / f"{name}.yaml").read_text()))
            for name, module in (("sft", sft), ("grpo", grpo), ("ebft", ebft), ("strided", ebft))
        ]
        with safe_open(self.checkpoint / "model.safetensors", framework="pt") as file:
            self.tensors = list(file.keys())
        self.adapter = root / "adapter"
        if not self.adapter.exists():
            options = sft.Config(base_model="x", datasets=[{"path": "x"}], adapter="lora", lora_r=4)
            model = Transformer(self.arch)
            initialize(model, 1)
            apply_lora(model, options)
            save_adapter(model, self.adapter)
        self.incident = root / "poisoned" / "incidents" / "step-1"
        if not self.incident.exists():
            shutil.rmtree(root / "poisoned", ignore_errors=True)
            options = {"output_dir": str(root / "poisoned"), "max_steps": 1}
            drill.start(root, "sft", options, patch=POISON).join()


class Case:
    """One broken input: `read` it in a directory of its own; `command` is a whole program that would."""

    def __init__(self, place: Path):
        self.place = place
        self.read: Callable[[], Any] = lambda: None
        self.command: tuple[str, list[str]] | None = None  # recipe, arguments
        self.names: list[str] = []  # one of which the line must hold


def config(bench: Bench, rng: random.Random, place: Path) -> Case:
    case = Case(place)
    module, values = rng.choice(bench.configs)
    file = place / "c.yaml"
    if rng.random() < 0.05:
        bomb = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
            f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join(['*' + chr(97 + i)] * 9)}]\n" for i in range(9)
        )
        key = rng.choice(["datasets", "lora_target_modules", "seed", "chat_template_kwargs"])
        file.write_text(bomb + f"{key}: *j\nbase_model: x\n")
    else:
        file.write_bytes(
            either(values, rng, lambda v: yaml.safe_dump(v) if rng.random() < 0.5 else json.dumps(v))
        )
    arguments = ["--config", str(file)]
    if rng.random() < 0.3:
        key = rng.choice([*values, "learning_rate", "health_rules.x", "nothing", ""])
        arguments.append(f"{key}={json.dumps(odd(rng))}")
    case.read = lambda: parse_config(module.Config, arguments)
    case.command = module.__name__, arguments
    return case


ROWS: dict[str, list[dict]] = {
    "chat": [
        {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "q"},
                      {"role": "assistant", "content": "a b c"}],
         "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}]},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a", "weight": 0}]},
        {"messages": [{"role": "user", "content": "q"},
                      {"role": "assistant", "content": "x", "tool_calls": [
                          {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}]},
                      {"role": "tool", "content": "r"}, {"role": "assistant", "content": "y"}],
         "chat_template_kwargs": {"enable_thinking": False}},
        {"messages": json.dumps([{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]),
         "tools": json.dumps([{"name": "f"}]), "chat_template_kwargs": "{}", "system": None},
        {"messages": [{"role": "user", "content": "q"},
                      {"role": "assistant", "content": None, "train": True, "tool_calls": [
                          {"type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}]},
                      {"role": "assistant", "content": "x", "train": False, "weight": 1,
                       "function_call": {"name": "f", "arguments": "{}"}}]},
    ],
    "instruct": [{"instruction": "i", "input": "x", "output": "o", "system": "s"},
                 {"instruction": "i", "input": None, "output": "o", "system": None}],
    "prompt_completion": [{"prompt": "p", "completion": "c"},
                          {"prompt": [{"role": "user", "content": "q"}],
                           "completion": [{"role": "assistant", "content": "a"}]},
                          {"prompt": [{"from": "human", "value": "q"}],
                           "completion": [{"from": "gpt", "value": "a"}]}],
    "text": [{"text": "some words"}],
    "tokens": [{"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}],
}


def read_all(bench: Bench, spec: dict, place: Path) -> Any:
    """As SFT and as RL read it."""
    options = RowOptions(datasets=[spec], sequence_len=128, strip_thinking=len(spec["path"]) % 2 == 0)
    made = [row for row in encode_dataset(spec, bench.tokenizer, options, place)]
    if spec["type"] in ("chat", "instruct", "prompt_completion"):
        read_prompts([spec], bench.tokenizer, options, place, 100, "rollout")
    return made


def data_case(bench: Bench, place: Path, kind: str, name: str) -> Case:
    case = Case(place)
    spec = {"path": str(place / name), "type": kind}
    case.read = lambda: read_all(bench, spec, place)
    more = [f"datasets={json.dumps([spec])}", f"dataset_prepared_path={place / 'prepared'}"]
    case.command = with_checkpoint(bench, bench.checkpoint, more)
    case.names = [name, "datasets"]
    return case


def rows(bench: Bench, rng: random.Random, place: Path) -> Case:
    kind = rng.choice(list(ROWS))
    good = [json.dumps(rng.choice(ROWS[kind])) for _ in range(3)]
    good[1] = either(rng.choice(ROWS[kind]), rng, json.dumps).decode("utf-8", "surrogateescape")
    if rng.random() < 0.05:
        good[1] = good[1][:-1] + ', "messages": 1, "messages": []}'
    (place / "rows.jsonl").write_bytes("\n".join(good).encode("utf-8", "surrogateescape"))
    return data_case(bench, place, kind, "rows.jsonl")


def documents(bench: Bench, rng: random.Random, place: Path) -> Case:
    """One JSON document that holds the rows."""
    kind = rng.choice(list(ROWS))
    (place / "rows.json").write_bytes(either({"rows": ROWS[kind] * 2}, rng, json.dumps))
    return data_case(bench, place, kind, "rows.json")


def parquet(bench: Bench, rng: random.Random, place: Path) -> Case:
    kind = rng.choice(["chat", "instruct", "text", "tokens"])
    row = {k: v for k, v in ROWS[kind][0].items() if k != "tools"}  # Parquet has no empty objects
    table = pyarrow.Table.from_pylist([row] * 5)
    pyarrow.parquet.write_table(table, place / "rows.parquet")
    path = place / "rows.parquet"
    path.write_bytes(broken(path.read_bytes(), rng))
    return data_case(bench, place, kind, "rows.parquet")


def arrow(bench: Bench, rng: random.Random, place: Path) -> Case:
    """A file as the datasets library saves them."""
    kind = rng.choice(["chat", "instruct", "text", "tokens"])
    row = {k: v for k, v in ROWS[kind][0].items() if k != "tools"}
    table, path = pyarrow.Table.from_pylist([row] * 5), place / "data-00000-of-00001.arrow"
    begin = rng.choice([pyarrow.ipc.new_stream, pyarrow.ipc.new_file])
    with begin(path, table.schema) as file:
        file.write_table(table)
    path.write_bytes(broken(path.read_bytes(), rng))
    return data_case(bench, place, kind, path.name)


WORDS = (
    "train", "test", "Train", "TEST", "training_data", "validation", "dev", "data", "a", "a copy", "a (1)",
    "mytest", "train_test", "held_out", ".hidden", "cache-1", "dataset_info", "état", "x" * 100,
)
ENDINGS = (".jsonl", ".json", ".parquet", ".arrow", ".txt", ".csv", ".jsonl.gz", "")


def folder(bench: Bench, rng: random.Random, place: Path) -> Case:
    """Files of any names, some of them data."""
    kind = rng.choice(["chat", "instruct", "text"])
    for _ in range(rng.randrange(6)):
        name = rng.choice(["", "", "train/", ".cache/", "test/"]) + rng.choice(WORDS) + rng.choice(ENDINGS)
        file = place / "set" / name
        if file.is_dir() or any(parent.is_file() for parent in file.parents):
            continue
        file.parent.mkdir(parents=True, exist_ok=True)
        rows = either(rng.choice(ROWS[kind]), rng, json.dumps) if rng.random() < 0.3 else None
        file.write_bytes(rows if rows is not None else json.dumps(rng.choice(ROWS[kind])).encode())
    (place / "set").mkdir(exist_ok=True)
    case = data_case(bench, place, kind, "set")
    if rng.random() < 0.3:
        split = rng.choice(["test", "train[:1]", "dev", "held_out", "x"])
        spec = {"path": str(place / "set"), "type": kind, "split": split}
        case.read = lambda: read_all(bench, spec, place)
        case.command = None
    case.names = ["set", "datasets"]
    return case


def copied(bench: Bench, place: Path) -> Path:
    folder = place / "model"
    shutil.copytree(bench.checkpoint, folder)
    return folder


def with_checkpoint(bench: Bench, folder: Path, recipe_arguments: list[str]) -> tuple[str, list[str]]:
    spec = [{"path": str(bench.root / "data" / "few_letters.jsonl"), "type": "chat"}]
    arguments = ["--config", str(bench.root / "base" / "sft.yaml"), f"datasets={json.dumps(spec)}",
                 "max_steps=1", f"dataset_prepared_path={folder.parent / 'prepared'}", f"base_model={folder}",
                 "random_init=false", "tokenizer_vocab_size=null", "test_datasets=null"]
    return "sft", arguments + recipe_arguments


def tokenizer(bench: Bench, rng: random.Random, place: Path) -> Case:
    case = Case(place)
    folder = copied(bench, place)
    name = rng.choice(["tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
                       "generation_config.json", "special_tokens_map.json", "added_tokens.json"])
    path = folder / name
    token = {"content": "<new>", "lstrip": False, "rstrip": True, "normalized": False, "special": True}
    if name == "special_tokens_map.json":
        path.write_text(json.dumps({"eos_token": token, "additional_special_tokens": ["<a>", token]}))
    elif name == "added_tokens.json":
        path.write_text(json.dumps({"<new>": 400, "<other>": 401}))
    elif not path.exists():
        path.write_text("{}")
    if name.endswith(".json"):
        value = json.loads(path.read_text())
        if name == "tokenizer_config.json":
            value["chat_template"] = [{"name": "default", "template": "{{ messages }}"}]
            value["extra_special_tokens"] = ["<a>", token]
            if rng.random() < 0.5:
                value["added_tokens_decoder"] = {"400": token, "401": {**token, "content": "<other>"}}
            (folder / "chat_template.jinja").unlink(missing_ok=True)
        path.write_bytes(either(value, rng, json.dumps))
    else:
        path.write_bytes(broken(path.read_bytes(), rng))
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    (place / "rows.jsonl").write_text(json.dumps({"messages": turns}))
    spec = {"path": str(place / "rows.jsonl"), "type": "chat"}

    def read() -> Any:
        options = RowOptions(datasets=[spec])
        made = Tokenizer.load(folder).configure(options, place)
        return made.stop_ids, made.vocab_size, list(encode_dataset(spec, made, options, place))

    case.read = read
    case.command = with_checkpoint(bench, folder, [f"datasets={json.dumps([spec])}"])
    case.names = [name, "model", "rows.jsonl", "special_tokens"]
    return case


def architecture(bench: Bench, rng: random.Random, place: Path) -> Case:
    case = Case(place)
    folder = copied(bench, place)
    value = json.loads((folder / "config.json").read_text())
    if rng.random() < 0.5:
        value |= {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                                   "high_freq_factor": 4.0, "original_max_position_embeddings": 8192},
                  "quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    (folder / "config.json").write_bytes(either(value, rng, json.dumps))

    def read() -> Any:
        arch = read_architecture(folder)
        with torch.device("meta"):
            return Transformer(arch)

    case.read = read
    case.command = with_checkpoint(bench, folder, [])
    case.names = ["config.json", "model", "rows", "vocab"]
    return case


def weights(bench: Bench, rng: random.Random, place: Path) -> Case:
    case = Case(place)
    folder = copied(bench, place)
    path = folder / "model.safetensors"
    if rng.random() < 0.1:  # two files that hold the same tensors, one of them damaged
        index = {"weight_map": {n: f"part-{i % 2}.safetensors" for i, n in enumerate(bench.tensors)}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        shutil.copyfile(path, folder / "part-0.safetensors")
        (folder / "part-1.safetensors").write_bytes(broken(path.read_bytes(), rng))
        path.unlink()
    elif rng.random() < 0.3:
        index = {"metadata": {}, "weight_map": {name: "part-1.safetensors" for name in bench.tensors}}
        path.rename(folder / "part-1.safetensors")
        (folder / "model.safetensors.index.json").write_bytes(either(index, rng, json.dumps))
    else:
        raw = path.read_bytes()
        size = int.from_bytes(raw[:8], "little")
        if rng.random() < 0.6:  # the header: offsets that overlap, wrong sizes, dtypes, names
            header = either(json.loads(raw[8 : 8 + size]), rng, json.dumps)
            length = len(header) if rng.random() < 0.8 else rng.choice([0, 1, 2**63 - 1, 2**40, 10**8])
            path.write_bytes(length.to_bytes(8, "little") + header + raw[8 + size :])
        else:
            path.write_bytes(broken(raw, rng))
    case.read = lambda: load_weights(bench.model, folder)
    case.command = with_checkpoint(bench, folder, [])
    case.names = ["model"]
    return case


def adapter(bench: Bench, rng: random.Random, place: Path) -> Case:
    case = Case(place)
    folder = place / "adapter"
    shutil.copytree(bench.adapter, folder)
    if rng.random() < 0.5:
        path = folder / "adapter_config.json"
        path.write_bytes(either(json.loads(path.read_text()), rng, json.dumps))
    else:
        path = folder / "adapter_model.safetensors"
        path.write_bytes(broken(path.read_bytes(), rng))

    def read() -> Any:
        data = [{"path": "x"}]
        config = sft.Config(base_model="x", datasets=data, adapter="lora", lora_model_dir=str(folder))
        adopt_adapter(config, bench.arch, bench.checkpoint, place)
        options = read_adapter_options(folder, "x")
        with torch.device("meta"):
            model = Transformer(bench.arch)
            apply_lora(model, options)
        model.to_empty(device="cpu")
        load_adapter(model, folder)

    case.read = read
    case.names = ["adapter", "lora"]
    return case


def rollouts(bench: Bench, rng: random.Random, place: Path) -> Case:
    case = Case(place)
    row = {"prompt_ids": [5, 6], "completion_ids": [7, 8], "sampling_logprobs": [-1.0, -2.0],
           "finish_reason": "stop", "rewards": {"exact_match": 1.0}, "weight_version": 0}
    lines = [
        json.dumps(row),
        either(row, rng, json.dumps).decode("utf-8", "surrogateescape"),
        json.dumps(row),
    ]
    (place / "step-0.jsonl").write_bytes("\n".join(lines).encode("utf-8", "surrogateescape"))
    options = SimpleNamespace(num_generations=1)
    case.read = lambda: ReplayEngine(str(place / "step-0.jsonl"), place, options, bench.tokenizer)
    case.names = ["step-0.jsonl"]
    return case


def metrics(bench: Bench, rng: random.Random, place: Path) -> Case:
    case = Case(place)
    history = [{"step": n, "train/loss": 2.0 - n / 10, "train/grad_norm": 1.0} for n in range(1, 12)]
    name = rng.choice(["metrics.jsonl", "trainer_state.json", "history.csv"])
    if name == "metrics.jsonl":
        text = "\n".join(json.dumps(mutated(r, rng) if rng.random() < 0.2 else r) for r in history).encode(
            "utf-8", "surrogatepass"
        )
        raw = text if rng.random() < 0.5 else broken(text, rng)
    elif name == "trainer_state.json":
        raw = either({"log_history": history}, rng, json.dumps)
    else:
        raw = broken(b"Step,loss,grad_norm\n" + b"".join(b"%d,1.5,0.3\n" % n for n in range(1, 9)), rng)
    (place / name).write_bytes(raw)
    (place / "config.yaml").write_bytes(either(bench.configs[0][1], rng, yaml.safe_dump))
    case.read = lambda: report.judge(*report.read_history(place / name))
    case.names = [name, "config.yaml", "health"]
    return case


def incident(bench: Bench, rng: random.Random, place: Path) -> Case:
    case = Case(place)
    folder = place / "step-1"
    shutil.copytree(bench.incident, folder)
    victim = rng.choice(sorted(p for p in folder.rglob("*") if p.is_file() and p.name != "rows.txt"))
    raw = victim.read_bytes()
    if victim.suffix == ".json" and rng.random() < 0.7:
        victim.write_bytes(either(json.loads(raw), rng, json.dumps))
    elif victim.suffix == ".yaml" and rng.random() < 0.7:
        victim.write_bytes(either(yaml.safe_load(raw), rng, yaml.safe_dump))
    else:
        victim.write_bytes(broken(raw, rng))

    def read() -> Any:
        with contextlib.redirect_stdout(io.StringIO()):
            return replay(folder)

    case.read = read
    keys = yaml.safe_load((bench.incident / "config.yaml").read_text())
    case.names = ["step-1", "incident", "model", *keys]
    return case


KINDS: dict[str, Callable[[Bench, random.Random, Path], Case]] = {
    kind.__name__: kind
    for kind in (
        config,
        rows,
        documents,
        parquet,
        arrow,
        folder,
        tokenizer,
        architecture,
        weights,
        adapter,
        rollouts,
        metrics,
        incident,
    )
}


# ------------------------------------------------------------------------------------------------------------


class Hangs(BaseException):
    pass


def alarm(*_: Any) -> None:
    raise Hangs(f"not done after {PATIENCE} s")


def fault_of(error: BaseException, case: Case) -> str:
    """What is wrong with how a case was refused; "" if nothing is."""
    if not isinstance(error, BallastError):
        return "".join(traceback.format_exception(error)[-6:])
    said = str(error)
    if "\n" in said or "\r" in said:
        return f"more than one line: {said[:300]!r}"
    if len(said) > 1500:
        return f"a line of {len(said)} characters: {said[:300]!r}"
    if case.names and not any(name in said for name in case.names):
        return f"names none of {case.names}: {said[:300]!r}"
    try:
        said.encode()
    except UnicodeEncodeError as problem:
        return f"cannot be printed: {problem}"
    return ""


def one(bench: Bench, kind: str, seed: int, place: Path) -> tuple[str, Case, str]:
    """("read", "refused" or "FAILED"; the case; why it failed)."""
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    case = KINDS[kind](bench, random.Random(f"{kind}-{seed}"), place)
    signal.alarm(PATIENCE)
    try:
        case.read()
        return "read", case, ""
    except (Exception, Hangs, SystemExit) as error:
        signal.alarm(0)
        fault = fault_of(error, case)
        return ("FAILED" if fault else "refused"), case, fault
    finally:
        signal.alarm(0)


def as_a_program(case: Case) -> str:
    """The recipe itself on this input: "" if it ends with exit code 2 and one line."""
    assert case.command is not None
    recipe, arguments = case.command
    out = case.place / "streams"  # not the run's own: it must be written where the run is refused too
    process = drill.begin(case.place, recipe, [*arguments, f"output_dir={case.place / 'run'}"], out)
    process.join(120)
    if process.exitcode is None:
        process.kill()
        return "the program hangs"
    lines = (out / "stderr").read_text(errors="replace").strip().splitlines()
    if process.exitcode != 2 or len(lines) != 1 or not lines[0].startswith("error: "):
        return f"exit code {process.exitcode}, stderr: {' / '.join(lines[-8:])[:600]}"
    return ""


def share(
    root: Path, keep: Path, kind: str, seeds: list[int], programs: int
) -> tuple[Counter, list[str], float]:
    logging.getLogger("ballast").setLevel(logging.ERROR)
    signal.signal(signal.SIGALRM, alarm)
    bench = Bench(root)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    counts: Counter = Counter()
    faults: list[str] = []
    with tempfile.TemporaryDirectory(prefix="ballast-fuzz-") as folder:
        for seed in seeds:
            place = Path(folder) / f"{kind}-{seed}"
            state, case, fault = one(bench, kind, seed, place)
            if state == "refused" and case.command and counts["programs"] < programs:
                counts["programs"] += 1
                if fault := as_a_program(case):
                    state = "FAILED"
            counts[state] += 1
            if fault:
                faults.append(f"{kind} --seed {seed}: {fault}")
                shutil.rmtree(keep / f"{kind}-{seed}", ignore_errors=True)
                shutil.copytree(place, keep / f"{kind}-{seed}", symlinks=True)
            shutil.rmtree(place, ignore_errors=True)
    return counts, faults, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--only", nargs="+", choices=list(KINDS))
    parser.add_argument("--seed", type=int, help="this case of each kind alone")
    parser.add_argument("--programs", type=int, default=6, help="of each kind, run as whole programs")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--root", type=Path, default=Path("outputs/drills"))
    parser.add_argument("--keep", type=Path, default=Path("outputs/fuzz"))
    given = parser.parse_args()
    place = given.root.absolute()
    drill.prepare(place)
    Bench(place)
    chosen = given.only or list(KINDS)
    shares = {kind: 0.25 if kind == "config" else 1.0 for kind in chosen}  # a config takes 0.2 s to refuse
    wanted = []
    for kind in chosen:
        count = math.ceil(given.cases * shares[kind] / sum(shares.values()))
        seeds = [given.seed] if given.seed is not None else list(range(count))
        wanted += [(place, given.keep.absolute(), kind, seeds[at : at + 200], given.programs * (at == 0))
                   for at in range(0, len(seeds), 200)]
    totals: dict[str, Counter] = {kind: Counter() for kind in chosen}
    bad, begun, most = 0, time.monotonic(), 0.0
    for (_, _, kind, _, _), (counts, faults, grown) in drill.in_parallel(share, wanted, given.jobs):
        totals[kind] += counts
        most = max(most, grown)
        bad += len(faults)
        for fault in faults[:3]:
            print(fault, flush=True)
    print(f"{'input':<14}{'cases':>7}{'read':>7}{'refused':>9}{'as programs':>13}{'failed':>8}")
    for kind, counts in totals.items():
        cases = counts["read"] + counts["refused"] + counts["FAILED"]
        print(f"{kind:<14}{cases:>7}{counts['read']:>7}{counts['refused']:>9}{counts['programs']:>13}"
              f"{counts['FAILED']:>8}")
    print(f"{time.monotonic() - begun:.0f} s; a process grew by at most {most / 2**20:.0f} MiB")
    sys.exit(1 if bad or most > ROOM else 0)
