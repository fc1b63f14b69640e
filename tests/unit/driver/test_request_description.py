"""Requests for the log: every field the interface marks as secret is left out, in every message there is."""

from __future__ import annotations

import json
from typing import Any

import pytest
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from csi.driver.requests import described
from csi.wire import csi_pb2

CANARY = "canary-7f3a"
REQUESTS = [message for name, message in csi_pb2.DESCRIPTOR.message_types_by_name.items() if name.endswith("Request")]


def is_secret(field: Any) -> bool:
    return bool(field.GetOptions().Extensions[csi_pb2.csi_secret])


def fill(message: Message, depth: int = 0) -> None:
    """Put the canary wherever a secret may be."""
    fields: list[Any] = list(message.DESCRIPTOR.fields)
    for field in fields:
        if is_secret(field):
            getattr(message, field.name)["password"] = CANARY
        elif field.name in ("volume_context", "publish_context"):
            getattr(message, field.name)["csi.storage.k8s.io/serviceAccount.tokens"] = CANARY
        elif field.name == "mount_flags":
            getattr(message, field.name).append(f"password={CANARY}")
        elif field.type == FieldDescriptor.TYPE_MESSAGE and depth < 4 and not field.message_type.GetOptions().map_entry:
            inner = getattr(message, field.name)
            fill(inner.add() if field.is_repeated else inner, depth + 1)


@pytest.mark.parametrize("descriptor", REQUESTS, ids=lambda descriptor: str(descriptor.name))
def test_no_request_shows_a_secret(descriptor: Descriptor) -> None:
    message = GetMessageClass(descriptor)()
    fill(message)
    shown = json.dumps(described(message))
    assert CANARY not in shown
    assert ("***" in shown) is (CANARY in str(message))


def test_the_rest_is_shown() -> None:
    request = csi_pb2.NodePublishVolumeRequest(volume_id="v", volume_context={"reference": "r.io/m:1"}, readonly=True)
    request.volume_capability.mount.mount_flags.append("ro")
    assert described(request) == {
        "volume_id": "v",
        "volume_context": {"reference": "r.io/m:1"},
        "readonly": True,
        "volume_capability": {"mount": {"mount_flags": ["ro"]}},
    }
