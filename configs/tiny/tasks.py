"""Rows of reasoning-gym as short conversations: the bare expression, not the sentence around it."""


def arithmetic(row: dict) -> dict:
    """`426 + 562` → `988`; the question's other words are the same in every row and teach nothing."""
    return {
        "messages": [
            {"role": "user", "content": row["metadata"]["expression"]},
            {"role": "assistant", "content": row["answer"]},
        ]
    }
