"""The protocol between a training process and the preconditioner service.

``v1/preconditioner.proto`` is the specification. This package holds the code generated from it and what
both ends need to speak it: packing of symmetric matrices, chunks with checksums, and the checks that a
manifest must pass.
"""

from preconditioner_protos.chunking import Assembler, PackedBlock, Refusal, chunk_messages
from preconditioner_protos.manifest import (
    MAX_ENTRIES,
    MAX_MESSAGE_BYTES,
    PROTOCOL_VERSION,
    Layout,
    ManifestError,
    check_job,
    check_manifest,
    check_open_request,
    numpy_dtype,
)
from preconditioner_protos.packing import pack, packed_length, unpack, unpacking_indices, upper_indices

__all__ = [
    "MAX_ENTRIES",
    "MAX_MESSAGE_BYTES",
    "PROTOCOL_VERSION",
    "Assembler",
    "Layout",
    "ManifestError",
    "PackedBlock",
    "Refusal",
    "check_job",
    "check_manifest",
    "check_open_request",
    "chunk_messages",
    "numpy_dtype",
    "pack",
    "packed_length",
    "unpack",
    "unpacking_indices",
    "upper_indices",
]
