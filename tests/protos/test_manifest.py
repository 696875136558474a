from __future__ import annotations

import math

import numpy as np
import pytest

from preconditioner_protos import Layout, ManifestError, check_open_request
from preconditioner_protos.v1 import preconditioner_pb2 as pb


def request():
    block = pb.Block(
        name="layer.weight",
        sides=[pb.Side(length=4, root_order=4.0), pb.Side(length=3, root_order=4.0)],
        ridge=pb.Ridge(kind=pb.RIDGE_KIND_RELATIVE, value=1e-6),
    )
    manifest = pb.Manifest(
        blocks=[block], statistics_dtype=pb.DTYPE_FLOAT32, preconditioner_dtype=pb.DTYPE_FLOAT64
    )
    return pb.OpenSessionRequest(
        protocol_version=1, job="job-1", rank=0, world_size=1, epoch=5, manifest=manifest
    )


def test_a_good_request_passes_and_fixes_every_size():
    message = request()
    check_open_request(message)
    statistics = Layout.of_statistics(message.manifest)
    assert statistics.sides == ((4, 3),)
    assert statistics.dtype == np.dtype("<f4")
    assert statistics.matrix_bytes(0, 1) == 24
    assert statistics.block_bytes(0) == 64
    assert Layout.of_preconditioners(message.manifest).total_bytes() == 128


def block(message):
    return message.manifest.blocks[0]


@pytest.mark.parametrize(
    ("spoil", "names"),
    [
        (lambda m: setattr(m, "job", ""), "job ''"),
        (lambda m: setattr(m, "job", "../etc"), "job '../etc'"),
        (lambda m: setattr(m, "job", "x" * 201), "job"),
        (lambda m: setattr(m, "world_size", 0), "world_size 0"),
        (lambda m: setattr(m, "rank", 1), "rank 1"),
        (lambda m: setattr(m.manifest, "statistics_dtype", 0), "dtype 0"),
        (lambda m: setattr(m.manifest, "preconditioner_dtype", 9), "dtype 9"),
        (lambda m: setattr(block(m), "name", "é" * 300), "blocks[0].name"),
        (lambda m: block(m).ClearField("sides"), "has no side"),
        (lambda m: block(m).ClearField("ridge"), "ridge.kind 0"),
        (lambda m: setattr(block(m).ridge, "kind", 77), "ridge.kind 77"),
        (lambda m: setattr(block(m).ridge, "value", -1.0), "ridge.value"),
        (lambda m: setattr(block(m).ridge, "value", math.nan), "nan"),
        (lambda m: setattr(block(m).sides[1], "length", 0), "sides[1].length"),
        (lambda m: setattr(block(m).sides[0], "root_order", 0.0), "sides[0].root_order"),
        (lambda m: setattr(block(m).sides[0], "root_order", math.inf), "inf"),
    ],
)
def test_what_the_protocol_forbids_is_named(spoil, names):
    message = request()
    spoil(message)
    with pytest.raises(ManifestError) as caught:
        check_open_request(message)
    assert names in str(caught.value)
