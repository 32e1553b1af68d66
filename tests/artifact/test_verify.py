"""Verification: a flipped bit anywhere, a truncated, missing or extra file."""

import pathlib
import random
import shutil

import pytest

from qmoe_jax.artifact import ArtifactReader, CheckpointError, Manifest, verify
from qmoe_jax.artifact.manifest import canonical, digest
from tests.helpers.checkpoint_samples import add_strays

GROUP = "experts/encoder.layers_01/experts-00002-00003.safetensors"


def test_an_intact_artifact_has_no_problems(whole: pathlib.Path) -> None:
    heard: list[tuple[int, int, str]] = []
    found = verify(whole, progress=lambda *call: heard.append(call))
    files = [path for path in whole.rglob("[!.]*") if path.is_file() and path.name != "SHA256SUMS"]
    assert found.ok
    assert found.problems == ()
    assert found.files == len(files)
    assert found.bytes == sum(path.stat().st_size for path in files)
    assert heard[0] == (0, found.bytes, "")
    assert heard[-1] == (found.bytes, found.bytes, "tokenizer.model")


def test_verify_finds_a_flipped_bit_in_any_file(artifact: pathlib.Path) -> None:
    rng = random.Random(0)
    for path in sorted(path for path in artifact.rglob("[!.]*") if path.is_file()):
        original = path.read_bytes()
        for position in {0, len(original) - 1, rng.randrange(len(original))}:
            broken = bytearray(original)
            broken[position] ^= 1 << rng.randrange(8)
            path.write_bytes(broken)
            found = verify(artifact)
            assert not found.ok, f"{path}, byte {position}"
            assert any(path.name in problem for problem in found.problems), found.problems
        path.write_bytes(original)
    assert verify(artifact).ok


def test_every_bit_of_the_manifest_counts(artifact: pathlib.Path) -> None:
    path, rng = artifact / "manifest.json", random.Random(0)
    original = path.read_bytes()
    for position in range(0, len(original), 7):
        broken = bytearray(original)
        broken[position] ^= 1 << rng.randrange(8)
        path.write_bytes(broken)
        with pytest.raises(CheckpointError, match=r"manifest\.json"):
            Manifest.read(artifact)


@pytest.mark.parametrize("target", [GROUP, "codebooks.safetensors", "run.json", "SHA256SUMS", "report.json"])
def test_verify_finds_a_truncated_file(artifact: pathlib.Path, target: str) -> None:
    path = artifact / target
    path.write_bytes(path.read_bytes()[:-3])
    assert any(path.name in problem for problem in verify(artifact).problems)


@pytest.mark.parametrize("target", [GROUP, "codebooks.safetensors", "dense/manifest.ocdbt", "report.json"])
def test_verify_finds_a_missing_file(artifact: pathlib.Path, target: str) -> None:
    (artifact / target).unlink()
    assert any(f"{target}: expected a file, found none" in problem for problem in verify(artifact).problems)


@pytest.mark.parametrize("target", ["experts/encoder.layers_01/notes.txt", "dense/d/more", "model.bin"])
def test_verify_finds_an_extra_file(artifact: pathlib.Path, target: str) -> None:
    (artifact / target).write_text("not ours")
    assert verify(artifact).problems == (f"{target}: expected no such file, found one",)


def test_files_that_hubs_add_are_not_a_problem(artifact: pathlib.Path) -> None:
    (artifact / "README.md").write_text("# A model")
    (artifact / ".gitattributes").write_text("*.safetensors filter=lfs")
    assert verify(artifact).ok


def test_a_file_of_another_artifact_is_found_even_when_listed(
    artifact: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """Whoever puts a file in another's place may rewrite SHA256SUMS too, but not the manifest."""
    from qmoe_jax.artifact.sums import read_sums, render_sums
    from qmoe_jax.files.durable import record_of

    other = GROUP.replace("encoder.layers_01", "decoder.layers_00")
    shutil.copy(artifact / other, artifact / GROUP)
    sums = read_sums(artifact) | {GROUP: record_of(artifact / GROUP).sha256}
    (artifact / "SHA256SUMS").write_bytes(render_sums(sums))
    found = verify(artifact)
    assert not found.ok
    assert any(GROUP in problem for problem in found.problems)


def test_a_manifest_from_the_future_is_refused(artifact: pathlib.Path) -> None:
    path = artifact / "manifest.json"
    import json

    content = json.loads(path.read_bytes()) | {"version": 2}
    del content["checksum"]
    path.write_bytes(canonical({"checksum": digest(content), **content}))
    with pytest.raises(CheckpointError, match="version unknown here") as caught:
        ArtifactReader.open(artifact)
    assert "newer version" in str(caught.value)


def test_verifying_a_directory_that_is_not_an_artifact_finds_a_problem(tmp_path: pathlib.Path) -> None:
    found = verify(tmp_path)
    assert not found.ok
    assert "manifest.json" in found.problems[0]


def test_strays_at_any_depth_are_no_problem(artifact: pathlib.Path) -> None:
    add_strays(artifact)
    assert verify(artifact).problems == ()


def test_experts_that_do_not_decode_are_named_in_the_order_of_their_groups(artifact: pathlib.Path) -> None:
    reader, expected = ArtifactReader.open(artifact), []
    for (stack, number), layer in reader.layers.items():
        for group in layer.groups:
            expert = group.key.stop - 1
            extent = reader.expert_extent(stack, number, expert)
            broken = bytearray((artifact / group.path).read_bytes())
            broken[extent.offset + extent.nbytes - 60 : extent.offset + extent.nbytes - 40] = b"\xff" * 20
            (artifact / group.path).write_bytes(broken)
            expected.append(f"{group.path}: expert {expert}")
    problems = [problem for problem in verify(artifact).problems if ": expert " in problem]
    assert [problem[: len(start)] for problem, start in zip(problems, expected, strict=True)] == expected
