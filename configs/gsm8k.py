"""Rows of GSM8K (openai/gsm8k): prompts with the final number as their answer, or with the worked answer."""

import re

SYSTEM = "Reason step by step, then give the final number alone on the last line after ####."


def prompt(row: dict) -> dict:
    return {
        "messages": [{"role": "system", "content": SYSTEM}, {"role": "user", "content": row["question"]}],
        "answer": row["answer"].split("####")[-1].strip(),
    }


def worked(row: dict) -> dict:
    """The whole answer as the true completion, without the calculator's annotations <<…>>."""
    answer = re.sub(r"<<.*?>>", "", row["answer"])
    return {"messages": [*prompt(row)["messages"], {"role": "assistant", "content": answer}]}


def strict(completions: list, answer: list, **_) -> list[float]:
    """1 where the number after #### is the answer, to the letter: the shape counts, not only the number."""
    scores = []
    for completion, expected in zip(completions, answer, strict=True):
        _, mark, last = completion[0]["content"].rpartition("####")
        scores.append(float(bool(mark) and last.strip().replace(",", "") == expected.replace(",", "")))
    return scores
