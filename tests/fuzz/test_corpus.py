"""Past failures of the fuzz run: each file of the corpus is refused by the right error, or loads rightly."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fuzz.target import Sample
from tests.fuzz.targets import CORPUS, TARGETS

EXPECTED: dict[str, str] = json.loads((CORPUS / "expected.json").read_text())
"""Path of an input -> a part of the error by which it is refused; "loads" for one that is not."""


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Sample]]:
    """The samples by target, each written when the first input asks for it."""

    class Samples(dict[str, Sample]):
        def __missing__(self, name: str) -> Sample:
            self[name] = Sample(TARGETS[name], tmp_path_factory.mktemp(name))
            self[name].warm()
            return self[name]

    yield Samples()


@pytest.mark.parametrize("path", sorted(EXPECTED))
def test_a_past_failure_stays_mended(path: str, samples: dict[str, Sample]) -> None:
    verdict = samples[Path(path).parts[0]].judge((CORPUS / path).read_bytes())
    assert not verdict.fault, verdict.told
    assert EXPECTED[path] in verdict.told


def test_every_input_of_the_corpus_has_an_expectation() -> None:
    files = {file.relative_to(CORPUS).as_posix() for file in CORPUS.rglob("*") if file.is_file()}
    assert files - {"expected.json"} == EXPECTED.keys()
    assert all(Path(path).parts[0] in TARGETS for path in EXPECTED)
