"""The INIT answer is a versioned constant, masked by what the kernel offers."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from csi.errors import MountError
from csi.fuse import handshake, wire
from csi.fuse.handshake import BackendName, InitFlag


def request(offered: int, minor: int = 45, major: int = 7) -> bytes:
    body = struct.pack("<IIIII44x", major, minor, 131072, offered & 0xFFFFFFFF, offered >> 32)
    return wire.IN_HEADER.pack(40 + len(body), wire.Opcode.INIT, 2, 0, 0, 0, 0, 0, 0) + body


EVERYTHING = (1 << 64) - 1


def flags_of(reply: bytes) -> int:
    fields = struct.unpack("<IIIIHHIIHHIIH22x", reply[16:])
    return int(fields[3] | fields[10] << 32)


@pytest.mark.parametrize(("backend", "max_pages"), [(BackendName.PYFUSE3, "0001"), (BackendName.RAW, "0010")])
def test_the_answer_of_version_2(backend: BackendName, max_pages: str) -> None:
    """Workers of later versions serve mounts that got this answer. Changed on purpose? Bump INIT_SET_VERSION."""
    reply = handshake.init_reply(handshake.parse_init(request(EVERYTHING)), backend)
    assert handshake.INIT_SET_VERSION == 2
    assert reply.hex() == (
        "50000000000000000200000000000000"
        f"070000002d0000000000020001a0c440001860000000020001000000{max_pages}0000a001000001000000"
        "000000000000000000000000000000000000000000000000"
    )


@given(st.integers(0, EVERYTHING))
def test_nothing_is_agreed_that_was_not_offered(offered: int) -> None:
    reply = handshake.init_reply(handshake.parse_init(request(offered | InitFlag.INIT_EXT)), BackendName.RAW)
    assert flags_of(reply) & ~(offered | InitFlag.INIT_EXT) == 0
    assert len(reply) == 80


def test_an_old_kernel_offers_no_resend() -> None:
    parsed = handshake.parse_init(request(EVERYTHING & ~InitFlag.HAS_RESEND, minor=38))
    assert not handshake.can_resend(parsed)
    assert struct.unpack("<II", handshake.init_reply(parsed, BackendName.RAW)[16:24]) == (7, 38)


@pytest.mark.parametrize("raw", [b"", b"x" * 104, request(0, minor=31), request(0)[:50]])
def test_anything_else_is_refused(raw: bytes) -> None:
    with pytest.raises(MountError):
        handshake.parse_init(raw)


@given(st.binary(max_size=200))
def test_only_our_error_comes_out(raw: bytes) -> None:
    with pytest.raises(MountError):
        handshake.parse_init(raw)
