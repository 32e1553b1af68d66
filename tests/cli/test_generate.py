"""qmoe generate: texts with their blanks filled by the model."""

import numpy as np
import pytest

import qmoe_jax as qj
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
