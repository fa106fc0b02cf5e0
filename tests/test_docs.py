"""What the documentation, the benches and the drills' patches name must exist: functions, files, links,
configs."""

import ast
import graphlib
import importlib
import re
from types import ModuleType

import pytest
import yaml

from conftest import ROOT
from health import drill

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "bench" / "README.md"]
FOLDERS = ("numerics", "checkpoints", "text", "rollouts", "health", "run")
FILES = {  # module → file
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path
    for path in (*ROOT.glob("*.py"), *(p for folder in FOLDERS for p in (ROOT / folder).glob("*.py")))
    if path.name != "__init__.py"
}
MODULES = "|".join(map(re.escape, FILES))


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
        module = max((name for name in FILES if path.startswith(f"{name}.")), key=len)
        rest = path.removeprefix(f"{module}.").split(".")
        found = importlib.import_module(module)
        for name in rest:
            assert hasattr(found, name), path
            found = getattr(found, name)


GUIDE = (ROOT / "docs" / "stability.md").read_text(encoding="utf-8")


def test_the_guide_has_each_drill_and_a_picture_in_the_section_of_its_theme():
    sections = dict(part.split("\n", 1) for part in re.split(r"^## ", GUIDE, flags=re.M)[1:])
    themes = {drill.Drill.read(name).theme for name in drill.names()}
    assert themes <= {title.lower() for title in sections}
    for title, text in sections.items():
        mine = {name for name in drill.names() if drill.Drill.read(name).theme == title.lower()}
        assert set(re.findall(r"`(\w+)`", text)) & set(drill.names()) == mine, title
        rules = [name for name in mine if "rule" in drill.Drill.read(name).sees]
        assert (f"(stability-{title.lower()}.png)" in text) == (len(rules) > 1), title


QUOTED = re.findall(r"```python\n# ([\w/]+\.py): (\w+)\n(.*?)```", GUIDE, flags=re.S)


@pytest.mark.parametrize("file, function, lines", QUOTED, ids=[q[1] for q in QUOTED])
def test_lines_that_the_guide_quotes_stand_in_that_order_in_the_function(file, function, lines):
    source = (ROOT / file).read_text(encoding="utf-8")
    nodes = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.FunctionDef) and n.name == function]
    bodies = [(ast.get_source_segment(source, node) or "").splitlines() for node in nodes]

    def has(body: list[str]) -> bool:
        rest = iter(body)
        return all(any(line.strip() == quoted.strip() for line in rest) for quoted in lines.splitlines())

    assert any(has(body) for body in bodies), f"{file}: {function} has no longer {lines}"


def test_the_guide_quotes_code():
    assert len(QUOTED) == GUIDE.count("```python") > 10


def imports() -> tuple[dict[str, set[str]], dict[str, set[str]]]:
    """module → ours that it imports at its top; and those that a function of it imports."""
    top: dict[str, set[str]] = {name: set() for name in FILES}
    within: dict[str, set[str]] = {name: set() for name in FILES}
    for name, path in FILES.items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            named = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module:
                named += [node.module, *(f"{node.module}.{a.name}" for a in node.names)]
            (top if node in tree.body else within)[name].update(FILES.keys() & set(named) - {name})
    return top, within


def test_modules_import_downwards_and_never_a_recipe():
    top, within = imports()
    for name in top.keys() - {"sft", "grpo", "ebft"}:
        assert not (top[name] | within[name]) & {"sft", "grpo", "ebft"}, name
    # No circle, not even through an import inside a function; at most eight floors.
    assert max(layers({name: top[name] | within[name] for name in top}).values()) < 8


def layers(top: dict[str, set[str]]) -> dict[str, int]:
    """The floor of each module, above all that it imports. Raises for a circle."""
    floor: dict[str, int] = {}
    for name in graphlib.TopologicalSorter(top).static_order():
        floor[name] = 1 + max((floor[x] for x in top[name]), default=-1)
    return floor


def test_the_root_holds_seven_modules_and_folders_do_nothing_when_they_are_imported():
    assert {path.stem for path in ROOT.glob("*.py")} == {
        "sft", "grpo", "ebft", "model", "kernels", "data", "dist",
    }
    assert all((ROOT / folder / "__init__.py").read_text() == "" for folder in FOLDERS)


def test_a_recipe_reads_from_top_to_bottom():
    """The loop is the algorithm: short enough to be read at once, with its loss in the same file."""
    most = {"sft": 150, "grpo": 200, "ebft": 200}  # lines of main, or of the two mains of ebft.py
    for recipe, limit in most.items():
        tree = ast.parse(FILES[recipe].read_text(encoding="utf-8"))
        functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
        for node in functions:
            bound = limit if node.name in ("main", "structured", "strided") else 120
            assert node.end_lineno - node.lineno < bound, f"{recipe}.{node.name}"
        assert any(node.name.endswith("_loss") for node in functions)
        source = FILES[recipe].read_text(encoding="utf-8")
        assert ".backward()" in source and "dist.update(" in source


def test_an_import_inside_a_function_gives_its_reason():
    for name, path in FILES.items():
        lines = path.read_text(encoding="utf-8").splitlines()
        tree = ast.parse("\n".join(lines))
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                for inner in ast.walk(node):
                    if isinstance(inner, ast.Import | ast.ImportFrom):
                        above = lines[inner.lineno - 2].strip()
                        assert "#" in lines[inner.lineno - 1] or above.startswith(("#", "import", "from")), (
                            f"{name}:{inner.lineno}"
                        )


def test_the_drawing_of_the_imports_is_up_to_date():
    """One line a layer: a module stands above everything that it imports."""
    text = (ROOT / "docs" / "internals.md").read_text(encoding="utf-8")
    drawn = [line.split() for line in text.split("```text\n")[1].split("```")[0].splitlines()]
    top, within = imports()
    floor = layers({name: top[name] | within[name] for name in top})
    rows = [sorted(n for n in floor if floor[n] == k) for k in sorted(set(floor.values()), reverse=True)]
    assert [sorted(line) for line in drawn] == rows


def sources() -> dict[str, str]:
    """Python that no type checker reads: the benches, the patches in them, and those of the drills."""
    found = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "bench").glob("*.py")}
    for name, source in list(found.items()):
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Constant) and re.search(r"(?m)^(import|from) ", str(node.value)):
                found[f"{name}, string of line {node.lineno}"] = node.value
    for path in (*(ROOT / "drills").glob("*.yaml"), *(ROOT / "faults").glob("*.yaml")):
        found[path.name] = yaml.safe_load(path.read_text(encoding="utf-8")).get("patch") or ""
    return found


def test_what_benches_and_patches_take_from_our_modules_exists():
    checked = set()
    for label, source in sources().items():
        try:
            tree = ast.parse(source)
        except SyntaxError:  # prose with a line that begins with one of these words
            continue
        modules: dict[str, ModuleType] = {}
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                modules |= {a.asname or a.name: importlib.import_module(a.name)
                            for a in node.names if a.name in FILES}
            elif isinstance(node, ast.ImportFrom) and (node.module in FILES or node.module in FOLDERS):
                module = importlib.import_module(node.module)
                for a in node.names:
                    if f"{node.module}.{a.name}" in FILES:
                        modules[a.asname or a.name] = importlib.import_module(f"{node.module}.{a.name}")
                    else:
                        assert hasattr(module, a.name), f"{label}: {node.module}.{a.name}"
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                module = modules.get(node.value.id)
                assert module is None or hasattr(module, node.attr), f"{label}: {ast.unparse(node)}"
                checked.add((label, node.attr))
    assert ("drills.py", "in_parallel") in checked and any(label.endswith(".yaml") for label, _ in checked)
    assert any("string" in label and attribute == "build_model" for label, attribute in checked)
