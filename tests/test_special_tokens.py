"""Tokens that stand beside tokenizer.json, and what a tokenizer adds to a text, against transformers."""

import json
import logging

import pytest
import tokenizers
from tokenizers import normalizers, pre_tokenizers, processors

from conftest import write
from data import Encoder, RowOptions, read_prompts
from run.config import DataError
from text.tokenizer import IGNORE, Tokenizer

TEXT = "Go <new> now<|tool|> end <|im_end|>  <extra>\n<other> done <new>"


def folder(tokenizer_directory, tmp_path, changes=None, **files):
    """A tokenizer's files, with `changes` of tokenizer_config.json, and further files."""
    source = tokenizer_directory("chatml")
    for file in source.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((source / "tokenizer_config.json").read_text())
    config.pop("added_tokens_decoder", None)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, **(changes or {})}))
    for name, value in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(value))
    return tmp_path


def token(content, **flags):
    return {"content": content, "lstrip": False, "rstrip": False, "normalized": False, "single_word": False,
            "special": True, **flags}


def decoder(*tokens):
    old = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    return {"added_tokens_decoder": {
        **{str(i): token(text) for i, text in enumerate(old)},
        **{str(500 + i): entry for i, entry in enumerate(tokens)},
    }}


CASES = {
    "added_tokens.json": dict(added_tokens={"<new>": 501, "<|tool|>": 500}),
    "added_tokens_decoder": dict(changes=decoder(token("<new>"), token("<|tool|>", special=False))),
    "added_tokens_decoder that changes a known token": dict(changes=decoder(token("<new>")) | {
        "added_tokens_decoder": {**decoder(token("<new>"))["added_tokens_decoder"],
                                 "2": token("<|im_end|>", rstrip=True)}}),
    "additional_special_tokens": dict(changes={"additional_special_tokens": ["<new>", "<|tool|>"]}),
    "extra_special_tokens as a list": dict(changes={"extra_special_tokens": ["<|tool|>", "<extra>"]}),
    "extra_special_tokens as a dict": dict(changes={"extra_special_tokens": {"tool_token": "<|tool|>"}}),
    "a token of the model's own": dict(changes={"image_token": "<extra>"}),
    "an EOS that no other file has": dict(changes={"eos_token": "<other>"}),
    "special_tokens_map.json alone": dict(
        special_tokens_map={"eos_token": "<other>", "additional_special_tokens": ["<new>"]}),
    "special_tokens_map.json against added_tokens_decoder": dict(
        changes=decoder(token("<new>")), special_tokens_map={"eos_token": "<|endoftext|>"}),
    "special_tokens_map.json against tokenizer_config.json": dict(
        changes={"eos_token": "<|im_end|>"}, special_tokens_map={"eos_token": {"content": "<|endoftext|>"}}),
    "all of them": dict(
        changes={"extra_special_tokens": ["<extra>"]}, added_tokens={"<new>": 500, "<extra>": 501},
        special_tokens_map={"pad_token": "<|im_end|>"}),
}


@pytest.mark.parametrize("case", CASES)
def test_tokens_of_every_file_are_those_that_transformers_has(case, tokenizer_directory, tmp_path):
    import transformers

    path = folder(tokenizer_directory, tmp_path, **CASES[case])
    theirs, ours = transformers.AutoTokenizer.from_pretrained(path), Tokenizer.load(path)
    assert ours.encode(TEXT) == theirs(TEXT, add_special_tokens=False).input_ids
    assert len(ours) == len(theirs) and ours.special["eos_token"] == theirs.eos_token
    assert ours.special["pad_token"] == theirs.pad_token

    ours.save(tmp_path / "saved")
    saved = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    again = Tokenizer.load(tmp_path / "saved")
    assert saved(TEXT, add_special_tokens=False).input_ids == again.encode(TEXT) == ours.encode(TEXT)
    assert saved.eos_token == again.special["eos_token"] == theirs.eos_token
    assert saved.pad_token == theirs.pad_token


def test_an_override_of_special_tokens_is_what_the_saved_tokenizer_has(tokenizer_directory, tmp_path):
    import transformers

    path = folder(tokenizer_directory, tmp_path, special_tokens_map={"eos_token": "<|im_end|>"})
    special = {"eos_token": "<|endoftext|>", "pad_token": "<mine>"}
    options = RowOptions(special_tokens=special, tokens=["<new>"])
    ours = Tokenizer.load(path).configure(options, tmp_path)
    ours.save(tmp_path / "saved")
    saved = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert (saved.eos_token, saved.pad_token) == ("<|endoftext|>", "<mine>")
    assert saved(TEXT, add_special_tokens=False).input_ids == ours.encode(TEXT)


@pytest.mark.parametrize("decoder", [{"x": "<new>"}, ["<new>"], {"5": {"text": "<new>"}}])
def test_tokens_that_cannot_be_read_are_refused_in_one_line(decoder, tokenizer_directory, tmp_path):
    with pytest.raises(DataError, match=r"tokenizer_config\.json.*added tokens"):
        Tokenizer.load(folder(tokenizer_directory, tmp_path, {"added_tokens_decoder": decoder}))


# ------------------------------------------------------------------------------------------------------------
# What a tokenizer adds to a text
# ------------------------------------------------------------------------------------------------------------


def changed(tokenizer_directory, tmp_path, change):
    """A tokenizer whose core was changed by `change`."""
    path = folder(tokenizer_directory, tmp_path)
    core = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
    change(core)
    core.save(str(path / "tokenizer.json"))
    return Tokenizer.load(path)


def wrap(bos, eos):
    tokens = [(t, i) for t, i in (("<|im_start|>", 1), ("<|endoftext|>", 0))]
    single = " ".join([*(["<|im_start|>"] if bos else []), "$A", *(["<|endoftext|>"] if eos else [])])

    def change(core):
        core.post_processor = processors.TemplateProcessing(single=single, special_tokens=tokens)

    return change


def prepend(core):
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])


def prefix_space(core):
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)


def row(tok, tmp_path, kind, **columns):
    ids, labels = Encoder(kind, tok, RowOptions(), tmp_path).encode(columns)
    return ids, [i for i, label in zip(ids, labels, strict=True) if label != IGNORE]


@pytest.mark.parametrize("bos, eos", [(True, False), (False, True), (True, True)])
def test_bos_begins_a_row_once_and_eos_ends_it_once(bos, eos, tokenizer_directory, tmp_path):
    tok = changed(tokenizer_directory, tmp_path, wrap(bos, eos))
    end = tok.eos_id
    start = [1] if bos else []
    prompt, answer = tok.encode("2+2="), tok.encode("four")
    ids, trained = row(tok, tmp_path, "prompt_completion", prompt="2+2=", completion="four")
    assert ids == [*start, *prompt, *answer, end] and trained == [*answer, end]
    ids, trained = row(tok, tmp_path, "text", text="four")
    assert ids == trained == [*start, *answer, end]
    # Texts that hold them already
    assert row(tok, tmp_path, "text", text=("<|im_start|>" if bos else "") + "four<|im_end|>")[0] == ids
    ids, trained = row(tok, tmp_path, "prompt_completion", prompt="2+2=", completion="four<|im_end|>")
    assert ids == [*start, *prompt, *answer, end] and trained == [*answer, end]
    path = write(tmp_path / "p.jsonl", [{"prompt": "2+2=", "answer": "four"}])
    prompts, _ = read_prompts([{"path": path, "type": "prompt_completion"}], tok, RowOptions(), tmp_path)
    assert prompts[0].ids == [*start, *prompt]


@pytest.mark.parametrize("change", [prepend, prefix_space], ids=["Prepend", "add_prefix_space"])
def test_no_space_is_put_between_a_prompt_and_its_completion(change, tokenizer_directory, tmp_path):
    tok = changed(tokenizer_directory, tmp_path, change)
    for answer in ("four", " four", "\n\nfour", "4", "ä<|im_start|>"):
        ids, trained = row(tok, tmp_path, "prompt_completion", prompt="2+2=", completion=answer)
        text = tok.decode(ids, special=True)
        whole = tok.decode([*tok.encode(f"2+2={answer}"), tok.eos_id], special=True)
        assert text == whole, answer
        assert len(trained) <= len(tok.encode(answer)) + 1


def test_a_tokenizer_that_adds_nothing_encodes_a_completion_as_it_stands(tokenizer_directory, tmp_path):
    tok = Tokenizer.load(tokenizer_directory("chatml"))
    for text in ("four", " four", "\n\nfour", "", "日本"):
        assert tok.encode_rest(text) == tok.encode(text) == tok.encode_start(text)


def test_a_prefix_space_that_two_files_disagree_about_is_said(
    tokenizer_directory, tmp_path, caplog, monkeypatch
):
    monkeypatch.setattr(logging.getLogger("ballast"), "propagate", True)
    Tokenizer.load(folder(tokenizer_directory, tmp_path, {"add_prefix_space": False}))
    assert "add_prefix_space" not in caplog.text
    Tokenizer.load(folder(tokenizer_directory, tmp_path, {"add_prefix_space": True}))
    assert "add_prefix_space is True in tokenizer_config.json and False in tokenizer.json" in caplog.text


def test_tokens_that_the_config_would_split_are_refused(tokenizer_directory, tmp_path):
    with pytest.raises(DataError, match="split_special_tokens"):
        Tokenizer.load(folder(tokenizer_directory, tmp_path, {"split_special_tokens": True}))
