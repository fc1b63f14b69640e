"""The filter, run by a small interpreter of the five instructions it is made of."""

from __future__ import annotations

import errno
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from csi.jail import seccomp

ARCHES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
ALLOW, KILL = 0x7FFF0000, 0x80000000


def verdict(code: bytes, number: int, arch: int, arguments: tuple[int, ...] = (0,) * 6) -> int:
    data = struct.pack("<iIQ6Q", number - (1 << 32) if number >> 31 else number, arch, 0, *arguments)
    program = list(struct.iter_unpack("<HBBI", code))
    at = accumulator = 0
    while True:
        operation, jump_true, jump_false, value = program[at]
        at += 1
        match operation:
            case 0x20:
                (accumulator,) = struct.unpack_from("<I", data, value)
            case 0x15:
                at += jump_true if accumulator == value else jump_false
            case 0x35:
                at += jump_true if accumulator >= value else jump_false
            case 0x45:
                at += jump_true if accumulator & value else jump_false
            case 0x06:
                return int(value)


@pytest.mark.parametrize("machine", ARCHES)
@pytest.mark.parametrize("role", [seccomp.WORKER, seccomp.FETCHER])
@given(number=st.integers(0, 600))
def test_exactly_the_listed_calls_are_allowed(machine: str, role: frozenset[str], number: int) -> None:
    column = list(ARCHES).index(machine)
    conditional = {"clone", "clone3", "ioctl", "prlimit64", "socket"}
    plain = {seccomp.NUMBERS[name][column] for name in role - conditional}
    guarded = {seccomp.NUMBERS[name][column] for name in role & conditional}
    found = verdict(seccomp.program(role, machine), number, ARCHES[machine], (1 << 40,) * 6)
    if number in guarded:
        assert found != ALLOW or seccomp.NUMBERS["prlimit64"][column] == number
    else:
        assert found == (ALLOW if number in plain else 0x50000 | errno.EPERM)


@pytest.mark.parametrize("machine", ARCHES)
def test_arguments_decide(machine: str) -> None:
    column, arch = list(ARCHES).index(machine), ARCHES[machine]
    code = seccomp.program(seccomp.FETCHER, machine)

    def of(name: str, *arguments: int) -> int:
        number = seccomp.NUMBERS[name][column]
        assert number is not None
        return verdict(code, number, arch, (*arguments, *(0,) * (6 - len(arguments))))

    denied = 0x50000 | errno.EPERM
    assert of("clone", 0x3D0F00) == ALLOW, "a thread"
    assert of("clone", 0x1200011) == denied, "a process"
    assert of("clone3", 1, 88) == 0x50000 | errno.ENOSYS
    assert [of("socket", domain) for domain in (2, 10, 17)] == [ALLOW, ALLOW, denied]
    assert [of("prlimit64", pid) for pid in (0, 1)] == [ALLOW, denied]
    assert [of("ioctl", 0, request) for request in (0x5421, 0x5412)] == [ALLOW, denied]


def test_another_architecture_is_killed() -> None:
    code = seccomp.program(seccomp.WORKER, "x86_64")
    assert verdict(code, 0, ARCHES["aarch64"]) == KILL
    assert verdict(code, 0, 0x40000003) == KILL, "32-bit calls have other numbers"
    assert verdict(code, 0x40000000, ARCHES["x86_64"]) == KILL, "x32"
