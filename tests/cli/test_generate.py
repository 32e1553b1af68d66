"""qmoe generate: texts with their blanks filled by the model."""

import io

import numpy as np
import pytest

import qmoe_jax as qj
from qmoe_jax.cli.console import Verbatim, print_verbatim
from qmoe_jax.data import Tokenizer
from qmoe_jax.data.batching import pad_rows, round_up
from qmoe_jax.data.infill import Infill, read_spans
from qmoe_jax.inference.fill import LENGTH_MULTIPLE
from qmoe_jax.inference.generate import written_lengths
from tests.helpers.cli_runs import answer, qmoe

TEXT = "bado ___ lita, <extra_id_3> mo."


@pytest.fixture
def tokenizer(artifact) -> Tokenizer:
    return Tokenizer(artifact)


@pytest.fixture
def scripted(monkeypatch, tokenizer):
    """A model that fills blank 0 with a word of a text's own beginning, so that rows can be told apart."""
    shapes = []

    def write(model, params, rows, *, max_new_tokens, sampling, seed, encoder_mask):
        shapes.append((rows.shape, seed, sampling))
        out = np.zeros((len(rows), max_new_tokens), np.int32)
        sentinel = tokenizer.sentinels.id
        for row, ids in zip(out, np.asarray(rows), strict=True):
            row[:5] = [sentinel(0), ids[0], sentinel(1), 1, 7]
        return out

    monkeypatch.setattr("qmoe_jax.inference.fill.generate", write)
    return shapes


def test_blanks_are_filled_with_the_spans_that_the_model_generates(model, tokenizer):
    infill = Infill.parse(TEXT)
    ids = infill.encode(tokenizer)
    tokens = pad_rows([ids], 1, round_up(len(ids), LENGTH_MULTIPLE), 0)
    written = np.asarray(qj.generate(*qj.load_model(model), tokens, max_new_tokens=12))[0]
    spans = read_spans(written, tokenizer)
    found = answer("generate", model, TEXT, "--max-new-tokens", 12)
    assert found["texts"][0]["filled"] == infill.fill(spans, tokenizer)
    assert found["texts"][0]["spans"].keys() == {str(number) for number in spans}
    assert found["stats"]["tokens"] == written_lengths(written[None], eos_id=1)[0]


def test_lines_of_a_file_are_filled_in_batches_of_one_shape(artifact, scripted, tokenizer, tmp_path):
    lines = ["bado ___ lita", "mo ___", "lita lita lita lita ___ <extra_id_5>"]
    (tmp_path / "lines.txt").write_text("\n\n".join(lines) + "\n")
    result = qmoe("generate", artifact, "--file", tmp_path / "lines.txt", "--batch-size", 2, "--seed", 5)
    first = [tokenizer.model.decode([int(tokenizer.encode(line)[0])]) for line in lines]
    filled = [line.replace("___", word) for line, word in zip(lines, first, strict=True)]
    assert result.stdout.splitlines() == filled
    assert result.stderr == ""
    assert len({shape for shape, _, _ in scripted}) == 1
    assert [seed for _, seed, _ in scripted] == [5, 6]


@pytest.mark.parametrize(
    ("options", "sampling"),
    [
        ([], qj.Sampling()),
        (["--top-k", 4], qj.Sampling(1.0, top_k=4)),
        (["--temperature", 0.5, "--top-p", 0.9], qj.Sampling(0.5, top_p=0.9)),
    ],
)
def test_sampling_options_reach_the_model(artifact, scripted, options, sampling):
    assert qmoe("generate", artifact, TEXT, *options).exit_code == 0
    assert scripted[0][2] == sampling


def test_generation_statistics_go_to_stderr(artifact, scripted):
    result = qmoe("generate", artifact, TEXT, "--stats")
    assert len(result.stdout.splitlines()) == 1
    assert "tokens in" in result.stderr


def test_generate_refuses_a_text_without_blanks(artifact):
    result = qmoe("generate", artifact, "bado lita")
    assert result.exit_code == 1
    assert "no blank in 'bado lita'" in result.stderr


ODD = [
    "id\tbado ___ lita",
    "  bado\u00a0___ lita  ",
    "bado\r___\x0b lita\x1c",
    "bado\u2028___\u2029lita\u0085",
    "ＡＢ①ﬁ ___ e\u0301",  # what NFKC would change
    "🙂 \x1b[31m___\x1b[0m ▁ <unk> <extra_id_٣>",
    "bado\x00___ \ufeffmo",
]


@pytest.mark.parametrize("text", [*ODD, "bado\nlita\r\n___\n"], ids=ascii)
def test_a_text_goes_out_as_it_came_in(artifact, scripted, tokenizer, text):
    word = tokenizer.model.decode([int(Infill.parse(text).encode(tokenizer)[0])])
    before, _, after = text.partition("___")
    found = qmoe("generate", artifact, text).stdout_bytes
    assert found in {f"{before}{space}{word}{after}\n".encode() for space in ("", " ")}


@pytest.mark.parametrize("ending", ["\n", "\r\n"], ids=["lf", "crlf"])
@pytest.mark.parametrize("source", ["file", "standard input"])
def test_lines_keep_their_characters_and_endings(artifact, monkeypatch, tmp_path, ending, source):
    def write(model, params, rows, *, max_new_tokens, **_):
        return np.zeros((len(rows), max_new_tokens), np.int32)  # fills nothing

    monkeypatch.setattr("qmoe_jax.inference.fill.generate", write)
    content = "".join(line + ending for line in ODD).encode()
    (tmp_path / "lines").write_bytes(b"\xef\xbb\xbf" + content)
    if source == "file":
        found = qmoe("generate", artifact, "--file", tmp_path / "lines")
    else:
        found = qmoe("generate", artifact, "--file", "-", stdin=content)
    assert found.stdout_bytes == content


def test_a_line_break_that_the_model_writes_does_not_break_a_line(artifact, monkeypatch, scripted, tmp_path):
    monkeypatch.setattr("qmoe_jax.data.infill._join", lambda before, span, tokenizer: before + "a\nb")
    (tmp_path / "lines").write_text("bado ___\nmo ___\n")
    assert qmoe("generate", artifact, "--file", tmp_path / "lines").stdout == "bado a b\nmo a b\n"
    found = answer("generate", artifact, "--file", tmp_path / "lines")
    assert [text["filled"] for text in found["texts"]] == ["bado a\nb", "mo a\nb"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"bado ___\nmo \xff ___\n", ", line 2: expected UTF-8, found byte 0xff at position 3"),
        ("bado ___\n".encode("utf-16"), ", line 1: expected UTF-8, found byte 0xff at position 0"),
        (b"bado ___\n\nmo\n", ", line 3: no blank in 'mo'"),
        (b"<extra_id_100>\n", ", line 1: <extra_id_100>: expected a number of 0 to 99"),
        (b"\n \t\n", ": expected at least one line of text, found none"),
    ],
)
def test_a_bad_line_is_named(artifact, tmp_path, content, message):
    (tmp_path / "lines").write_bytes(content)
    assert (
        f"error: {tmp_path / 'lines'}{message}"
        in qmoe("generate", artifact, "--file", tmp_path / "lines").stderr
    )
    assert (
        f"error: standard input{message}" in qmoe("generate", artifact, "--file", "-", stdin=content).stderr
    )


def test_an_argument_that_is_not_utf8_is_refused(artifact):
    result = qmoe("generate", artifact, "bado \udcff ___")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "error: the text: expected UTF-8, found byte 0xff at position 5" in result.stderr


@pytest.mark.parametrize("seed", [-1, 2**32, 2**63, 2**200])
def test_a_seed_out_of_range_is_named(artifact, texts, tmp_path, seed):
    for arguments in (
        ["generate", artifact, TEXT], ["evaluate", artifact, "--text", texts],
        ["compare", artifact, artifact, "--text", texts],
        ["compress", artifact, tmp_path / "out", "--calibration", texts],
    ):  # fmt: skip
        result = qmoe(*arguments, "--seed", seed)
        assert result.exit_code == 1
        assert f"error: seed: expected an integer of 0 to 4294967295, found {seed}\n" == result.stderr


def test_the_most_likely_token_is_not_drawn_from_others(artifact):
    result = qmoe("generate", artifact, TEXT, "--temperature", 0, "--top-k", 3)
    assert result.exit_code == 2
    assert "takes the most likely token" in result.stderr


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_text_cannot_drive_a_terminal(monkeypatch):
    monkeypatch.setattr("sys.stdout", screen := Terminal(newline=""))
    print_verbatim(Verbatim("a\tb\x1b[31m\x07\x9b \rü🙂\r\n"))
    assert screen.getvalue() == "a\tb\\x1b[31m\\x07\\x9b \\x0dü🙂\n"
