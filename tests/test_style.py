"""Habits that no linter checks: openings and indents of docstrings, one import style, units with "per"."""

import ast
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parent.parent
FOLDERS = ("qmoe_jax", "pallas_kernels", "benchmarks", "experiments", "tests")
FILES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "benchmarks").glob("*.md")]

OPENERS = re.compile(r"(What|Whether|How|Where|Which|Why|When)\b")
UNITS = "bits|bytes|codewords|experts|levels|milliseconds|reads|seconds|tokens|weights"
THINGS = "block|expert|group|layer|matrix|parameter|row|second|step|token|weight"
PER = re.compile(rf"\b({UNITS})( an? |_an?_)({THINGS})\b")
IS_NO = re.compile(r"\b(is|are) no\b(?! longer)")
SECTION = re.compile(r"^( *)(Args|Attributes|Raises|Returns|Yields):\n( *)\S", re.MULTILINE)

every_file = pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))


def docstrings(path: pathlib.Path) -> list[str]:
    """Docstrings of modules, classes, functions and constants."""
    constants = (
        node.value.value
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    )
    return [text for text in constants if isinstance(text, str)]


@every_file
def test_docstrings_say_what_is_done_or_held(path):
    """A summary is an imperative or a noun phrase, not an indirect question."""
    assert [text for text in docstrings(path) if OPENERS.match(text)] == []


@every_file
def test_prose_says_is_not_rather_than_is_no(path):
    found = [match[0] for text in docstrings(path) for match in IS_NO.finditer(text)]
    assert found == []


@every_file
def test_sections_of_docstrings_are_indented_by_four(path):
    sections = [match for text in docstrings(path) for match in SECTION.finditer(text)]
    assert [match[0] for match in sections if len(match[3]) != len(match[1]) + 4] == []


@every_file
def test_imports_have_one_style(path):
    text = path.read_text()
    assert path == pathlib.Path(__file__) or "from jax import numpy" not in text
    assert not re.search(r"^from jax import .*\bArray\b", text, re.MULTILINE), "Array comes from jaxtyping"


@pytest.mark.parametrize("path", [*FILES, *PAGES], ids=lambda path: str(path.relative_to(ROOT)))
def test_units_are_named_with_per(path):
    if path != pathlib.Path(__file__):
        assert [match[0] for match in PER.finditer(path.read_text())] == []


@pytest.mark.parametrize("path", sorted((ROOT / "tests").rglob("test_*.py")), ids=lambda path: path.name)
def test_tests_import_no_other_test(path):
    assert not re.search(r"^(from|import) [\w.]*\btest_", path.read_text(), re.MULTILINE)
