"""What the golden interface cannot show: which fields are secret, what is reserved, that bytes survive, that
`generate.py --check` says what is wrong.

The golden itself is compared in test_stubs_and_interface.py.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.descriptor_pb2 import DescriptorProto, EnumDescriptorProto, FileDescriptorProto

from csi.wire import csi_pb2, registration_pb2

ROOT = Path(__file__).resolve().parents[3]

# Written out, not derived: a field that loses its mark would be logged with its credentials.
SECRET_FIELDS = {
    "ControllerExpandVolumeRequest.secrets",
    "ControllerGetVolumeHealthRequest.secrets",
    "ControllerListVolumeHealthRequest.secrets",
    "ControllerModifyVolumeRequest.secrets",
    "ControllerPublishVolumeRequest.secrets",
    "ControllerUnpublishVolumeRequest.secrets",
    "CreateSnapshotRequest.secrets",
    "CreateVolumeGroupSnapshotRequest.secrets",
    "CreateVolumeRequest.secrets",
    "DeleteSnapshotRequest.secrets",
    "DeleteVolumeGroupSnapshotRequest.secrets",
    "DeleteVolumeRequest.secrets",
    "GetMetadataAllocatedRequest.secrets",
    "GetMetadataDeltaRequest.secrets",
    "GetSnapshotRequest.secrets",
    "GetVolumeGroupSnapshotRequest.secrets",
    "ListSnapshotsRequest.secrets",
    "NodeExpandVolumeRequest.secrets",
    "NodeGetStorageHealthRequest.secrets",
    "NodePublishVolumeRequest.secrets",
    "NodeStageVolumeRequest.secrets",
    "ValidateVolumeCapabilitiesRequest.secrets",
}


def _fields(message: Descriptor) -> Iterator[FieldDescriptor]:
    yield from message.fields
    for nested in message.nested_types:
        yield from _fields(nested)


def test_the_secret_fields_are_these_and_no_others() -> None:
    marked = {
        field.full_name.removeprefix("csi.v1.")
        for message in csi_pb2.DESCRIPTOR.message_types_by_name.values()
        for field in _fields(message)
        if field.GetOptions().Extensions[csi_pb2.csi_secret]  # type: ignore[index]  # protoc types it as any field
    }
    assert marked == SECRET_FIELDS


def _file(descriptor: object) -> FileDescriptorProto:
    proto = FileDescriptorProto()
    descriptor.CopyToProto(proto)  # type: ignore[attr-defined]
    return proto


def _reserved(
    prefix: str, messages: list[DescriptorProto], enums: list[EnumDescriptorProto]
) -> Iterator[tuple[str, set[int], list[str]]]:
    for enum in enums:
        # The end of an enum's range is included, that of a message's is not.
        enum_numbers = {number for entry in enum.reserved_range for number in range(entry.start, entry.end + 1)}
        yield prefix + enum.name, enum_numbers, list(enum.reserved_name)
    for message in messages:
        numbers = {number for entry in message.reserved_range for number in range(entry.start, entry.end)}
        yield prefix + message.name, numbers, list(message.reserved_name)
        yield from _reserved(f"{prefix}{message.name}.", list(message.nested_type), list(message.enum_type))


def test_only_the_numbers_of_the_removed_health_fields_are_reserved() -> None:
    proto = _file(csi_pb2.DESCRIPTOR)
    found = list(_reserved("", list(proto.message_type), list(proto.enum_type)))
    assert {name: numbers for name, numbers, _ in found if numbers} == {
        "ControllerGetVolumeResponse.VolumeStatus": {2},
        "ControllerServiceCapability.RPC.Type": {11},
        "ListVolumesResponse.VolumeStatus": {2},
        "NodeGetVolumeStatsResponse": {2},
        "NodeServiceCapability.RPC.Type": {4},
    }
    assert [name for name, _, reserved_names in found if reserved_names] == []


@pytest.mark.parametrize("module", [csi_pb2, registration_pb2], ids=["csi", "registration"])
def test_no_call_streams_from_the_client(module: object) -> None:
    services = _file(module.DESCRIPTOR).service  # type: ignore[attr-defined]
    assert [method.name for service in services for method in service.method if method.client_streaming] == []


def test_a_publish_request_survives_the_wire() -> None:
    sent = csi_pb2.NodePublishVolumeRequest(
        volume_id="mm-1",
        target_path="/var/lib/kubelet/pods/p/volumes/v/mount",
        volume_capability=csi_pb2.VolumeCapability(
            mount=csi_pb2.VolumeCapability.MountVolume(mount_flags=["ro"]),
            access_mode=csi_pb2.VolumeCapability.AccessMode(
                mode=csi_pb2.VolumeCapability.AccessMode.SINGLE_NODE_WRITER
            ),
        ),
        readonly=True,
        secrets={"password": "not logged"},
        volume_context={"reference": "registry.example/models/a:1"},
    )
    received = csi_pb2.NodePublishVolumeRequest.FromString(sent.SerializeToString())
    assert received == sent
    assert received.volume_capability.WhichOneof("access_type") == "mount"
    assert not received.volume_capability.HasField("block")


def test_field_numbers_are_the_bytes_on_the_wire() -> None:
    """Spelled out by hand: a stub that agrees only with itself would pass a round trip."""
    request = csi_pb2.NodeUnpublishVolumeRequest(volume_id="v", target_path="/t")
    assert request.SerializeToString() == b"\x0a\x01v\x12\x02/t"
    plugin = registration_pb2.PluginInfo(type="CSIPlugin", name="n", endpoint="/e", supported_versions=["1.0.0"])
    assert plugin.SerializeToString() == b"\x0a\x09CSIPlugin\x12\x01n\x1a\x02/e\x22\x051.0.0"


def _generate(tree: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(tree / "proto" / "generate.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_check_passes_in_this_tree() -> None:
    result = _generate(ROOT, "--check")
    assert (result.returncode, result.stderr) == (0, ""), "run 'make proto'"


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of what generate.py reads and writes."""
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "proto", tmp_path / "proto", ignore=ignore)
    shutil.copytree(ROOT / "csi" / "wire", tmp_path / "csi" / "wire", ignore=ignore)
    return tmp_path


def test_check_names_what_is_stale_missing_or_left_over_and_writes_nothing(tree: Path) -> None:
    wire = tree / "csi" / "wire"
    (wire / "csi_pb2.py").write_text("# old\n", encoding="utf-8")
    (wire / "csi_pb2.pyi").unlink()
    (wire / "gone_pb2_grpc.py").write_text("# of a proto that was removed\n", encoding="utf-8")
    before = {path.name: path.read_bytes() for path in wire.iterdir()}

    result = _generate(tree, "--check")

    assert result.returncode == 1
    assert result.stderr.splitlines() == [
        "csi/wire/csi_pb2.py is stale; run 'make proto'",
        "csi/wire/csi_pb2.pyi is missing; run 'make proto'",
        "csi/wire/gone_pb2_grpc.py is left over: no proto makes it; run 'make proto'",
    ]
    assert {path.name: path.read_bytes() for path in wire.iterdir()} == before


def test_generating_repairs_the_package_and_makes_no_grpc_stub_without_a_service(tree: Path) -> None:
    wire = tree / "csi" / "wire"
    (wire / "csi_pb2.py").unlink()
    (wire / "gone_pb2.py").write_text("# of a proto that was removed\n", encoding="utf-8")
    plain = 'syntax = "proto3";\n\npackage plain;\n\nmessage Plain {}\n'
    (tree / "proto" / "csi" / "wire" / "plain.proto").write_text(plain, encoding="utf-8")

    assert _generate(tree).returncode == 0

    names = {path.name for path in wire.iterdir()}
    assert {"csi_pb2.py", "plain_pb2.py", "plain_pb2.pyi", "__init__.py"} <= names
    assert not names & {"plain_pb2_grpc.py", "gone_pb2.py"}
    assert _generate(tree, "--check").returncode == 0
