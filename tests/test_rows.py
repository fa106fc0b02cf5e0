"""Files, slices, the hub and generated tasks as rows."""

import json
import logging

import pytest

from conftest import with_hub, write
from run.config import ConfigError, DataError
from text.rows import Row, read_rows


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
                         ({"name": "main", "split": "dev"}, "not a split.*train, test"),
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


# ------------------------------------------------------------------------------------------------------------
# Which files of a folder are data
# ------------------------------------------------------------------------------------------------------------


def lay(folder, *names):
    for name in names:
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({"text": name}) + "\n", encoding="utf-8")
    return folder


def texts_of(folder, **spec):
    rows = list(read_rows({"path": str(folder), **spec}, folder))
    assert all(isinstance(row, Row) for row in rows), rows
    return sorted(row.value["text"] for row in rows)


@pytest.mark.parametrize("names, train, test", [
    (("data.jsonl", "test.jsonl"), ["data.jsonl"], ["test.jsonl"]),
    (("Train.jsonl", "Test.jsonl"), ["Train.jsonl"], ["Test.jsonl"]),
    (("training_data.jsonl", "test_data.jsonl"), ["training_data.jsonl"], ["test_data.jsonl"]),
    (("TRAIN.jsonl", "TEST.jsonl", "dev.jsonl"), ["TRAIN.jsonl"], ["TEST.jsonl"]),
    (("trainset.jsonl", "testset.jsonl"), ["trainset.jsonl"], ["testset.jsonl"]),
    (("myTrainData.jsonl", "myTestData.jsonl"), ["myTrainData.jsonl"], ["myTestData.jsonl"]),
    (("alpaca_data.jsonl", "alpaca_eval.jsonl"), ["alpaca_data.jsonl"], ["alpaca_eval.jsonl"]),
    (("a.jsonl", "b.jsonl", "held_out.jsonl"), ["a.jsonl", "b.jsonl"], ["held_out.jsonl"]),
    (("train/0.jsonl", "train/1.jsonl", "test/0.jsonl"), ["train/0.jsonl", "train/1.jsonl"],
     ["test/0.jsonl"]),
    (("train_test_split/train.jsonl", "train_test_split/test.jsonl"), ["train_test_split/train.jsonl"],
     ["train_test_split/test.jsonl"]),
    (("data.jsonl", "latest_news.test.jsonl"), None, None),
    (("mytrain.jsonl", "mytest.jsonl"), None, None),
    (("train_test.jsonl", "more.jsonl"), None, None),
    (("test.jsonl", "validation.jsonl"), None, ["test.jsonl"]),
])
def test_a_folder_is_read_by_the_names_that_people_give_to_splits(names, train, test, tmp_path):
    lay(tmp_path, *names)
    for split, expected in ((None, train), ("test", test)):
        if expected is None:
            with pytest.raises(DataError) as caught:
                texts_of(tmp_path, **({"split": split} if split else {}))
            assert "path" in str(caught.value) or "no file of split" in str(caught.value)
        else:
            assert texts_of(tmp_path, **({"split": split} if split else {})) == expected


def test_the_validation_split_has_several_names(tmp_path):
    for name in ("validation.jsonl", "Valid.jsonl", "val_set.jsonl", "dev.jsonl", "validation_data.jsonl"):
        folder = lay(tmp_path / name.split(".")[0], "training_data.jsonl", name)
        assert texts_of(folder) == ["training_data.jsonl"]
        assert texts_of(folder, split="validation") == texts_of(folder, split="dev") == [name]


def test_hidden_folders_copies_and_metadata_are_no_data(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("ballast"), "propagate", True)
    lay(tmp_path, "a.jsonl", "a copy.jsonl", "a (1).jsonl", "Copy of a.jsonl", "a_backup.jsonl", ".x/a.jsonl",
        ".ipynb_checkpoints/a-checkpoint.jsonl", "a-checkpoint.jsonl", "dataset_infos.json", "more.csv",
        "b.jsonl.gz")
    assert texts_of(tmp_path) == ["a.jsonl"]
    assert "left out as copies" in caplog.text and "more.csv" in caplog.text and "b.jsonl.gz" in caplog.text
    lone = lay(tmp_path / "lone", "a (1).jsonl")  # a copy of nothing that is there
    assert texts_of(lone) == ["a (1).jsonl"]


def test_a_folder_that_the_datasets_library_saved_is_read(tmp_path):
    import datasets

    rows = [{"text": f"row {i}", "n": i} for i in range(5)]
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "one")
    assert texts_of(tmp_path / "one") == [row["text"] for row in rows]
    both = datasets.DatasetDict({
        "train": datasets.Dataset.from_list(rows[:3]), "test": datasets.Dataset.from_list(rows[3:])})
    both.save_to_disk(tmp_path / "both")
    assert texts_of(tmp_path / "both") == ["row 0", "row 1", "row 2"]
    assert texts_of(tmp_path / "both", split="test") == ["row 3", "row 4"]


def test_json_files_are_read_whatever_they_hold(tmp_path):
    row, mark = {"messages": [{"role": "user", "content": "Hi"}], "text": "a"}, b"\xef\xbb\xbf"
    other = {"text": "b"}
    forms = {
        "list": json.dumps([row, other]), "lines": f"{json.dumps(row)}\n{json.dumps(other)}\n",
        "wrapped": json.dumps({"version": 1, "data": [row, other]}),
    }
    for name, text in forms.items():
        for begin in (b"", mark):
            (tmp_path / f"{name}.json").write_bytes(begin + text.encode())
            assert texts_of(tmp_path / f"{name}.json") == ["a", "b"], name
    (tmp_path / "one.json").write_bytes(mark + json.dumps(row).encode())
    (read,) = read_rows({"path": str(tmp_path / "one.json")}, tmp_path)
    assert read.value == row
    (tmp_path / "marked.txt").write_bytes(mark + b"plain")
    (read,) = read_rows({"path": str(tmp_path / "marked.txt"), "type": "text"}, tmp_path)
    assert read.value == {"text": "plain"}


@pytest.mark.parametrize(
    "cut, expected", [("train[:33%]", 3), ("train[33%:]", 6), ("train[-20%:]", 2), ("train[2:]", 7)]
)
def test_shares_are_rounded_as_in_the_datasets_library(cut, expected, tmp_path):
    (tmp_path / "train.jsonl").write_text("".join(f'{{"text": "{i}"}}\n' for i in range(9)))
    assert len(texts_of(tmp_path, split=cut)) == expected
    with pytest.raises(ConfigError, match="is not a slice"):
        texts_of(tmp_path, split="train[0:6:2]")
