"""The real service that all processes of a test share: its address is in their environment."""

from __future__ import annotations

import os
from dataclasses import replace

import grpc

from distributed_training import SCHEDULED
from preconditioner_client import ServiceConfig
from preconditioner_protos.v1 import preconditioner_pb2 as pb
from preconditioner_protos.v1 import preconditioner_pb2_grpc as rpc
from service_process import TOKEN

ADDRESS = "TEST_SERVICE_ADDRESS"


def given_service(address=None):
    """Found there, or at another address that leads to it."""
    return ServiceConfig(address=address or os.environ[ADDRESS], token=TOKEN)


def scheduled(address=None):
    """Settings with which no bit depends on when what arrives."""
    return {"staleness": replace(SCHEDULED, stale_timeout=30), "service": given_service(address)}


def status_of(job):
    """What the service knows of a job."""
    with grpc.insecure_channel(os.environ[ADDRESS]) as channel:
        stub = rpc.PreconditionerServiceStub(channel)
        metadata = [("authorization", f"Bearer {TOKEN}")]
        jobs = stub.GetStatus(pb.GetStatusRequest(), metadata=metadata, timeout=10).jobs
    (status,) = [status for status in jobs if status.job == job]
    return status
