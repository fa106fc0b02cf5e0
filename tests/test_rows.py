"""Files, slices, the hub and generated tasks as rows."""

import json

import pytest

from conftest import with_hub, write
from run.config import ConfigError, DataError
from text.rows import read_rows


def test_json_parquet_directories_and_slices_are_read(tokenizer, tmp_path):
    import pyarrow
    import pyarrow.parquet

    rows = [{"text": f"row {i}", "messages": None} for i in range(10)]
    (tmp_path / "data").mkdir()
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist([{"text": r["text"]} for r in rows]), tmp_path / "data/train-0.parquet"
    )
    (tmp_path / "data/test.json").write_text(json.dumps([{"text": "held out"}]))

    def texts(**spec):
        return [row.value["text"] for row in read_rows({"type": "text", **spec}, tmp_path)]

    assert texts(path="data") == [f"row {i}" for i in range(10)]
    assert texts(path="data", split="test") == ["held out"]
    assert texts(path="data", split="train[:20%]") == ["row 0", "row 1"]
    assert texts(path="data/train-0.parquet", split="[7:]") == ["row 7", "row 8", "row 9"]
    assert texts(path="data/train-0.parquet", split="[-1:]") == ["row 9"]
    for bad in (dict(path="data", split="dev"), dict(path="absent"), dict(path="data", split="train[x]")):
        with pytest.raises((DataError, ConfigError)):
            texts(**bad)
    with pytest.raises(ConfigError, match="pth"):
        list(read_rows({"pth": "x"}, tmp_path))


def test_a_dataset_on_the_hub_is_read_through_a_local_stand_in(tmp_path):
    files = tmp_path / "files"
    files.mkdir()
    write(files / "train.jsonl", [{"text": "from the hub"}])
    write(files / "test.jsonl", [{"text": "held out"}])
    code = (
        "import pathlib\nfrom text import rows\nfrom run import config\n"
        "for split in ('train', 'test'):\n"
        "    spec = {'path': 'hf://datasets/org/tiny', 'type': 'text', 'split': split}\n"
        "    print([row.value['text'] for row in rows.read_rows(spec, pathlib.Path('.'))])\n"
        "try: list(rows.read_rows({'path': 'hf://datasets/org/absent', 'type': 'text'}, pathlib.Path('.')))\n"
        "except config.BallastError as error: print('refused', error)\n"
    )
    done, _ = with_hub(code, files, tmp_path / "home", "datasets")
    lines = done.stdout.splitlines()
    assert lines[:2] == ["['from the hub']", "['held out']"], done.stderr
    assert lines[2].startswith("refused hf://datasets/org/absent")


def test_rows_from_reasoning_gym_are_the_same_for_a_seed(tmp_path):
    pytest.importorskip("reasoning_gym")
    spec = {"path": "reasoning-gym:chain_sum", "type": "instruct", "size": 5, "seed": 3}
    one, two = ([r.value["question"] for r in read_rows(spec, tmp_path)] for _ in range(2))
    assert one == two and len(one) == 5
    with pytest.raises(ConfigError, match="reasoning-gym"):
        list(read_rows({**spec, "path": "reasoning-gym:no_such_task"}, tmp_path))


CARD = """---
license: mit
configs:
- config_name: main
  data_files:
  - split: train
    path: main/train-*
  - split: test
    path: [main/test-*]
- config_name: socratic
  data_files: socratic/all.jsonl
---
# A data set
"""


def subsets(tmp_path, card=CARD):
    for name in ("main/train-0", "main/train-1", "main/test-0", "socratic/all", "other/train"):
        (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        write(tmp_path / "set" / f"{name}.jsonl", [{"text": name}])
    (tmp_path / "set" / "README.md").write_text(card)
    return lambda **spec: [
        r.value["text"] for r in read_rows({"path": "set", "type": "text", **spec}, tmp_path)
    ]


def test_a_subset_and_its_splits_are_those_that_the_card_of_the_data_set_names(tmp_path):
    read = subsets(tmp_path)
    assert read(name="main") == ["main/train-0", "main/train-1"]
    assert read(name="main", split="test") == ["main/test-0"]
    assert read(name="main", split="train[1:]") == ["main/train-1"]
    assert read(name="socratic") == ["socratic/all"]
    assert read(name="other") == ["other/train"]  # a folder of that name that the card does not know
    for spec, reason in (({}, "set name to one of main, socratic"), ({"name": "third"}, "main, socratic"),
                         ({"name": "main", "split": "dev"}, "no split.*train, test"),
                         ({"name": 3}, "must be text")):
        with pytest.raises(ConfigError, match=reason):
            read(**spec)


@pytest.mark.parametrize("card", ["", "# no front matter", "---\nconfigs: 3\n---\n", "---\n: [\n---\n",
                                  "---\nlicense: mit\n---\n"])
def test_a_card_that_names_no_files_changes_nothing(card, tmp_path):
    read = subsets(tmp_path, card)
    assert read(name="socratic") == ["socratic/all"]
    assert read() == read(name="default") == ["main/train-0", "main/train-1", "other/train"]


def test_a_default_subset_is_taken_where_none_is_named(tmp_path):
    card = CARD.replace("config_name: socratic", "config_name: socratic\n  default: true")
    assert subsets(tmp_path, card)() == ["socratic/all"]
    assert subsets(tmp_path, CARD.replace("config_name: main", "config_name: default"))() == [
        "main/train-0", "main/train-1",
    ]
