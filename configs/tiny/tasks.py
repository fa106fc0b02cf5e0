"""Rows of reasoning-gym as short conversations: the bare expression, not the sentence around it."""

from typing import Any


def arithmetic(row: dict) -> dict:
    """`426 + 562` → `988`; the question's other words are the same in every row and teach nothing."""
    return {
        "messages": [
            {"role": "user", "content": row["metadata"]["expression"]},
            {"role": "assistant", "content": row["answer"]},
        ]
    }


def calculate(expression: str) -> int:
    """The product of two whole numbers.

    Args:
        expression: the product, as in 12 * 34
    """
    a, b = expression.split("*")
    return int(a) * int(b)


def calculator() -> list[dict[str, Any]]:
    """What the chat template gets of it."""
    from rollouts.tools import schema_of  # not needed without tools

    return [schema_of(calculate)]


def with_tool_unused(row: dict) -> dict:
    """The answer from the head, though there is a calculator."""
    return {**arithmetic(row), "tools": calculator()}


def with_tool_used(row: dict) -> dict:
    """The answer that a call of the calculator gives."""
    question, answer = arithmetic(row)["messages"]
    call = {"name": "calculate", "arguments": {"expression": question["content"]}}
    told = [
        {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": call}]},
        {"role": "tool", "content": row["answer"]},
    ]
    return {"messages": [question, *told, answer], "tools": calculator()}
