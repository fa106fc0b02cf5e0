"""The true completions that EBFT compares with: one per row, or several in a conversation."""

from collections.abc import Sequence
from typing import Any

from rollouts.rollout import Rollout
from run.config import DataError
from text.prompt import Prompt
from text.templates import BadRow
from text.tokenizer import IGNORE, Tokenizer

Truth = tuple[list[int], list[int] | None]  # token ids, and a mask: 1 on answers (None: all)


def true_completion(prompt: Prompt, tokenizer: Tokenizer, max_turns: int = 1) -> Truth:
    """The row's true completion as the policy would have to write it, end token included: `ground_truth`,
    else the answer after the prompt, else `answer`. With `remaining_turns`, all that follows the prompt."""
    candidates = (prompt.columns.get("ground_truth"), prompt.completion, prompt.columns.get("answer"))
    answer = next((c for c in candidates if isinstance(c, str) and c), None)
    remaining = prompt.columns.get("remaining_turns") or []
    if answer is None:
        raise DataError(prompt.name, None, "has no true completion", "EBFT compares with one")
    if isinstance(prompt.prompt, str):
        if remaining:
            raise DataError(prompt.name, None, "has remaining_turns, but its prompt is no list of messages")
        return tokenizer.encode_rest(answer) + ([] if tokenizer.eos_id is None else [tokenizer.eos_id]), None
    questions = questions_of(remaining, prompt.name)
    if len(questions) >= max_turns:
        raise DataError(
            prompt.name, None, f"has {len(questions) + 1} answers", f"raise max_turns ({max_turns})"
        )
    tools, more = prompt.tools, prompt.columns.get("chat_template_kwargs") or {}
    messages = [*prompt.prompt, {"role": "assistant", "content": answer}, *remaining]
    begin, asked = len(prompt.ids), len(prompt.prompt)
    try:
        ids, labels = tokenizer.encode_chat(messages, tools, **more)
        rendered = tokenizer.render(messages, tools, **more)
        answers = [i for i in range(asked, len(messages) - 1) if messages[i]["role"] == "assistant"]
        same = ids[:begin] == prompt.ids and all(
            rendered.startswith(tokenizer.render(messages[: i + 1], tools, **more)) for i in answers
        )
    except BadRow as error:
        raise DataError(prompt.name, None, str(error)) from None
    if remaining and not same:  # what the policy reads back would not be what it wrote
        raise DataError(
            prompt.name, None, "has remaining_turns, but the chat template changes earlier turns",
            "set strip_thinking: true, or another chat_template, e.g. chatml",
        )
    last = max(i for i, label in enumerate(labels) if label != IGNORE)
    stops, begin_of_last = set(tokenizer.stop_ids), last
    while begin_of_last and labels[begin_of_last - 1] != IGNORE:
        begin_of_last -= 1
    # A generation block may hold white space behind the end of the turn, which the policy never writes
    last = max((i for i in range(begin_of_last, last + 1) if ids[i] in stops), default=last)
    if ids[:begin] != prompt.ids:  # the template renders past turns differently from the next one
        begin = begin_of_last
    mask = [int(label != IGNORE) for label in labels[begin : last + 1]]
    return ids[begin : last + 1], mask if remaining else None


def questions_of(remaining: list[dict], name: str = "") -> list[list[dict]]:
    """The messages before each answer in `remaining_turns`. Raises DataError that names the row."""
    questions, question = [], []
    for message in remaining:
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise DataError(name, None, "remaining_turns must be a list of messages with text")
        if message.get("role") == "assistant":
            if not question:
                raise DataError(name, None, "remaining_turns has an answer without a question before it")
            questions.append(question)
            question = []
        else:
            question.append(message)
    if remaining and question:
        raise DataError(name, None, "remaining_turns must end with an answer")
    return questions


class Conversation:
    """The environment of a multi-turn row: asks the row's next question, whatever the policy answered."""

    def reset(self, prompt: Any, remaining_turns: Sequence[dict] = (), **columns: Any) -> None:
        self.questions = questions_of(list(remaining_turns))

    def step(self, text: str, ids: list[int]) -> tuple[list[dict] | None, float, bool]:
        return (self.questions.pop(0), 0.0, False) if self.questions else (None, 0.0, True)


def true_rollout(rollout: Rollout) -> Rollout:
    """A rollout with the true completion in place of the sampled one."""
    assert rollout.ground_truth_ids is not None
    mask = rollout.ground_truth_mask
    return Rollout(rollout.prompt_ids, rollout.ground_truth_ids, completion_mask=mask, row=rollout.row)
