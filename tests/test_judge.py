"""A language model as a judge: requests, retries, the cache, the cost, and what goes wrong (a real server:
test_vllm.py)."""

import asyncio
import json
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from conftest import ROOT, embedded, metrics, options, run_program
from rollouts.judge import Judge
from run.config import BallastError, ConfigError


class FakeJudge:
    """A server that gives as many points as the answer has letters; `faults`: its first statuses."""

    def __init__(self, faults=(), reply=None):
        self.bodies, self.seen, self.at_once, self.most = [], Counter(), 0, 0
        self.faults, lock, fake = list(faults), threading.Lock(), self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_):
                pass

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    fake.at_once += 1
                    fake.most = max(fake.most, fake.at_once)
                    fake.bodies.append((body, self.headers.get("Authorization"), self.path))
                    status = fake.faults.pop(0) if fake.faults else 200
                said = body["messages"][0]["content"].rsplit("Given answer: ", 1)[-1].split("\n")[0]
                text = reply if reply is not None else f"Let me see: 3 letters? Score: {min(len(said), 10)}"
                answer = {"choices": [{"message": {"content": text}}],
                          "usage": {"prompt_tokens": 100, "completion_tokens": 10}}
                with lock:
                    fake.at_once -= 1
                data = json.dumps(answer if status == 200 else {"error": "no such model"}).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def judged(tmp_path):
    """judged(texts, fake, …): the scores of these texts, and the judge."""
    def score(texts, fake, **changes):
        config = options(
            reward_funcs=["llm_judge"], judge_base_url=fake.url, output_dir=str(tmp_path),
            **{"judge_retries": 2, "judge_model": "m", **changes},
        )
        judge = Judge(config)
        chats = [[{"role": "assistant", "content": text}] for text in texts]
        questions = [[{"role": "user", "content": f"q{k}"}] for k in range(len(texts))]
        return asyncio.run(judge.llm_judge(
            prompts=questions, completions=chats, answer=[f"right{k}" for k in range(len(texts))],
            completion_ids=[[1]] * len(texts),
        )), judge

    return score


def test_each_answer_is_asked_for_with_its_question_and_its_score_is_scaled(judged, monkeypatch):
    monkeypatch.setenv("JUDGE_API_KEY", "secret")
    fake = FakeJudge()
    scores, judge = judged(["abc", "abcdef", ""], fake, judge_price=[2.0, 10.0])
    assert scores == [0.3, 0.6, 0.0]
    body, key, path = min(fake.bodies, key=lambda one: one[0]["messages"][0]["content"])
    assert key == "Bearer secret" and path == "/v1/chat/completions" and body["temperature"] == 0
    content = body["messages"][0]["content"]
    assert "Question: q0\n" in content and "Right answer: right0\n" in content and "answer: abc\n" in content
    found = judge.metrics()
    assert found["judge/replies"] == 3 and found["judge/tokens"] == 330
    assert found["judge/cost"] == pytest.approx((300 * 2 + 30 * 10) / 1e6)


def test_what_was_asked_before_comes_from_the_disk(judged):
    fake = FakeJudge()
    first, _ = judged(["abc", "de"], fake)
    again, judge = judged(["abc", "de", "fghi"], fake)
    assert again[:2] == first and len(fake.bodies) == 3 and judge.metrics()["judge/cached"] == 2
    judged(["abc"], fake, judge_model="other")
    assert len(fake.bodies) == 4  # another judge is asked anew


def test_a_busy_server_is_asked_again(judged, monkeypatch):
    waited = []

    async def at_once(seconds):
        waited.append(seconds)

    monkeypatch.setattr(asyncio, "sleep", at_once)
    scores, _ = judged(["abc"], FakeJudge(faults=[429, 503]))
    assert scores == [0.3] and waited == [1.0, 2.0]
    with pytest.raises(BallastError, match="answered 500, 3 times; is the server running"):
        judged(["abcd"], FakeJudge(faults=[500] * 3))
    with pytest.raises(BallastError, match=r"answered 404: .*no such model"):
        judged(["abcde"], FakeJudge(faults=[404]))


@pytest.mark.parametrize("reply, score", [
    ("7", 0.7), ("I think 3 of 5, so: 6.5", 0.65), ("none", None), ("11", None), ("", None), ("-1", None)
])
def test_a_reply_without_a_score_in_the_range_gives_none(reply, score, judged):
    scores, judge = judged(["abc"], FakeJudge(reply=reply))
    assert scores == [score] and judge.metrics()["judge/without_score"] == (score is None)


def test_no_more_than_judge_workers_are_asked_at_a_time(judged):
    fake = FakeJudge()
    judged([f"a{k}" for k in range(30)], fake, judge_workers=3)
    assert len(fake.bodies) == 30 and fake.most <= 3


@pytest.mark.parametrize("changes, named", [
    (dict(reward_funcs=["llm_judge"]), "judge_model"), (dict(judge_pattern="("), "judge_pattern"),
    (dict(judge_pattern="x"), "judge_pattern"), (dict(judge_range=[1.0]), "judge_range"),
])
def test_options_of_the_judge_that_cannot_work_are_refused(changes, named):
    with pytest.raises(ConfigError, match=named):
        options(**changes)


def test_a_run_learns_from_a_judge_and_says_what_it_cost(task, small_checkpoint, tmp_path):
    fake = FakeJudge()
    chosen = ("reward_funcs=[llm_judge]", f"judge_base_url={fake.url}", "judge_model=m", "max_steps=2")
    done = run_program(ROOT / "grpo.py", *embedded(task, small_checkpoint[0], tmp_path / "run", *chosen))
    assert done.returncode == 0, done.stderr
    rows = [row for row in metrics(tmp_path / "run") if row["step"]]
    assert rows[-1]["judge/replies"] >= len(fake.bodies) > 8 and "rewards/llm_judge/mean" in rows[0]
    assert "llm_judge: " in done.stdout and "tokens read" in done.stdout
