"""A conversation with a checkpoint on the terminal: python model.py chat DIR."""

import argparse
import sys

import torch

from checkpoints.adapters import (
    adapter_base,
    adapter_token_rows,
    apply_lora,
    load_adapter,
    read_adapter_options,
)
from checkpoints.weights import load_pretrained
from model import Transformer, block_linears
from rollouts.generation import generate
from run.config import CheckpointError, DataError, resolve_checkpoint
from text.templates import BadRow
from text.tokenizer import Tokenizer


def load_for_inference(directory: str, dtype: torch.dtype, device: str = "cpu") -> tuple[Transformer, str]:
    """Load a checkpoint, or a PEFT adapter on its base model; also returns the folder of the tokenizer."""
    path = resolve_checkpoint(directory)
    if not (path / "adapter_config.json").exists():
        return load_pretrained(str(path), dtype=dtype, device=device), str(path)
    name, revision = adapter_base(path)
    if not name:
        problem = "base_model_name_or_path is missing: which model does this adapter belong to?"
        raise CheckpointError(f"{path / 'adapter_config.json'}: {problem}")
    base = resolve_checkpoint(name, revision, path)
    rows = adapter_token_rows(path)
    model = load_pretrained(str(base), dtype=dtype, device=device, vocab_size=max(rows, default=-1) + 1)
    apply_lora(model, read_adapter_options(path, name, block_linears(model)), dtype, rows)
    load_adapter(model, path)
    return model.eval(), str(path if (path / "tokenizer.json").exists() else base)


def chat(argv: list[str]) -> None:
    """Run the command; `argv` are the arguments after its name."""
    parser = argparse.ArgumentParser(
        prog="model.py chat", description="Talk to a checkpoint; /new starts over, an empty line quits."
    )
    parser.add_argument("directory", help="a Hugging Face folder, a PEFT adapter or a hub id")
    parser.add_argument("--temperature", type=float, default=0.7, help="0 is greedy (default 0.7)")
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--max-new-tokens", type=int, default=512)
    parser.add_argument("--system", help="a system prompt")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model, tokenizer_directory = load_for_inference(arguments.directory, dtype, device)
    tokenizer = Tokenizer.load(tokenizer_directory)
    generator = torch.Generator(device).manual_seed(arguments.seed)
    begin = [{"role": "system", "content": arguments.system}] if arguments.system else []
    messages = list(begin)
    limit = model.arch.raw.get("max_position_embeddings")
    while True:
        try:
            text = input("you> " if sys.stdin.isatty() else "").strip()
        except (EOFError, KeyboardInterrupt):
            break
        if not text:
            break
        if text == "/new":  # a model that has only seen single questions does badly on a second one
            messages = list(begin)
            continue
        messages.append({"role": "user", "content": text})
        try:
            prompt = tokenizer.encode_prompt(messages)
        except BadRow as error:
            remedy = "chat needs a chat template"
            raise DataError(tokenizer_directory, None, str(error), remedy) from None
        if max(prompt) >= model.arch.vocab_size:
            raise CheckpointError(
                f"{tokenizer_directory}: the tokenizer gives id {max(prompt)}, the model has "
                f"{model.arch.vocab_size} rows: they do not belong together"
            )
        room = arguments.max_new_tokens if not limit else min(arguments.max_new_tokens, limit - len(prompt))
        if room < 1:
            print(f"The conversation has filled the model's {limit} positions; start again.")
            break
        reply = _stream_reply(
            model, tokenizer, prompt, max_new_tokens=room, temperature=arguments.temperature,
            top_p=arguments.top_p, generator=generator,
        )
        messages.append({"role": "assistant", "content": reply.strip()})


def _stream_reply(model: Transformer, tokenizer: Tokenizer, prompt: list[int], **how) -> str:
    """Print an answer while it is generated. Ctrl-C stops it."""
    ids: list[int] = []
    shown = ""

    def show(_: int, token: int) -> None:
        nonlocal shown
        ids.append(token)
        text = tokenizer.decode(ids)
        if not text.endswith("\ufffd"):  # wait for the rest of a multi-byte character
            print(text[len(shown) :], end="", flush=True)
            shown = text

    try:
        generate(model, [prompt], stop_token_ids=tokenizer.stop_ids, on_token=show, **how)
    except KeyboardInterrupt:
        print(" …", end="")
    print()
    return shown
