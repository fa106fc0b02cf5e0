"""Environments of other libraries as ours: a class of yours says how text becomes an action, and an
observation text.

    class Blackjack(Gymnasium):
        make = staticmethod(lambda: gymnasium.make("Blackjack-v1"))

        def action(self, text):
            return {"stick": 0, "hit": 1}[text.strip().lower()]

        def text(self, observation):
            return f"You have {observation[0]}, the dealer shows {observation[1]}. stick or hit?"

and `environment: my_games.Blackjack`. An answer that `action` cannot read, for which it raises ValueError or
KeyError, is answered with an error text and costs `penalty`.
"""

from abc import ABC, abstractmethod
from typing import Any

from rollouts.environments import finished


class Bridge(ABC):
    """What both kinds share. Observations go to the policy as messages of the user."""

    make: Any  # a static method without arguments: the environment
    penalty = 0.0  # reward of an answer that is no action

    def action(self, text: str) -> Any:
        """The action that an answer stands for."""
        return text

    def text(self, observation: Any) -> str:
        """What the policy reads of an observation."""
        return str(observation)

    def seed(self, columns: dict[str, Any]) -> int | None:
        """From a row's columns: its `seed`, so that the completions of a prompt play the same game."""
        return columns.get("seed")

    def reset(self, prompt: Any, **columns: Any) -> list[dict]:
        self.world, self.columns = self.make(), columns
        return self._say(self.text(self._begin()))

    def step(self, text: str, ids: list[int]) -> tuple[list[dict] | None, float, bool]:
        try:
            action = self.action(text)
        except (ValueError, KeyError) as error:
            return self._say(f"error: {text.strip()!r} is no action ({error})"), self.penalty, False
        observation, reward, done = self._act(action)
        if done:
            self._close()
        return self._say(self.text(observation)), float(reward or 0.0), done

    def _say(self, text: str) -> list[dict]:
        return [{"role": "user", "content": text}]

    def _close(self) -> None:
        close = getattr(self.world, "close", None)
        if callable(close):
            finished(close())

    @abstractmethod
    def _begin(self) -> Any:
        """Begin a game: its first observation."""

    @abstractmethod
    def _act(self, action: Any) -> tuple[Any, float, bool]:
        """(observation, reward, whether it is over) after an action."""


class Gymnasium(Bridge):
    """reset(seed=…) → (observation, info); step(action) → (observation, reward, terminated, truncated,
    info)."""

    def _begin(self) -> Any:
        observation, _ = self.world.reset(seed=self.seed(self.columns))
        return observation

    def _act(self, action: Any) -> tuple[Any, float, bool]:
        observation, reward, terminated, truncated, _ = self.world.step(action)
        return observation, float(reward), bool(terminated or truncated)


class OpenEnv(Bridge):
    """A client of OpenEnv: reset() and step(action) → an object with observation, reward and done, plain or
    async."""

    def _begin(self) -> Any:
        return finished(self.world.reset()).observation

    def _act(self, action: Any) -> tuple[Any, float, bool]:
        result = finished(self.world.step(action))
        return result.observation, float(result.reward or 0.0), bool(result.done)
