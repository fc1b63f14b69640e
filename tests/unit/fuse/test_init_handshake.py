"""The INIT answer is a versioned constant, masked by what the kernel offers."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from csi.errors import MountError
from csi.fuse import handshake
from csi.fuse.handshake import InitFlag


def request(offered: int, minor: int = 45, major: int = 7) -> bytes:
    body = struct.pack("<IIIII44x", major, minor, 131072, offered & 0xFFFFFFFF, offered >> 32)
    return handshake.IN_HEADER.pack(40 + len(body), handshake.OP_INIT, 2, 0, 0, 0, 0, 0, 0) + body


EVERYTHING = (1 << 64) - 1


def flags_of(reply: bytes) -> int:
    fields = struct.unpack("<IIIIHHIIHHIIH22x", reply[16:])
    return int(fields[3] | fields[10] << 32)


def test_the_answer_of_version_1() -> None:
    """Workers of later versions serve mounts that got this answer. Changed on purpose? Bump INIT_SET_VERSION."""
    reply = handshake.init_reply(handshake.parse_init(request(EVERYTHING)))
    assert handshake.INIT_SET_VERSION == 1
    assert reply.hex() == (
        "50000000000000000200000000000000"
        "070000002d0000000000020001a0c44080006000000002000100000000010000a001000001000000"
        "000000000000000000000000000000000000000000000000"
    )


@given(st.integers(0, EVERYTHING))
def test_nothing_is_agreed_that_was_not_offered(offered: int) -> None:
    reply = handshake.init_reply(handshake.parse_init(request(offered | InitFlag.INIT_EXT)))
    assert flags_of(reply) & ~(offered | InitFlag.INIT_EXT) == 0
    assert len(reply) == 80


def test_an_old_kernel_offers_no_resend() -> None:
    parsed = handshake.parse_init(request(EVERYTHING & ~InitFlag.HAS_RESEND, minor=38))
    assert not handshake.can_resend(parsed)
    assert struct.unpack("<II", handshake.init_reply(parsed)[16:24]) == (7, 38)


@pytest.mark.parametrize("raw", [b"", b"x" * 104, request(0, minor=31), request(0)[:50]])
def test_anything_else_is_refused(raw: bytes) -> None:
    with pytest.raises(MountError):
        handshake.parse_init(raw)


@given(st.binary(max_size=200))
def test_only_our_error_comes_out(raw: bytes) -> None:
    with pytest.raises(MountError):
        handshake.parse_init(raw)
