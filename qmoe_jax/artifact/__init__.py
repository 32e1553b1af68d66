"""The compressed model on disk: written so that it can be resumed, read lazily, verified to the byte.

    run.json                        the run that the artifact belongs to; written first
    codebooks.safetensors           the codebooks, as data
    experts/encoder.layers_01/experts-00000-00015.safetensors    sixteen experts, each one contiguous range
    dense/                          every other parameter, an Orbax checkpoint
    report.json                     figures of every expert, and what differs from run to run
    SHA256SUMS                      every file; `sha256sum -c SHA256SUMS` checks them without this package
    manifest.json                   content and checksums of all of that; written last

Everything but `dense/`, `report.json` and `SHA256SUMS` is the same to the byte in every run.
"""

from qmoe_jax.artifact.codebook_file import read_codebooks as read_codebooks
from qmoe_jax.artifact.groups import Expert as Expert
from qmoe_jax.artifact.groups import ExpertExtent as ExpertExtent
from qmoe_jax.artifact.groups import GroupKey as GroupKey
from qmoe_jax.artifact.kinds import Kind as Kind
from qmoe_jax.artifact.kinds import Ternary as Ternary
from qmoe_jax.artifact.kinds import Uniform as Uniform
from qmoe_jax.artifact.kinds import num_groups as num_groups
from qmoe_jax.artifact.manifest import Manifest as Manifest
from qmoe_jax.artifact.manifest import Run as Run
from qmoe_jax.artifact.matrices import PackedExpertMatrix as PackedExpertMatrix
from qmoe_jax.artifact.matrices import dequantize as dequantize
from qmoe_jax.artifact.matrices import pack_matrix as pack_matrix
from qmoe_jax.artifact.matrices import pack_quantized as pack_quantized
from qmoe_jax.artifact.open import is_artifact as is_artifact
from qmoe_jax.artifact.open import open_checkpoint as open_checkpoint
from qmoe_jax.artifact.reader import ArtifactReader as ArtifactReader
from qmoe_jax.artifact.sizes import Sizes as Sizes
from qmoe_jax.artifact.sizes import measure as measure
from qmoe_jax.artifact.store import ArtifactWriter as ArtifactWriter
from qmoe_jax.artifact.verify import Verification as Verification
from qmoe_jax.artifact.verify import verify as verify
from qmoe_jax.files.errors import CheckpointError as CheckpointError
