"""What the documentation names must exist: functions, files, links, configs."""

import importlib
import re

import pytest

from conftest import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "bench" / "README.md"]
MODULES = "|".join(path.stem for path in ROOT.glob("*.py"))


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_and_files_that_a_page_names_exist(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        if not target.startswith(("http:", "https:")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
    for name in re.findall(r"\b((?:bench|tests|configs|drills|docs)/[\w./-]+\.(?:py|yaml|md|png))\b", text):
        assert (ROOT / name).exists() or "higher_lower" in name, f"{page.name} names {name}"


@pytest.mark.parametrize("page", ["internals.md", "drills.md"])
def test_every_function_that_a_walk_names_exists(page):
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    named = re.findall(rf"`((?:{MODULES})\.[A-Za-z_.]+)`", text)
    assert len(named) > 40
    for path in named:
        module, *rest = path.split(".")
        found = importlib.import_module(module)
        for name in rest:
            assert hasattr(found, name), path
            found = getattr(found, name)
