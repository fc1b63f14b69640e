"""CSI requests for the log, without their secrets: what the proto marks `csi_secret`, the service-account tokens kubelet
may put into volume_context, and the values of mount flags.

Driven by the descriptors, not by a list of fields: a field that a later CSI version adds and marks is left out too.
"""

from __future__ import annotations

from typing import Any

from google.protobuf.message import Message

from csi.driver.credentials import TOKENS_KEY
from csi.redact import REDACTED
from csi.wire import csi_pb2

_SENSITIVE_KEYS = frozenset({TOKENS_KEY})


def described(message: Message) -> dict[str, Any]:
    """A JSON value of the fields that are set. Names of secrets' keys stay, their values do not."""
    return {field.name: _value(field, value) for field, value in message.ListFields()}


def _value(field: Any, value: Any) -> Any:
    is_map = field.message_type is not None and field.message_type.GetOptions().map_entry
    if field.GetOptions().Extensions[csi_pb2.csi_secret]:
        return dict.fromkeys(sorted(value), REDACTED) if is_map else REDACTED
    if is_map:
        return {key: REDACTED if key in _SENSITIVE_KEYS else _plain(text) for key, text in value.items()}
    if field.name == "mount_flags":  # may hold credentials in values although not marked
        return [flag.partition("=")[0] + ("=" + REDACTED if "=" in flag else "") for flag in value]
    if field.is_repeated:
        return [_plain(one) for one in value]
    return _plain(value)


def _plain(value: Any) -> Any:
    if isinstance(value, Message):
        return described(value)
    return value.hex() if isinstance(value, bytes) else value
