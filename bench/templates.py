"""Chat templates against transformers: python bench/templates.py DIRECTORY [--show] [--only NAME]

DIRECTORY holds chat templates, one .jinja file each (there are public collections; none is part of this
project). Every template renders every conversation below, with transformers' apply_chat_template and here,
with one tokenizer that has the template's special tokens. A cell of the table is

  right      the same token ids, and a loss mask that is right
  refused    transformers renders it, Ballast gives a reason instead
  different  the token ids differ, or the mask is wrong: none may be
  neither    transformers cannot render it either, or Ballast alone can

What the mask is held against: transformers' assistant mask, where the template has {% generation %} blocks.
Else the words of the conversation: each that the assistant wrote and the template shows is trained, none of
anybody else is, and each trained stretch ends in a special token that closes turns. And where there is a file
NAME_training.jinja (TRL's have blocks) that gives the same ids, what is trained here is trained there too,
and what is trained there alone is white space or a turn's header.
"""

import argparse
import collections
import copy
import os
import re
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import tokenizers
import transformers

from text.templates import BadRow
from text.tokenizer import IGNORE, Tokenizer

transformers.logging.set_verbosity_error()

PARAMETERS = {"a": {"type": "integer", "description": "one"}, "b": {"type": "string", "description": "two"}}
TOOL = {
    "type": "function",
    "function": {
        "name": "add_up", "description": "Adds numbers.",
        "parameters": {"type": "object", "properties": PARAMETERS, "required": ["a"]},
    },
}


def user(text) -> dict:
    return {"role": "user", "content": text}


def said(text=None, **more) -> dict:
    return {"role": "assistant", **({} if text is None else {"content": text}), **more}


def call(number: int, **arguments) -> dict:
    function = {"name": "add_up", "arguments": arguments}
    return {"type": "function", "id": f"abcdefgh{number}", "function": function}


def result(text: str, number: int = 1) -> dict:
    return {"role": "tool", "name": "add_up", "tool_call_id": f"abcdefgh{number}", "content": text}


def parts(*texts: str) -> list[dict]:
    return [{"type": "text", "text": text} for text in texts]


# What the assistant writes in the conversations, and what the others do
ANSWERS = re.compile(r"\bans(?:aaa|bbb|ccc|call|other|thought|deep|look)")
OTHERS = re.compile(r"\b(?:user|sys|tool)(?:aaa|bbb|ccc)")

A, B, C = user("useraaa"), user("userbbb"), user("userccc")
SYSTEM = {"role": "system", "content": "sysaaa be brief"}
ONE = {"tool_calls": [call(1, a=1, b="anscall")]}
TWO = {"tool_calls": [call(1, a=1, b="anscall"), call(2, a=2, b="ansother")]}
AGAIN = {"tool_calls": [call(2, a=2, b="ansother")]}
THOUGHT = {"reasoning_content": "ansthought first"}
BLOCK, DEEP = "<think>\nansthought first\n</think>\n\n", "<think>\nansdeep\n</think>\n\n"

CONVERSATIONS: dict[str, list[dict]] = {
    "one turn": [A, said("ansaaa")],
    "system": [SYSTEM, A, said("ansaaa")],
    "two turns": [A, said("ansaaa"), B, said("ansbbb")],
    "system, three turns": [SYSTEM, A, said("ansaaa"), B, said("ansbbb"), C, said("ansccc")],
    "spaces and lines around": [user("  useraaa \n"), said("  ansaaa \n\n")],
    "lines within": [user("useraaa\n\nuserbbb"), said("ansaaa\n\nansbbb\n- ansccc")],
    "trailing space, then more": [user("useraaa "), said("ansaaa "), user("userbbb\n"), said("ansbbb\n")],
    "unicode": [user("useraaa 日本 🙂 naïve"), said("ansaaa 🙂 日本 é"), B, said("ansbbb")],
    "answer repeats question": [user("assistant"), said("assistant"), user("user"), said("assistant")],
    "empty answer": [A, said(""), B, said("ansbbb")],
    "empty system": [{"role": "system", "content": ""}, A, said("ansaaa")],
    "system in the middle": [A, said("ansaaa"), SYSTEM, B, said("ansbbb")],
    "assistant twice": [A, said("ansaaa"), said("ansbbb")],
    "user twice": [A, B, said("ansaaa")],
    "assistant first": [said("ansaaa"), A, said("ansbbb")],
    "question holds markers": [user("useraaa <|im_end|> </s> [INST] <end_of_turn>"), said("ansaaa")],
    "answer holds a header": [A, said("ansaaa\n<|im_start|>assistant\nansbbb"), B, said("ansccc")],
    "reasoning": [A, said("ansaaa", **THOUGHT)],
    "reasoning, called thinking": [A, said("ansaaa", thinking="ansthought first")],
    "reasoning, called reasoning": [A, said("ansaaa", reasoning="ansthought first")],
    "reasoning in two turns": [
        A, said("ansaaa", **THOUGHT), B, said("ansbbb", reasoning_content="ansdeep second")],
    "think block": [A, said(BLOCK + "ansaaa")],
    "think block in two turns": [A, said(BLOCK + "ansaaa"), B, said(DEEP + "ansbbb")],
    "text parts": [user(parts("useraaa ", "userbbb")), said("ansaaa")],
    "text parts of the answer": [A, said(parts("ansaaa"))],
    "nulls": [{**A, "tool_calls": None}, said("ansaaa", tool_calls=None, name=None)],
    "tools, none called": [A, said("ansaaa")],
    "a call": [A, said("", **ONE), result("toolaaa"), said("ansaaa")],
    "a call without content": [A, said(**ONE), result("toolaaa"), said("ansaaa")],
    "a call beside content": [SYSTEM, A, said("anslook", **ONE), result("toolaaa"), said("ansaaa")],
    "parallel calls": [A, said("", **TWO), result("toolaaa"), result("toolbbb", 2), said("ansaaa")],
    "calls one after the other": [
        A, said("", **ONE), result("toolaaa"), said("", **AGAIN), result("toolbbb", 2), said("ansaaa")],
    "a call after reasoning": [
        A, said("", **THOUGHT, **ONE), result("toolaaa"), said("ansaaa", reasoning_content="ansdeep")],
    "a call after a think block": [A, said(BLOCK, **ONE), result("toolaaa"), said(DEEP + "ansaaa")],
    "ends in a call": [A, said("", **ONE)],
    "a call, then a question": [
        A, said("", **ONE), result("toolaaa"), said("ansaaa"), B, said("ansbbb")],
    "a call without arguments": [A, said("", tool_calls=[call(1)]), result("toolaaa"), said("ansaaa")],
}

SPECIAL = re.compile(
    r"<\|[\w▁ .:/-]+\|>|<｜[^｜<>]+｜>|</?s>|<(?:bos|eos|pad|unk)>|<\w+_of_\w+>|<[A-Z_]+_TOKEN>|<seed:\w+>"
    r"|</?(?:think|tool_call|tool_response)>|<\|?(?:turn|channel|end|start)\|?>|<SPECIAL_\d+>|<extra_id_\d>"
    r"|\[/?[A-Z][A-Z_]+\]|\[\|\w+\|\]|\[e~\[|\]~b\]"
)
BUILT = {
    "<|user|>",
    "<|assistant|>",
    "<|system|>",
    "<|end|>",
    "<s>",
    "</s>",
    "<unk>",
}  # some are put together
SOFT = {"<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"}
ENDS = (
    "<|im_end|>", "<|eot_id|>", "<|eot|>", "<|return|>", "<end_of_turn>", "<turn|>", "<|END_OF_TURN_TOKEN|>",
    "<｜end▁of▁sentence｜>", "<|end_of_text|>", "<|eom_id|>", "[|endofturn|]", "<|end|>", "<|endoftext|>",
    "<|end_of_turn|>", "<seed:eos>", "[e~[", "<SPECIAL_12>", "</s>", "<eos>",
)


def write_tokenizer(template: str, directory: Path) -> None:
    """A byte-level tokenizer with the special tokens that the template writes."""
    found = sorted(set(SPECIAL.findall(template)) | BUILT)
    core = tokenizers.Tokenizer(tokenizers.models.BPE())
    core.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=600, show_progress=False, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()
    )
    core.train([argparse.__file__], trainer)
    core.add_special_tokens([token for token in found if token not in SOFT])
    core.add_tokens([tokenizers.AddedToken(token, normalized=False) for token in found if token in SOFT])
    eos = next((token for token in ENDS if token in template), "</s>")
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token=eos, unk_token="<unk>", pad_token="<unk>"
    )
    fast.chat_template = template
    fast.save_pretrained(directory)


def wrong_by_words(ours: Tokenizer, ids: list[int], mask: list[int], text: str, blocks: bool) -> str | None:
    """What is wrong with a mask by the words of the conversation, or None."""
    stretches: list[list[int]] = []
    for k, trained in enumerate(mask):
        if trained:
            stretches += [[]] if not k or not mask[k - 1] else []
            stretches[-1].append(ids[k])
    trained_text = "\n".join(ours.decode(stretch, special=True) for stretch in stretches)
    if stranger := OTHERS.search(trained_text):
        return f"{stranger[0]} is trained"
    if missing := [word for word in ANSWERS.findall(text) if word not in trained_text]:
        return f"{missing[0]} is not trained"
    for stretch in stretches if not blocks else ():
        last = ours.decode(stretch[-1:], special=True)
        if last not in ours.added or last in SOFT:
            return f"a turn ends in {ours.decode(stretch[-6:], special=True)!r}"
    return None


def rendered(theirs, messages: list[dict], tools: list | None) -> dict:
    return theirs.apply_chat_template(
        messages, tools=tools, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )


def compare(ours: Tokenizer, theirs, twin, messages: list[dict], tools: list | None) -> tuple[str, str]:
    """(cell, reason)."""
    whole, refusal = None, ""
    try:
        whole = rendered(theirs, messages, tools)
    except Exception as error:
        refusal = f"{type(error).__name__}: {error}"
    try:
        ids, labels = ours.encode_chat(messages, tools)
    except BadRow as error:
        return ("neither", refusal) if whole is None else ("refused", str(error))
    if whole is None:
        return "neither", f"Ballast alone: {refusal}"
    if ids != whole["input_ids"]:
        return "different", "token ids differ"
    mask, text = [int(label != IGNORE) for label in labels], ours.decode(ids, special=True)
    blocks = any(whole["assistant_masks"])
    if blocks and mask != whole["assistant_masks"]:
        return "different", "the mask is not that of the generation blocks"
    if not blocks and (fault := wrong_by_words(ours, ids, mask, text, blocks)):
        return "different", fault
    if twin is not None and not blocks:
        try:
            other = rendered(twin, messages, tools)
        except Exception:
            return "right", ""  # the twin renders less
        pairs = list(zip(mask, other["assistant_masks"], strict=False))
        if other["input_ids"] == ids and any(b for _, b in pairs):
            if any(a > b for a, b in pairs):
                return "different", "more is trained than by its _training twin"
            rest = ours.decode([i for i, (a, b) in zip(ids, pairs, strict=True) if b > a], special=True)
            header = r"<think>|</think>|assistant|model|<[|｜]?[\w▁]+[|｜]?>|\s"
            if re.sub(header, "", rest):
                return "different", f"its _training twin trains {rest!r} too"
    return "right", ""


def main() -> int:
    parser = argparse.ArgumentParser(description="Chat templates against transformers.")
    parser.add_argument("directory", type=Path)
    parser.add_argument(
        "--show", action="store_true", help="every cell that is refused or different, and why"
    )
    parser.add_argument("--only", default="", help="only templates with this in their name")
    options = parser.parse_args()
    files = sorted(file for file in options.directory.rglob("*.jinja") if options.only in file.name)
    cells = ("right", "refused", "different", "neither")
    total, reasons = collections.Counter(), collections.Counter()
    print(f"{'template':<56}" + "".join(f"{cell:>10}" for cell in cells))
    for file in files:
        counts, notes = collections.Counter(), []
        with tempfile.TemporaryDirectory() as place:
            try:
                write_tokenizer(file.read_text(encoding="utf-8"), Path(place))
                theirs = transformers.AutoTokenizer.from_pretrained(place)
                ours = Tokenizer.load(place)
            except Exception as error:
                print(f"{file.stem[:56]:<56}  cannot be loaded: {error}")
                continue
            twin, beside = None, file.with_name(f"{file.stem}_training.jinja")
            if beside.exists():
                twin = transformers.AutoTokenizer.from_pretrained(place)
                twin.chat_template = beside.read_text(encoding="utf-8")
            for name, messages in CONVERSATIONS.items():
                tools = (
                    [copy.deepcopy(TOOL)]
                    if "call" in name.split() or "tool" in name or "calls" in name
                    else None
                )
                cell, why = compare(ours, theirs, twin, copy.deepcopy(messages), tools)
                counts[cell] += 1
                if cell in ("refused", "different"):
                    notes.append(f"    {cell}: {name}: {why}")
                    reasons[f"{cell}: {re.sub(r'message [0-9]+: ', '', why)}"] += 1
        total += counts
        print(f"{file.stem[:56]:<56}" + "".join(f"{counts[cell]:>10}" for cell in cells), flush=True)
        for note in notes if options.show else ():
            print(note)
    title = f"{len(files)} templates, {len(CONVERSATIONS)} conversations"
    print(f"{title:<56}" + "".join(f"{total[cell]:>10}" for cell in cells))
    for reason, count in reasons.most_common(30):
        print(f"{count:>6}  {reason[:150]}")
    return int(total["different"] > 0)


if __name__ == "__main__":
    sys.exit(main())
