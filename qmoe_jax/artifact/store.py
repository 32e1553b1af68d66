"""Writing of an artifact, interruptible at any moment: finished groups stay, the manifest comes last.

`run.json` is written first and names the run that the directory belongs to, the codebooks next, then the
groups as they are finished, the dense parameters, `SHA256SUMS` (every file, for `sha256sum -c`), and
`manifest.json`. Several hosts write disjoint groups into one directory; nothing is merged at the end.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from qmoe_jax.artifact.codebook_file import CODEBOOKS, render_codebooks
from qmoe_jax.artifact.completeness import check_complete, check_matrices, find_groups
from qmoe_jax.artifact.dense import DENSE, remove_leftovers, save_dense
from qmoe_jax.artifact.group_check import check_group, check_groups, require_damaged
from qmoe_jax.artifact.groups import EXPERTS, Expert, GroupFile, GroupKey, render_group
from qmoe_jax.artifact.manifest import (
    MANIFEST,
    REPORT,
    RUN,
    ArrayRecord,
    GroupRecord,
    Manifest,
    Run,
    canonical,
)
from qmoe_jax.artifact.matrices import PackedExpertMatrix
from qmoe_jax.artifact.report import RunReport
from qmoe_jax.artifact.sums import SUMS, listed_files, render_sums
from qmoe_jax.coding import Codebook
from qmoe_jax.config import SwitchConfig
from qmoe_jax.files.durable import FileRecord, record_of_pieces
from qmoe_jax.files.errors import CheckpointError
from qmoe_jax.files.names import is_stray
from qmoe_jax.files.output import output_store
from qmoe_jax.files.store import Place, Store, make_hold, readable_record
from qmoe_jax.files.tensor import Tensor


def artifact_directory(path: str | os.PathLike[str], *, inputs: tuple[object, ...] = ()) -> Path | str:
    """Return the local directory, or the URL, at which an artifact can be begun or resumed.

    Nothing is read but names; at a URL an empty object is written and removed.

    Args:
        path: a local path or a URL.
        inputs: paths and URLs of what is read meanwhile.

    Raises:
        CheckpointError: it cannot be written (see `output_store`), or holds something else.
    """
    return _artifact_store(path, inputs).root


def _artifact_store(place: Place, inputs: tuple[object, ...] = ()) -> Store:
    """Return the store in which an artifact can be begun or resumed. Raises as `artifact_directory` does."""
    store = place if isinstance(place, Store) else output_store(place, inputs=inputs)
    found = [name for name in store.entries() if not is_stray(name)]
    if found and not {RUN, MANIFEST, EXPERTS}.intersection(found):
        raise CheckpointError(
            "holds something else",
            path=store.root,
            expected="an empty directory, or an artifact of the same run",
            found=", ".join(found[:5]),
            remedy="choose another output directory",
        )
    return store


class ArtifactWriter:
    """The writer of one run's artifact, a context manager that holds the directory's lock until it is closed.

    An object store has no lock. There a second process of the same run makes the same objects, which is
    harmless, and other bytes than these are an error that names the object.

    Attributes:
        store: the files.
        run: everything that decides the bytes.
        host: number of this host; host 0 also writes the files that all share.
    """

    def __init__(
        self,
        path: Place,
        *,
        config: SwitchConfig,
        options: Mapping[str, Any],
        source: Mapping[str, Any],
        codebooks: Iterable[Codebook] = (),
        host: int = 0,
    ):
        """Begin an artifact, or resume an interrupted one.

        Args:
            path: a directory or URL where nothing is, or the same run.
            config: the architecture.
            options: options of the compression, as JSON values.
            source: digests of the checkpoint and of the calibration data, as JSON values: with the options,
                everything that decides the bytes. No paths, which may change between a run and its
                resumption.
            codebooks: the codebooks that the expert matrices name.
            host: `jax.process_index()` where several hosts write.

        Raises:
            CheckpointError: the directory holds something else or another run's artifact, or another process
                is writing it.
        """
        codebooks = list(codebooks)
        digests = {codebook.name: codebook.digest for codebook in codebooks}
        self.store, self.host = _artifact_store(path), host
        self.run = Run(config, options, source, digests)
        self._digest = self.run.digest
        self._groups: dict[GroupKey, FileRecord] = {}
        self._linked: dict[GroupKey, GroupKey] = {}
        self._files: dict[str, FileRecord] = {}
        self._dense: dict[str, ArrayRecord] | None = None
        self._require_ours()
        self._release = self.store.lock(f".lock-{host}")
        try:
            self._clean()
            self.attach(RUN, canonical(self.run.to_json()))
            if codebooks:
                self.attach(CODEBOOKS, render_codebooks(codebooks))
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> ArtifactWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Release the lock. Whatever has been written stays."""
        self._release()

    @property
    def root(self) -> Path | str:
        """The directory, or the URL."""
        return self.store.root

    @property
    def finished(self) -> bool:
        """True once the manifest exists, which makes the artifact complete."""
        return self.store.exists(MANIFEST)

    def has_group(self, stack: str, layer: int, start: int, stop: int) -> bool:
        """Return whether experts `start` to `stop - 1` are written, after checking every byte of their file.

        Raises:
            CheckpointError: there is such a file, but it is damaged or another run's.
        """
        key = GroupKey(stack, layer, start, stop)
        if key in self._groups:
            return True
        if not self.store.exists(key.path):
            return False
        self._groups[key] = check_group(self.store, key, self._digest)
        return True

    def check_groups(self, keys: Iterable[GroupKey]) -> None:
        """Check the files of many groups, several at a time: `has_group` knows the intact ones then."""
        missing = [key for key in keys if key not in self._groups]
        self._groups |= check_groups(self.store, missing, self._digest)

    def write_group(self, stack: str, layer: int, start: int, experts: Sequence[Expert]) -> FileRecord:
        """Write the experts from `start` on, and return their file's record; they are durable then.

        A file that is already what they are written as stays untouched.

        Raises:
            CheckpointError: they are not this model's, need a codebook that the run lacks, or cannot be
                written; or, where nobody can be locked out, the file is there, whole but with other bytes.
            ValueError: they are not all packed in one way.
        """
        key = GroupKey(stack, layer, start, start + len(experts))
        matrices = {name: (matrix.kind, matrix.shape) for name, matrix in experts[0].items()}
        check_matrices(self.store.path(key.path), self.run, matrices)
        pieces = render_group(key, experts, self._digest)
        record = record_of_pieces(pieces)
        found = readable_record(self.store, key.path)
        if found != record:
            if found is not None and not self.store.exclusive:
                require_damaged(self.store, key, record)
            self._reopen()
            self.store.write(key.path, pieces, over=found, host=self.host)
        self._groups[key] = record
        return record

    def record(self, key: GroupKey) -> FileRecord:
        """Return size and checksum of a group that this process has written or checked."""
        return self._groups[key]

    def link_group(self, stack: str, layer: int, source: GroupKey) -> None:
        """Share the file of `source` with experts `source.start` to `source.stop - 1` of another layer.

        Args:
            stack: 'encoder' or 'decoder'.
            layer: the layer without a file of its own for these experts.
            source: a group that this process has written or checked.

        Raises:
            ValueError: `source` is not such a group.
        """
        if source not in self._groups:
            raise ValueError(
                f"{source.path}: expected a group that was written or checked before it is linked to"
            )
        self._linked[dataclasses.replace(source, stack=stack, layer=layer)] = source

    def read_group(
        self, stack: str, layer: int, start: int, stop: int
    ) -> list[dict[str, PackedExpertMatrix]]:
        """Read the experts of a group that was written before."""
        return GroupFile.open(self.store, GroupKey(stack, layer, start, stop)).read(start, stop)

    def write_dense(self, tensors: Mapping[str, Tensor], *, source: object = None) -> dict[str, ArrayRecord]:
        """Write every parameter that is in no group, and return the records; arguments as of `save_dense`.

        With several hosts, the first one calls this.
        """
        self._reopen()
        self._dense = save_dense(self.store, tensors, source=source)
        return self._dense

    def keep_dense(self, records: Mapping[str, ArrayRecord]) -> None:
        """Take over what `write_dense` returned to an interrupted process of this run, instead of writing."""
        self._dense = dict(records)

    def attach(self, name: str, content: bytes) -> None:
        """Add a file that is the same in every run (such as the tokenizer); the manifest will list it."""
        record = record_of_pieces([content])
        if self.host == 0 and (found := readable_record(self.store, name)) != record:
            if found is not None or self.store.exists(name) or self.finished:
                told = f"{self.store.path(name)}: is missing or not this run's; is written again"
                warnings.warn(told, stacklevel=2)
            self._reopen()
            self.store.write(name, [content], over=found)
        self._files[name] = record

    def finish(self, summary: Mapping[str, Any] | None = None, report: RunReport | None = None) -> Manifest:
        """Check that nothing is missing, and write the report, the checksums and, last, the manifest.

        Groups that this process neither wrote nor checked are read and checked here. With several hosts, the
        first one calls this when all are done.

        Args:
            summary: figures of the result that are the same in every run, for the manifest.
            report: the report of the run; an empty one by default.

        Raises:
            CheckpointError: experts or dense parameters are missing, a group is damaged or another run's, or
                there is a file that does not belong here.
        """
        for key in find_groups(self.store):
            self.has_group(key.stack, key.layer, key.start, key.stop)
        sources = {key: key for key in self._groups} | self._linked
        groups = tuple(
            GroupRecord(key, source.path, self._groups[source]) for key, source in sorted(sources.items())
        )
        if self._dense is None:
            raise CheckpointError(
                "has no dense parameters", path=self.store.root, remedy="call write_dense first"
            )
        files = {group.key: group.path for group in groups}
        kinds = check_complete(self.store, self.run, files, self._dense)
        manifest = Manifest(self.run, kinds, groups, self._dense, self._files, summary or {})
        self._require_no_other_file({group.path for group in groups} | self._files.keys())
        self._reopen()
        make_hold(self.store, REPORT, [(report or RunReport()).render()])
        make_hold(self.store, SUMS, [self._render_sums(manifest)])
        if (problem := self._problem({RUN})) is not None:  # another run began here at the same moment
            raise problem
        make_hold(self.store, MANIFEST, [manifest.render()])
        return manifest

    def _require_no_other_file(self, known: set[str]) -> None:
        """Raise `CheckpointError` where `verify` would report a file as extra."""
        for name in listed_files(self.store):
            if name not in known | {REPORT, MANIFEST} and not name.startswith(f"{DENSE}/"):
                raise CheckpointError(
                    "is not part of the artifact", path=self.store.path(name), remedy="remove it"
                )

    def _render_sums(self, manifest: Manifest) -> bytes:
        """Return the checksum file; files that this process has written or checked are not read again."""
        sums = {group.path: group.record.sha256 for group in manifest.groups}
        sums |= {name: record.sha256 for name, record in self._files.items()}
        for name in listed_files(self.store):
            if name not in sums and (record := self.store.find_record(name)) is not None:
                sums[name] = record.sha256
        return render_sums(sums | {MANIFEST: record_of_pieces([manifest.render()]).sha256})

    def _reopen(self) -> None:
        """Make a finished artifact an unfinished one, before anything in it changes."""
        if self.finished:
            self.store.delete(MANIFEST)

    def _require_ours(self) -> None:
        """Raise `CheckpointError` where the directory holds another run."""
        found = {name for name in self.store.entries() if not is_stray(name)}
        if not found:
            return
        problem = self._problem(found)
        if problem is not None and not self._recognized(found):
            raise problem

    def _problem(self, found: set[str]) -> CheckpointError | None:
        """Return what `run.json` has against this run writing here; `found`: the names in the directory."""
        if RUN not in found:
            return CheckpointError(
                "holds something else",
                path=self.store.root,
                expected="an empty directory, or an artifact of the same run",
                found=", ".join(sorted(found)[:5]),
                remedy="choose another output directory",
            )
        try:
            differences = self.run.differences(Run.read(self.store))
        except CheckpointError as error:
            return error.with_remedy("choose another output directory")
        if not differences:
            return None
        ours, theirs = zip(*differences.values(), strict=True)
        return CheckpointError(
            "holds an artifact of another run",
            path=self.store.root,
            expected=_settings(differences, ours),
            found=_settings(differences, theirs),
            remedy="choose another output directory, or the inputs and settings that began this one",
        )

    def _recognized(self, found: set[str]) -> bool:
        """Return whether the manifest, or every group that can be read, says that this run began here.

        Then `run.json` is missing or damaged, and is written again.
        """
        digests = set()
        if MANIFEST in found:
            with contextlib.suppress(CheckpointError):
                digests.add(Manifest.read(self.store).run.digest)
        for name in self.store.names(EXPERTS):
            key = GroupKey.from_path(name)
            with contextlib.suppress(CheckpointError):
                digests.add(GroupFile.open(self.store, key).run if key else "a file of another kind")
        return digests == {self._digest}

    def _clean(self) -> None:
        """Remove what a killed run of this host left half-written."""
        self.store.remove_temporary(self.host)
        if self.host == 0 and isinstance(self.store.root, Path):
            remove_leftovers(self.store)


def _settings(names: Iterable[str], values: Iterable[Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in zip(names, values, strict=True))
