"""Every error has a gRPC code and an errno, and crosses process boundaries unchanged."""

from __future__ import annotations

import errno
import json

import grpc
import pytest

from csi.driver.status_map import status_of
from csi.errors import (
    ModelMountError,
    MountError,
    RegistryAuthError,
    RegistryUnavailableError,
    all_error_classes,
    from_wire,
    to_wire,
)
from csi.fuse.errno_map import read_errno

FINAL_FOR_KUBELET = {
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.OUT_OF_RANGE,
    grpc.StatusCode.ALREADY_EXISTS,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.DATA_LOSS,
    grpc.StatusCode.UNAUTHENTICATED,
    grpc.StatusCode.PERMISSION_DENIED,
}


@pytest.mark.parametrize("cls", all_error_classes().values(), ids=lambda cls: cls.__name__)
def test_every_error_has_a_code_and_an_errno(cls: type[ModelMountError]) -> None:
    error = cls("something about a subject")
    assert isinstance(status_of(error), grpc.StatusCode)
    assert read_errno(error) == errno.EIO


@pytest.mark.parametrize("cls", all_error_classes().values(), ids=lambda cls: cls.__name__)
def test_what_may_be_retried_is_transient_for_kubelet(cls: type[ModelMountError]) -> None:
    if cls.retryable:
        assert status_of(cls("x")) not in FINAL_FOR_KUBELET


@pytest.mark.parametrize("cls", all_error_classes().values(), ids=lambda cls: cls.__name__)
def test_errors_cross_a_socket_unchanged(cls: type[ModelMountError]) -> None:
    error = cls("what failed", status=7, subject="x", absent=None)
    back = from_wire(json.loads(json.dumps(to_wire(error))))
    assert (type(back), back.message, back.fields) == (cls, "what failed", {"status": 7, "subject": "x"})


def test_an_unknown_kind_from_a_newer_peer_is_an_error_all_the_same() -> None:
    assert type(from_wire({"kind": "BrandNewError", "message": "m"})) is ModelMountError


def test_a_foreign_exception_becomes_an_internal_error() -> None:
    assert "ZeroDivisionError" in from_wire(to_wire(ZeroDivisionError("x"))).message


def test_403_is_permission_denied_and_401_unauthenticated() -> None:
    assert status_of(RegistryAuthError("x", status=403)) is grpc.StatusCode.PERMISSION_DENIED
    assert status_of(RegistryAuthError("x", status=401)) is grpc.StatusCode.UNAUTHENTICATED


def test_an_occupied_target_is_a_precondition_and_a_failed_mount_internal() -> None:
    assert status_of(MountError("x", target_path="/t")) is grpc.StatusCode.FAILED_PRECONDITION
    assert status_of(MountError("x", target_path="/t", errno=5)) is grpc.StatusCode.INTERNAL
    assert status_of(RegistryUnavailableError("x")) is grpc.StatusCode.UNAVAILABLE
