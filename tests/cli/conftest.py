"""Fixtures of the commands' tests: a tiny model with a tokenizer and texts, and its artifact."""

import json
import pathlib
import shutil

import pytest

from tests.helpers.cli_runs import answer, compress_arguments
from tests.helpers.tokenizers import random_texts, train_tokenizer


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> pathlib.Path:
    """A folder with tokenizer.model, of about 300 pieces, and texts.jsonl, of two splits."""
    folder = tmp_path_factory.mktemp("texts")
    texts = random_texts(200)
    train_tokenizer(folder / "tokenizer.model", texts, 400)
    lines = [
        json.dumps({"text": text, "split": ("train", "test")[i % 2]}) + "\n" for i, text in enumerate(texts)
    ]
    (folder / "texts.jsonl").write_text("".join(lines))
    return folder


@pytest.fixture(scope="session")
def texts(folder) -> pathlib.Path:
    return folder / "texts.jsonl"


@pytest.fixture(scope="session")
def model(tmp_path_factory, data, folder) -> pathlib.Path:
    """A Hugging Face model with its tokenizer."""
    model = tmp_path_factory.mktemp("model") / "tiny [a]"  # rich would take this for markup
    model.mkdir()
    for name in ("config.json", "model.safetensors"):
        (model / name).symlink_to(data / "hf_tiny_a" / name)
    shutil.copyfile(folder / "tokenizer.model", model / "spiece.model")
    return model


@pytest.fixture(scope="session")
def compressed(tmp_path_factory, model, texts) -> tuple[pathlib.Path, dict]:
    """An artifact, and the answer of its compression."""
    output = tmp_path_factory.mktemp("artifact") / "ternary"
    return output, answer(*compress_arguments(model, texts, output))


@pytest.fixture(scope="session")
def artifact(compressed) -> pathlib.Path:
    return compressed[0]
