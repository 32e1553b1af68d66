"""Standard streams of every kind: closed, full, left by their reader, of encodings that lack characters."""

import io
import json
import os
import signal
import threading
import time

import pytest

from qmoe_jax.cli.streams import Descriptor
from tests.helpers.cli_runs import compress_arguments
from tests.helpers.forked_cli import ForkedCli


@pytest.fixture(scope="module")
def qmoe():
    cli = ForkedCli()
    yield cli
    cli.close()


@pytest.fixture
def full():
    descriptor = os.open("/dev/full", os.O_WRONLY)
    yield descriptor
    os.close(descriptor)


@pytest.fixture
def left_pipe():
    """The end for writing of a pipe that nobody reads."""
    reader, writer = os.pipe()
    os.close(reader)
    yield writer
    os.close(writer)


PRINTING = ["--help", "inspect MODEL", "inspect MODEL --json"]


@pytest.fixture(params=PRINTING)
def arguments(request, model) -> list[object]:
    return [{"MODEL": model}.get(word, word) for word in request.param.split()]


def test_a_full_standard_output_is_an_error_and_the_answer_is_kept(qmoe, arguments, full):
    expected, run = qmoe(*arguments), qmoe(*arguments, out=full)
    assert (expected.exit_code, expected.err) == (0, b"")
    assert run.exit_code == 1
    assert run.err.startswith(b"error: standard output: No space left on device\n  remedy: free some space")
    assert run.err.endswith(b"follows:\n" + expected.out)


def test_a_closed_standard_output_is_an_error_and_the_answer_is_kept(qmoe, arguments):
    run = qmoe(*arguments, out=None)
    assert run.exit_code == 1
    assert run.err.startswith(b"error: standard output: is closed; direct it to a file")
    assert len(run.err.partition(b"follows:\n")[2]) > 300


def test_a_pipe_whose_reader_left_ends_quietly(qmoe, arguments, left_pipe):
    run = qmoe(*arguments, out=left_pipe)
    assert (run.exit_code, run.err) == (141, b"")


@pytest.mark.parametrize("kind", ["full", "left_pipe", None])
def test_standard_error_of_any_kind_changes_nothing_else(qmoe, model, kind, request):
    descriptor = kind and request.getfixturevalue(kind)
    assert qmoe("inspect", model, err=descriptor) == qmoe("inspect", model)
    assert qmoe("inspect", model / "no", err=descriptor).exit_code == 1
    assert qmoe("inspect", err=descriptor).exit_code == 2


def test_no_stream_at_all_is_no_crash(qmoe, model):
    assert qmoe("inspect", model, out=None, err=None).exit_code == 1


def test_a_compression_goes_on_where_nobody_reads_and_resumes_as_finished(
    qmoe, model, texts, tmp_path, left_pipe
):
    arguments = compress_arguments(model, texts, tmp_path / "out")
    assert qmoe(*arguments, out=left_pipe, err=left_pipe).exit_code == 141
    assert qmoe("verify", tmp_path / "out").exit_code == 0


@pytest.mark.parametrize("encoding", ["ascii", "utf-16", "cp1252:strict"])
def test_json_is_ascii_in_every_encoding(qmoe, encoding, tmp_path):
    missing = tmp_path / "nicht da ä 🙂"
    run = qmoe("inspect", missing, "--json", env={"PYTHONIOENCODING": encoding})
    assert run.exit_code == 1
    assert json.loads(run.out.decode("ascii"))["error"]["path"] == str(missing)


def test_json_names_paths_that_are_not_utf8(qmoe, tmp_path):
    missing = os.fsencode(tmp_path) + b"/\xff"
    run = qmoe("generate", "model", "--file", missing, "--json")
    assert os.fsencode(json.loads(run.out)["error"]["path"]) == missing
    assert b"/\\xff: No such file or directory" in run.err


@pytest.mark.parametrize("command", ["--help", "compare --help", "inspect MODEL"])
def test_characters_that_the_encoding_lacks_are_replaced(qmoe, command, model):
    arguments = [{"MODEL": model}.get(word, word) for word in command.split()]
    run = qmoe(*arguments, env={"PYTHONIOENCODING": "ascii"})
    assert run.exit_code == 0
    assert run.out.isascii() and len(run.out) > 100


def test_a_descriptor_that_does_not_block_is_waited_for():
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    content, found = bytes(1 << 18), bytearray()

    def read() -> None:
        while len(found) < len(content):
            found.extend(os.read(reader, 1 << 16))

    thread = threading.Thread(target=read)
    thread.start()
    stream = io.BufferedWriter(Descriptor(writer))
    stream.write(content)
    stream.flush()
    thread.join()
    os.close(reader), os.close(writer)
    assert found == content


@pytest.mark.parametrize(("number", "word"), [(signal.SIGINT, "interrupted"), (signal.SIGTERM, "terminated")])
def test_a_signal_ends_with_one_line(qmoe, model, tmp_path, number, word):
    fifo = tmp_path / "waits"  # for a writer that never comes
    os.mkfifo(fifo)
    out, err = os.memfd_create("out"), os.memfd_create("err")
    child = qmoe.start(["generate", model, "--file", fifo], {1: out, 2: err}, {})
    with open(fifo, "wb"):  # opened once the command reads it
        time.sleep(0.1)
        os.kill(child, number)
        assert qmoe.wait() == 128 + number
    assert os.pread(out, 999, 0) == b""
    assert os.pread(err, 999, 0).decode() == f"{word}.\n"
    os.close(out), os.close(err)
