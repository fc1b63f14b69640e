"""References and digests: good ones round-trip, bad ones say what would be right."""

from __future__ import annotations

import hashlib
import string
from collections.abc import Callable
from typing import TypeVar

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from csi.errors import InvalidVolumeError
from csi.oci.digest import Digest
from csi.oci.reference import Reference
from csi.registry.address_rules import host_of

_Parsed = TypeVar("_Parsed")
_HEX = "0123456789abcdef" * 4
_SHA256 = f"sha256:{_HEX}"
_SHA512 = f"sha512:{_HEX}{_HEX}"


def outcome(parse: Callable[[str], _Parsed], text: str) -> _Parsed | InvalidVolumeError:
    try:
        return parse(text)
    except InvalidVolumeError as error:
        return error


@given(st.text(max_size=160) | st.from_regex(r"sha(256|512):[0-9a-fA-F]{0,130}"))
def test_any_text_gives_a_digest_or_our_error(text: str) -> None:
    digest = outcome(Digest.parse, text)
    if isinstance(digest, InvalidVolumeError):
        assert digest.fields == {"field": "digest"}
    else:
        assert str(digest) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        _HEX,
        "sha256:",
        f"sha256:{_HEX[:-1]}",
        f"sha256:{_HEX}0",
        f"sha256:{_HEX.upper()}",
        f"SHA256:{_HEX}",
        f"sha256:{_HEX}\n",
        f"sha512:{_HEX}",
        f"md5:{'0' * 32}",
        f"sha256:{'g' * 64}",
        f"sha256:{'٣' * 64}",
    ],
)
def test_malformed_digests_are_refused(text: str) -> None:
    with pytest.raises(InvalidVolumeError, match="digest "):
        Digest.parse(text)


def test_a_digest_hashes_names_and_shortens() -> None:
    digest = Digest.of(b"abc")
    assert str(digest) == "sha256:" + hashlib.sha256(b"abc").hexdigest()
    assert Digest.of(memoryview(b"abc"), "sha512").hex == hashlib.sha512(b"abc").hexdigest()
    assert Digest.parse(str(digest)) == digest
    assert digest.path_name == "sha256-" + digest.hex
    assert digest.short() == "sha256:" + digest.hex[:12]
    hasher = Digest.parse(_SHA512).hasher()
    hasher.update(b"abc")
    assert hasher.hexdigest() == hashlib.sha512(b"abc").hexdigest()


_references = (
    st.text(max_size=200)
    | st.text(alphabet=string.ascii_letters + string.digits + "./:@-_[] ", max_size=60)
    | st.builds(
        "{}{}/{}{}{}".format,
        st.sampled_from(["", "oci://", "oci-layout:", "https://"]),
        st.sampled_from(["r.io", "localhost", "[::1]:5000", "[::::]", "a..b", "h:0", "h:99999", "", "-a.b", "R.IO:5"]),
        st.text(alphabet="ab/_-.:", max_size=20),
        st.sampled_from(["", ":v1", ":", ":.x", "/"]),
        st.sampled_from(["", f"@{_SHA256}", f"@{_SHA512}", "@", "@sha256:"]),
    )
)


@given(_references)
@example("oci-layout:/a:b/")
@example("oci-layout:/a@b/")
@example("[:::::]/x")
def test_any_text_gives_a_reference_that_round_trips_or_our_error(text: str) -> None:
    reference = outcome(Reference.parse, text)
    if isinstance(reference, InvalidVolumeError):
        assert reference.fields["field"] in ("reference", "digest")
        return
    assert Reference.parse(str(reference)) == reference
    assert reference.is_layout == (not reference.registry)
    if not reference.is_layout:
        assert host_of(reference.registry)


@pytest.mark.parametrize(
    ("text", "registry", "repository", "tag", "digest"),
    [
        ("r.example.com/m", "r.example.com", "m", "latest", None),
        ("r.example.com/a/b/c:v1.0_x-Y", "r.example.com", "a/b/c", "v1.0_x-Y", None),
        ("oci://r.example.com/m:1", "r.example.com", "m", "1", None),
        ("R.Example.COM:5000/m", "r.example.com:5000", "m", "latest", None),
        ("localhost/m", "localhost", "m", "latest", None),
        ("127.0.0.1:5000/m:t", "127.0.0.1:5000", "m", "t", None),
        ("[::1]:5000/m:t", "[::1]:5000", "m", "t", None),
        (f"r.example.com/m@{_SHA256}", "r.example.com", "m", None, _SHA256),
        (f"r.example.com/m:v1@{_SHA512}", "r.example.com", "m", "v1", _SHA512),
        ("r.io/a.b/c__d/e-f", "r.io", "a.b/c__d/e-f", "latest", None),
    ],
)
def test_registry_references(text: str, registry: str, repository: str, tag: str | None, digest: str | None) -> None:
    reference = Reference.parse(text)
    assert (reference.registry, reference.repository, reference.tag) == (registry, repository, tag)
    assert reference.digest == (Digest.parse(digest) if digest else None)
    assert reference.origin == f"{registry}/{repository}"


@pytest.mark.parametrize(
    ("text", "directory", "tag", "digest"),
    [
        ("oci-layout:/models", "/models", None, None),
        ("oci-layout:/models/", "/models", None, None),
        ("oci-layout:/models:v1", "/models", "v1", None),
        (f"oci-layout:/models:v1@{_SHA256}", "/models", "v1", _SHA256),
        ("oci-layout:/a:b/c@d/models:v1", "/a:b/c@d/models", "v1", None),
        ("oci-layout:/with blank/m", "/with blank/m", None, None),
        ("oci-layout:/", "/", None, None),
    ],
)
def test_layout_references(text: str, directory: str, tag: str | None, digest: str | None) -> None:
    reference = Reference.parse(text)
    assert reference.is_layout
    assert (reference.layout_dir, reference.tag) == (directory, tag)
    assert reference.digest == (Digest.parse(digest) if digest else None)
    assert reference.origin == f"oci-layout:{directory}"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "is empty"),
        (" r.io/m", "blanks"),
        ("r.io/m\n", "blanks"),
        ("r.io/m\0", "control characters"),
        ("oci-layout:/m\nx", "control characters"),
        ("x" * 1025, "longer than 1024"),
        ("model", "does not begin with a registry host"),
        ("library/model:v1", "does not begin with a registry host"),
        ("https://r.io/m", "scheme that is not oci://"),
        ("r.io/", "malformed repository"),
        ("r.io/Model", "malformed repository"),
        ("r.io/a//b", "malformed repository"),
        ("r.io/-a", "malformed repository"),
        ("r.io/../m", "malformed repository"),
        ("r.io/" + "a" * 256, "malformed repository"),
        ("r.io/m:", "malformed tag"),
        ("r.io/m:.v", "malformed tag"),
        ("r.io/m:" + "t" * 129, "malformed tag"),
        ("r.io:x/m", "malformed registry host"),
        ("r.io:0/m", "malformed registry host"),
        ("r.io:65536/m", "malformed registry host"),
        ("a..b/m", "malformed registry host"),
        ("-a.b/m", "malformed registry host"),
        ("user@r.io/m", "expected sha256"),
        ("[:::::]/m", "malformed registry host"),
        ("r.io/m@sha256:12", "needs 64"),
        ("oci-layout:models", "absolute directory"),
        ("oci-layout:", "absolute directory"),
        ("oci-layout:/a/../b", "without '..'"),
        ("oci-layout:/a:b/", "where a tag or digest begins"),
        ("oci-layout:/a@b/", "where a tag or digest begins"),
    ],
)
def test_malformed_references_say_what_is_wrong(text: str, problem: str) -> None:
    with pytest.raises(InvalidVolumeError) as caught:
        Reference.parse(text)
    assert problem in str(caught.value)


def test_pinning_keeps_the_tag_as_a_label() -> None:
    pinned = Reference.parse("r.io/m:v1").with_digest(Digest.parse(_SHA256))
    assert str(pinned) == f"r.io/m:v1@{_SHA256}"
