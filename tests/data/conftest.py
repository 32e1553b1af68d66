"""A tokenizer for the tests of this folder."""

import pytest

from qmoe_jax.data import Tokenizer
from tests.helpers.tokenizers import train_tokenizer

SENTENCES = (
    "the cat sat, on the mat",
    "a dog walked after the cat",
    "we walk the dog and see the cat sing",
)


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    return Tokenizer(train_tokenizer(folder / "spiece.model", SENTENCES * 20, 60))
