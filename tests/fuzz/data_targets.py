"""Tokenizers, texts and command lines."""

from __future__ import annotations

import gzip
import json
import lzma
import random
import shlex
from collections.abc import Callable
from pathlib import Path

from typer.testing import CliRunner

from qmoe_jax.cli.app import app
from qmoe_jax.data.text import TextError, read_documents
from qmoe_jax.data.tokenizer import Tokenizer
from qmoe_jax.files.errors import CheckpointError
from tests.fuzz import mutation
from tests.fuzz.checkpoint_targets import CONFIG
from tests.fuzz.target import Target
from tests.helpers import checkpoint_samples as samples
from tests.helpers.tokenizers import train_tokenizer

_REFUSALS = (TextError, CheckpointError)
_TEXTS = ("The cat sat on the mat.", "A second text, with ünicode.")


def _tokenizer(directory: Path) -> Path:
    return train_tokenizer(directory / "tokenizer.model", ["the cat sat on the mat", "a dog ran"] * 20, 40)


def load_tokenizer(directory: Path) -> None:
    """Encode and decode."""
    tokenizer = Tokenizer(directory / "tokenizer.model")
    ids = tokenizer.encode("the cat")
    assert all(0 <= token < tokenizer.vocab_size for token in ids)
    assert isinstance(tokenizer.decode([*ids, tokenizer.vocab_size - 1, 5, 10**6]), str)


def load_texts(directory: Path) -> None:
    """Read all documents."""
    assert all(isinstance(text, str) for text in read_documents(min(directory.iterdir())))


def _texts(name: str, encode: Callable[[bytes], bytes] = bytes) -> Callable[[Path], Path]:
    lines = "".join(json.dumps({"text": text, "split": "train"}) + "\n" for text in _TEXTS)

    def write(directory: Path) -> Path:
        file = directory / name
        file.write_bytes(encode(("\n".join(_TEXTS) if ".txt" in name else lines).encode()))
        return file

    return write


def change_lines(data: bytes, rng: random.Random) -> bytes:
    """Change one line of a JSON lines file."""
    lines = data.split(b"\n")
    at = rng.randrange(len(lines))
    lines[at] = mutation.change_json(lines[at], rng)
    return b"\n".join(lines)


_COMMANDS = ("inspect", "verify", "convert", "compare", "evaluate", "compress", "generate", "bench")
_WORDS = (
    *_COMMANDS,
    "model",
    "missing",
    "arguments",
    "out",
    ".",
    "",
    "--",
    "-",
    "--json",
    "--help",
    "--version",
    "--to",
    "huggingface",
    "t5x",
    "upstream",
    "-1",
    "0",
    "1e9",
    "nan",
    "--samples",
    "--seed",
    "--calibration",
    "--bits",
    "--codebook",
    "--damping",
    "--batch",
    "--config",
    "--tokens",
    "--dtype",
    "--layers",
    "--placement",
    "disk",
    "--memory",
    "1GB",
    "\\",
    "a b",
    "é",
    "\t",
    "file:///",
    "file://x/y",
    "ftp://x",
    "x" * 300,
)


def change_arguments(data: bytes, rng: random.Random) -> bytes:
    """Change the words of a command line, one per line."""
    words = data.decode(errors="replace").split("\n")
    at = rng.randrange(len(words))
    match rng.randrange(4):
        case 0:
            words[at] = rng.choice(_WORDS)
        case 1:
            words.insert(at + 1, rng.choice(_WORDS))
        case 2:
            del words[at]
        case _:
            words[at] = words[at][: rng.randrange(len(words[at]) + 1)] + rng.choice(_WORDS)
    return "\n".join(words or [""]).encode()


def _arguments(directory: Path) -> Path:
    samples.LAYOUTS["safetensors"](directory / "model", CONFIG, samples.random_parameters(CONFIG))
    file = directory / "arguments"
    file.write_text("inspect\nmodel\n--json")
    return file


def load_arguments(directory: Path) -> None:
    """Run a command line; one that is refused says so without a traceback, and does not call it a bug."""
    words = (directory / "arguments").read_text(errors="replace").split("\n")
    words = [
        str(directory / word) if word in ("model", "missing", "out", "arguments") else word for word in words
    ]
    if "/" in words or any(word.startswith(".") for word in words):
        return  # nothing outside the sample
    result = CliRunner().invoke(app, words, prog_name="qmoe")
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise AssertionError(f"{shlex.join(words)}: {result.exception!r}") from result.exception
    assert result.exit_code in (0, 1, 2, 3), f"{shlex.join(words)}: exit code {result.exit_code}"
    for sign in ("this may be a bug", "Traceback"):
        assert sign not in result.output, f"{shlex.join(words)}: {result.output[-600:]}"


TARGETS = (
    Target("tokenizer", _tokenizer, load_tokenizer, refusals=_REFUSALS),
    Target("text-jsonl", _texts("a.jsonl"), load_texts, (change_lines, mutation.change_bytes), _REFUSALS),
    Target("text-gz", _texts("a.jsonl.gz", gzip.compress), load_texts, (mutation.change_gzip,), _REFUSALS),
    Target("text-xz", _texts("a.jsonl.xz", lzma.compress), load_texts, refusals=_REFUSALS),
    Target("text-txt", _texts("a.txt"), load_texts, refusals=_REFUSALS),
    Target("command-line", _arguments, load_arguments, (change_arguments,)),
)
