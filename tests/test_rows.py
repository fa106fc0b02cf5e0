"""Files, slices, the hub and generated tasks as rows."""

import json

import pytest

from config import ConfigError, DataError
from conftest import with_hub, write
from rows import read_rows


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
        "import pathlib, rows, config\n"
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
