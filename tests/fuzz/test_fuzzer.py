"""The fuzz run sees each kind of fault, in readers that are wrong on purpose."""

from __future__ import annotations

import json
import pickle
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from qmoe_jax.files.errors import CheckpointError
from tests.fuzz import campaign, mutation, target
from tests.fuzz.target import Sample, Target, mutate


def write(directory: Path) -> Path:
    file = directory / "file"
    file.write_bytes(b"\x80\x02}.")
    return file


def refuse(directory: Path) -> None:
    raise CheckpointError("is damaged", path=directory / "file")


def raise_another(directory: Path) -> None:
    raise KeyError(directory)


def name_no_file(directory: Path) -> None:
    raise CheckpointError("is damaged", path="somewhere")


def load_forever(directory: Path) -> None:
    try:
        time.sleep(60)
    except Exception:  # a reader that takes an alarm for damage
        refuse(directory)


def unpickle(directory: Path) -> None:
    pickle.loads((directory / "file").read_bytes())


def run_a_program(directory: Path) -> None:
    subprocess.run([sys.executable, "-c", ""], check=False)


def return_what_is_wrong(directory: Path) -> None:
    assert (directory / "file").stat().st_size > 10**6


@pytest.mark.parametrize(
    ("load", "told"),
    [
        (raise_another, "KeyError"),
        (name_no_file, "names no file"),
        (load_forever, "takes longer"),
        (unpickle, "executed: pickle.find_class ('tests.fuzz.canary', 'sing'), sing"),
        (run_a_program, "executed: subprocess.Popen"),
        (return_what_is_wrong, "AssertionError"),
    ],
)
def test_a_wrong_reader_is_seen(
    load: Callable[[Path], None], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(target, "SECONDS_PER_INPUT", 0.2)
    verdict = Sample(Target("wrong", write, load), tmp_path).judge(b"ctests.fuzz.canary\nsing\n(tR.")
    assert verdict.fault and told in verdict.told


def test_a_named_refusal_is_no_fault(tmp_path: Path) -> None:
    assert not Sample(Target("right", write, refuse), tmp_path).judge(b"").fault


@pytest.mark.parametrize("end", ["crash", "stall"])
def test_an_input_that_ends_its_process_is_kept(
    end: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker is ended by an input: by a signal, or by the run where it does not react to its alarm."""
    programs = {"crash": "import ctypes; ctypes.string_at(0)", "stall": "import time; time.sleep(60)"}
    worker = tmp_path / "worker.py"
    worker.write_text(
        "import pathlib, sys\n(pathlib.Path(sys.argv[-3]) / 'current').write_bytes(b'x')\n"
        "(pathlib.Path(sys.argv[-3]) / 'ready').touch()\n" + programs[end]
    )
    monkeypatch.setattr(campaign, "WORKER", [str(worker)])
    monkeypatch.setattr(campaign, "PATIENCE", 0.3)
    faults = campaign.fuzz("wrong", 0.1, 0).faults
    assert [fault.data for fault in faults.values()] == [b"x"]
    assert ("SIGSEGV" if end == "crash" else "hangs") in next(iter(faults))


@pytest.mark.parametrize(
    "mutator", [mutation.change_bytes, mutation.change_json, mutation.change_pickle, mutation.change_archive]
)
def test_changes_are_the_same_for_the_same_seed(mutator: mutation.Mutator) -> None:
    data = json.dumps({"shape": [1, 2], "dtype": "F32"}).encode()
    wrong = Target("right", write, refuse, (mutator,))
    changed = [[mutate(wrong, data, random.Random(seed)) for seed in range(50)] for _ in range(2)]
    assert changed[0] == changed[1]
    assert len(set(changed[0])) > 25
