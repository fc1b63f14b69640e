"""The interface is CSI 1.13.0 to the last number."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from google.protobuf.descriptor import Descriptor, EnumDescriptor, FieldDescriptor, FileDescriptor

from csi.wire import csi_pb2, registration_pb2

GOLDEN = Path(__file__).resolve().parents[2] / "data" / "csi-interface-1.13.0.txt"


def describe(file: FileDescriptor) -> list[str]:
    """One line per fact of the wire contract, sorted."""
    return sorted(_facts(file))


def _facts(file: FileDescriptor) -> Iterator[str]:
    for message in file.message_types_by_name.values():
        yield from _message(message)
    for enum in file.enum_types_by_name.values():
        yield from _enum(enum)
    for service in file.services_by_name.values():
        yield f"service {service.full_name}{_options(service)}"
        for method in service.methods:
            streams = ("stream " if method.server_streaming else "") + method.output_type.full_name
            yield f"rpc {method.full_name} {method.input_type.full_name} -> {streams}{_options(method)}"
    for extension in file.extensions_by_name.values():
        extended = extension.containing_type
        assert extended is not None
        yield f"extension {extended.full_name} {extension.number} {extension.name} {_type(extension)}"


def _message(message: Descriptor) -> Iterator[str]:
    if message.GetOptions().map_entry:
        return
    yield f"message {message.full_name}{_options(message)}{_reserved(message)}"
    for field in message.fields:
        oneof = f" oneof={field.containing_oneof.name}" if field.containing_oneof else ""
        yield f"field {message.full_name} {field.number} {field.name} {_type(field)}{oneof}{_options(field)}"
    for nested in message.nested_types:
        yield from _message(nested)
    for enum in message.enum_types:
        yield from _enum(enum)


def _enum(enum: EnumDescriptor) -> Iterator[str]:
    yield f"enum {enum.full_name}{_options(enum)}{_reserved(enum)}"
    for value in enum.values:
        yield f"value {enum.full_name} {value.number} {value.name}{_options(value)}"


def _type(field: FieldDescriptor) -> str:
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        key, value = field.message_type.fields
        return f"map<{_scalar(key)},{_scalar(value)}>"
    return ("repeated " if field.is_repeated else "") + _scalar(field)


def _scalar(field: FieldDescriptor) -> str:
    if field.message_type is not None:
        return str(field.message_type.full_name)
    if field.enum_type is not None:
        return str(field.enum_type.full_name)
    names = {field.TYPE_STRING: "string", field.TYPE_BOOL: "bool", field.TYPE_INT64: "int64", field.TYPE_INT32: "int32"}
    return names[field.type]


def _options(descriptor: object) -> str:
    found = [option.name for option, value in descriptor.GetOptions().ListFields() if value is True]  # type: ignore[attr-defined]
    return "".join(f" [{name}]" for name in sorted(found))


def _reserved(descriptor: Descriptor | EnumDescriptor) -> str:
    from google.protobuf import descriptor_pb2

    proto = (
        descriptor_pb2.DescriptorProto() if isinstance(descriptor, Descriptor) else descriptor_pb2.EnumDescriptorProto()
    )
    descriptor.CopyToProto(proto)  # type: ignore[arg-type]
    return "".join(f" reserved={entry.start}" for entry in proto.reserved_range)


def test_the_interface_is_csi_1_13_0() -> None:
    described = describe(csi_pb2.DESCRIPTOR) + describe(registration_pb2.DESCRIPTOR)
    expected = GOLDEN.read_text(encoding="utf-8").splitlines()
    missing, extra = sorted(set(expected) - set(described)), sorted(set(described) - set(expected))
    assert (missing, extra) == ([], []), "the wire contract changed; a new CSI version gets a new golden file"


def test_stubs_import_without_a_warning() -> None:
    import subprocess

    code = "import csi.wire.csi_pb2_grpc, csi.wire.registration_pb2_grpc"
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)
