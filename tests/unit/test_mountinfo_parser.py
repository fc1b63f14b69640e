"""/proc/self/mountinfo lines, the odd ones too."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from csi import mountinfo

LINE = b"42 27 0:39 / /a\\040b\\134c ro,nosuid shared:1 master:2 - fuse.modelmount modelmount ro,user_id=0\n"


def test_a_line_with_optional_fields_and_escapes() -> None:
    (entry,) = mountinfo.parse(LINE)
    assert (entry.device, entry.mount_point, entry.fs_type) == ("0:39", "/a b\\c", "fuse.modelmount")
    assert "ro" in entry.options
    assert mountinfo.at([entry], "/a b\\c") == [entry]


def test_stacked_mounts_come_in_order() -> None:
    lines = b"1 0 0:1 / /m rw - tmpfs a rw\n2 1 0:2 / /m rw - tmpfs b rw\n"
    assert [entry.device for entry in mountinfo.at(mountinfo.parse(lines), "/m")] == ["0:1", "0:2"]


def test_this_machine_can_be_read() -> None:
    assert any(entry.mount_point == "/" for entry in mountinfo.read())


@given(st.text(alphabet=st.characters(exclude_characters="\0\n", exclude_categories=["Cs"]), min_size=1))
def test_any_path_survives_the_kernels_escaping(path: str) -> None:
    escaped = b"".join(b"\\%03o" % byte if byte in b" \t\\" else bytes([byte]) for byte in path.encode())
    (entry,) = mountinfo.parse(b"1 0 0:1 / /" + escaped + b" rw - tmpfs a rw")
    assert entry.mount_point == "/" + path
