"""The options' page is what the dataclasses say; every config that is shipped loads and is valid."""

import pytest

import ebft
import grpo
import sft
from config import options_page, parse_config
from conftest import ROOT
from health import recipe_config

CONFIGS = sorted((ROOT / "configs").rglob("*.yaml")) + sorted((ROOT / "drills" / "base").glob("*.yaml"))


def test_the_page_of_options_is_up_to_date():
    page = options_page({"sft": sft.Config, "grpo": grpo.Config, "ebft": ebft.Config})
    assert page == (ROOT / "docs" / "configs.md").read_text(encoding="utf-8"), (
        "run python config.py > docs/configs.md"
    )
    rows = [line for line in page.splitlines() if line.startswith("| `")]
    assert len(rows) > 150 and not [row for row in rows if row.endswith("|  |")], (
        "an option without its meaning"
    )


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_config_that_is_shipped_is_valid_and_belongs_to_one_recipe(path):
    config = recipe_config(["--config", str(path)])
    assert type(config) in (sft.Config, grpo.Config, ebft.Config)
    named = next((n for n in ("sft", "grpo", "ebft") if path.stem.startswith(n)), None)
    assert named is None or type(config).__module__ == named
    again = parse_config(type(config), ["--config", str(path), "max_steps=3"])
    assert again.max_steps == 3
