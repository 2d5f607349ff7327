"""The documentation: its links lead somewhere, both languages have the same pages and commands, the map is whole."""

import re
from itertools import chain
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PATTERNS = ("README*.md", "docs/*/*.md", "benchmarks/README.md", "test_tipc/**/*.md")
PAGES = sorted(chain.from_iterable(ROOT.glob(pattern) for pattern in PATTERNS))
NAMES = {path.name for path in ROOT.glob("docs/*/*.md")}
PAIRS = [("README.md", "README_en.md"), *((f"docs/zh/{name}", f"docs/en/{name}") for name in sorted(NAMES))]
BLOCK = re.compile(r"^ *```(\w*)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"`((?:\S+=\S+ )*(?:python|pip|sh|bash|make|curl) [^`\n]+)`")
MODULES = ("*.py", "*/*.py", "deploy/*/*.py", "models/cpu/*.py", "benchmarks/contenders/*.py")


def read(path):
    return (ROOT / path).read_text(encoding="utf-8")


def anchors(text):
    """The anchors that GitHub gives to the headings of a page."""
    titles = [re.sub(r"[`*]", "", title) for title in re.findall(r"^#+ (.*)$", BLOCK.sub("", text), re.MULTILINE)]
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", BLOCK.sub("", read(page))):
        if re.match(r"\w+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), link
        assert ROOT in target.parents
        if anchor:
            assert anchor in anchors(read(target)), link


@pytest.mark.parametrize("page", ["README.md", "README_en.md"])
def test_the_readme_is_short(page):
    assert len(read(page).splitlines()) <= 230


@pytest.mark.parametrize(("chinese", "english"), PAIRS)
def test_both_languages_have_the_same_pages_and_commands(chinese, english):
    """Blocks marked `text` hold what differs: drawings of folders, with remarks."""
    texts = [read(chinese), read(english)]
    first, second = ([match.groups() for match in BLOCK.finditer(text) if match[1] != "text"] for text in texts)
    assert first == second
    first, second = (sorted(COMMAND.findall(BLOCK.sub("", text))) for text in texts)
    assert first == second


@pytest.mark.parametrize("language", ["zh", "en"])
def test_the_map_has_a_line_for_every_module(language):
    text = read(f"docs/{language}/development.md")
    table = "\n".join(line.split("|")[1] for line in text.splitlines() if line.startswith("|"))
    named = set(re.findall(r"`([\w/]+\.py)`", table))
    modules = {path.relative_to(ROOT).as_posix() for pattern in MODULES for path in ROOT.glob(pattern)}
    assert named == {name for name in modules if not name.startswith("tests/") and not name.endswith("__init__.py")}
