"""All targets by name, and the corpus of past failures."""

from __future__ import annotations

from pathlib import Path

from tests.fuzz import artifact_targets, checkpoint_targets, data_targets, stream_targets
from tests.fuzz.target import Target

CORPUS = Path(__file__).parent / "corpus"

TARGETS: dict[str, Target] = {
    target.name: target
    for module in (checkpoint_targets, artifact_targets, stream_targets, data_targets)
    for target in module.TARGETS
}
