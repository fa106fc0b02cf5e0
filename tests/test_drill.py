"""Drills: each file says all that a reader needs; what counts as seen; two of them as a user runs them. All
are run by bench/drills.py, which .ci/run calls."""

import pytest
import yaml

from conftest import run_program
from health import drill, rules
from health.drill import Drill, Outcome

NAMES = drill.names()


@pytest.mark.parametrize("name", NAMES)
def test_a_drill_says_what_breaks_what_is_seen_and_what_mends_it(name):
    found = Drill.read(name)
    assert found.breaks.endswith(".") and found.why.endswith(".") and len(found.why) > 40
    assert found.options or found.patch, "nothing is broken"
    assert found.fix or found.patch, "nothing is fixed"
    assert (drill.HERE / "base" / f"{found.base}.yaml").exists()
    if "rule" in found.sees:
        assert found.sees["rule"] in {rule.name for rule in rules.RULES} and found.sees["within"] > 0
    else:
        assert found.sees["error"]
    if found.patch:
        compile(found.patch, name, "exec")


def test_there_is_a_drill_for_every_failure_of_the_page():
    assert len(NAMES) >= 30
    assert {Drill.read(name).base for name in NAMES} == {"sft", "grpo", "ebft"}


def test_every_base_keeps_the_pages_ranges_and_says_why_where_it_does_not():
    for path in sorted((drill.HERE / "base").glob("*.yaml")):
        (line,) = [x for x in path.read_text().splitlines() if x.startswith("health_rules")]
        assert yaml.safe_load(line)["health_rules"].keys() == {"step_time_jump"} and "#" in line
    for name in NAMES:
        assert set(Drill.read(name).options.get("health_rules", {})) <= {"step_time_jump"}


def test_an_outcome_counts_only_what_its_drill_expects():
    spoken = Outcome(0, "loss_spike", 12, rules=["loss_spike", "overfitting"])
    assert spoken.shows({"rule": "loss_spike", "within": 12}) and not spoken.well
    assert not spoken.shows({"rule": "loss_spike", "within": 11})
    assert not spoken.shows({"rule": "overfitting", "within": 50})
    assert not Outcome(1, error="error: x").shows({"error": "x"})
    assert Outcome(2, error="error: x of y").shows({"error": "x.*y"})
    assert Outcome(0).well and not Outcome(2).well


@pytest.mark.slow
def test_two_drills_as_a_user_runs_them(tmp_path):
    for name, seen in (
        ("loss_on_prompts", "trained_on_prompts"),
        ("reward_not_importable", "cannot be imported"),
    ):
        place = f"pathlib.Path({str(tmp_path)!r})"
        code = f"import pathlib; from health import drill; assert drill.show({name!r}, {place})"
        program = tmp_path / "try.py"
        program.write_text(code)
        done = run_program(program)
        assert done.returncode == 0, done.stdout + done.stderr
        assert (
            seen in done.stdout and "BUT" not in done.stdout and "well from beginning to end" in done.stdout
        )
        assert (tmp_path / "checkpoint").exists() == (
            name == "reward_not_importable"
        )  # made where it is needed


def test_an_unknown_drill_is_one_line():
    for name in ("no_such", "base/sft"):  # a file that is there, but no drill
        done = run_program("health", "drill", name)
        assert done.returncode == 2 and done.stderr.startswith(f"error: drill: {name!r}")
        assert "Traceback" not in done.stderr
