"""Models that others pushed, with a block index attached afterwards: what mounts make of it, with real registries."""

from __future__ import annotations

import io
import json
import os
import random
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ed25519
from fakes.registry import FakeRegistry
from support.mounts import drop_pages, events, mount_at, wait_for
from support.node_process import COMMAND, NodeProcess
from support.registry_servers import ROOT, Server, distribution_v3, free_port, referrers_registry

from csi.integrity import index, signed_index
from csi.oci.descriptor import Descriptor
from csi.oci.digest import Digest
from csi.oci.manifest import OCI_INDEX, OCI_MANIFEST
from csi.oci.modelpack import ModelDescription, SourceFile, pack
from csi.oci.reference import Reference
from csi.registry.upload import ModelUploader
from csi.stream.blocks import BLOCK_BYTES

pytestmark = [pytest.mark.fuse, pytest.mark.registry]

TOOLS = ROOT / ".tools"
CONTENT = random.Random("signed").randbytes(2 * BLOCK_BYTES + 77)
KEY = ed25519.Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
KEY_ID = signed_index.key_id(KEY.public_key())


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    """A directory with `private.pem`, `public/accepted.pem` and `other/another.pem`."""
    (tmp_path / "public").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "private.pem").write_bytes(
        KEY.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    for path, key in (("public/accepted.pem", KEY), ("other/another.pem", ed25519.Ed25519PrivateKey.generate())):
        (tmp_path / path).write_bytes(
            key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
        )
    return tmp_path


@pytest.fixture(params=["distribution 3", "with referrers"])
def host(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """Without the referrers API, and with it."""
    (directory := tmp_path / "registry").mkdir()
    if request.param == "with referrers":
        server = Server([str(referrers_registry(TOOLS))], directory, 0)
    else:
        port = free_port()
        (directory / "config.yml").write_text(
            f"version: 0.1\nstorage: {{filesystem: {{rootdirectory: {directory}/s}}}}\n"
            f'http: {{addr: "127.0.0.1:{port}"}}\n'
        )
        server = Server([str(distribution_v3(TOOLS)), "serve", str(directory / "config.yml")], directory, port)
    yield server.host
    server.stop()


def push_without_index(host: str, directory: Path, name: str = "m") -> str:
    """A reference. One more file makes every model another."""
    path = directory / "weights.bin"
    path.write_bytes(CONTENT)
    model = pack([SourceFile("weights.bin", Digest.of(CONTENT), len(CONTENT))], ModelDescription(name=name))
    sink = ModelUploader(Reference.parse(f"{host}/team/{name}:v1"), plain_http=False)
    try:
        sink.put_file(model.layers[0], str(path), lambda progress: None)
        sink.finish(model, "v1")
    finally:
        sink.close()
    return f"{host}/team/{name}:v1"


def build(reference: str, keys: Path) -> dict[str, str]:
    command = [*COMMAND, "index", "build", reference, "--key", str(keys / "private.pem"), "--output=json"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    outcome: dict[str, str] = json.loads(done.stdout)
    return outcome


def test_an_index_signed_by_an_accepted_key_makes_every_byte_checked(host: str, keys: Path, tmp_path: Path) -> None:
    reference = push_without_index(host, tmp_path)
    for _ in range(2):  # twice does no harm
        outcome = build(reference, keys)
    assert outcome["key_id"] == KEY_ID
    with NodeProcess(tmp_path / "node", f"--index-key={keys / 'public'}", "--read-deadline=10") as node:
        target = node.target()
        node.publish(reference, target, attributes={"prefetch": "ondemand"})
        mount = mount_at(node, target)
        assert (mount["verify"], mount["index"]) == ("chunk", f"signed by {KEY_ID}")
        assert os.listdir(target) == ["weights.bin"]
        assert (target / "weights.bin").read_bytes() == CONTENT
        os.kill(mount["fetcher_pid"], signal.SIGKILL)
        drop_pages(target / "weights.bin")
        assert (target / "weights.bin").read_bytes() == CONTENT
        wait_for(lambda: mount_at(node, target)["index"] == f"signed by {KEY_ID}", "the index was not found again")
        node.unpublish_all()
        target = node.target()
        node.publish(f"{reference.rpartition(':')[0]}@{mount['digest']}", target, "again")  # known without the registry
        assert mount_at(node, target)["index"] == f"signed by {KEY_ID}"
        assert (target / "weights.bin").read_bytes() == CONTENT
        node.unpublish_all()


def test_an_index_of_nobody_we_know_is_not_used_and_status_says_why(host: str, keys: Path, tmp_path: Path) -> None:
    reference = push_without_index(host, tmp_path)
    build(reference, keys)
    for flags, reason in (([f"--index-key={keys / 'other'}"], "signed by no key that this node accepts"), ([], "")):
        with NodeProcess(tmp_path / f"node-{len(flags)}", *flags) as node:
            target = node.target()
            node.publish(reference, target)
            mount = mount_at(node, target)
            assert (mount["verify"], mount["index"]) == ("whole", "none")
            ignored = [event["message"] for event in mount["events"] if event["reason"] == "IndexIgnored"]
            assert all(reason in message for message in ignored)
            assert len(ignored) == (1 if flags else 0)
            assert (target / "weights.bin").read_bytes() == CONTENT
            with pytest.raises(grpc.RpcError) as caught:
                node.publish(reference, node.target(), "chunk", attributes={"verify": "chunk"})
            assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
            assert reason in caught.value.details()
            node.unpublish_all()


def test_a_model_that_carries_an_index_needs_no_other(host: str, keys: Path, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "w.bin").write_bytes(CONTENT[:100])
    reference = f"{host}/team/own:v1"
    subprocess.run([*COMMAND, "push", str(tmp_path / "model"), reference], check=True, capture_output=True)
    command = [*COMMAND, "index", "build", reference, "--key", str(keys / "private.pem")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert "carries a block index already" in done.stderr


def attach(registry: FakeRegistry, model: Descriptor, data: bytes, served: bytes | None = None) -> None:
    """As a registry without the referrers API has it; `served` is what it answers instead of the index."""
    manifest, blobs = signed_index.make(model, data, KEY)
    for name, blob in blobs:
        registry.blobs[str(name)] = served if served is not None and blob == data else blob
    digest = registry.add_manifest("team/m", "referrer", manifest)
    listed = {
        "mediaType": OCI_MANIFEST,
        "digest": digest,
        "size": len(manifest),
        "artifactType": signed_index.ARTIFACT_TYPE,
    }
    document = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [listed]}
    registry.add_manifest("team/m", model.digest.path_name, json.dumps(document).encode(), OCI_INDEX)


@pytest.mark.parametrize("how", ["tampered", "of another model", "misfit", "lying blocks"])
def test_a_signature_does_not_make_a_wrong_index_right(
    how: str, keys: Path, tmp_path: Path, fake_registry: FakeRegistry
) -> None:
    digest = Digest.parse(fake_registry.add_model("team/m", "v1", {"w.bin": CONTENT}))
    model = Descriptor(OCI_MANIFEST, digest, 1000)
    data = index.dump([index.hash_file(io.BytesIO(CONTENT))])
    match how:
        case "tampered":
            attach(fake_registry, model, data, served=data[:-1] + bytes([data[-1] ^ 1]))
        case "of another model":
            attach(fake_registry, Descriptor(OCI_MANIFEST, Digest.of(b"another"), 1), data)
            fake_registry.manifests[f"/v2/team/m/manifests/{digest.path_name}"] = fake_registry.manifests[
                f"/v2/team/m/manifests/{Digest.of(b'another').path_name}"
            ]
        case "misfit":
            attach(fake_registry, model, index.dump([index.hash_file(io.BytesIO(CONTENT[1:]))]))
        case "lying blocks":
            attach(fake_registry, model, data)
    with NodeProcess(tmp_path / "node", f"--index-key={keys / 'public'}", "--read-deadline=10") as node:
        target = node.target()
        if how in ("tampered", "misfit"):
            with pytest.raises(grpc.RpcError) as caught:
                node.publish(f"{fake_registry.host}/team/m:v1", target)
            expected = grpc.StatusCode.DATA_LOSS if how == "tampered" else grpc.StatusCode.FAILED_PRECONDITION
            assert caught.value.code() is expected
            node.publish(f"{fake_registry.host}/team/m:v1", target, attributes={"verify": "whole"})
            assert (target / "w.bin").read_bytes() == CONTENT
        elif how == "of another model":
            node.publish(f"{fake_registry.host}/team/m:v1", target)
            assert mount_at(node, target)["verify"] == "whole"
            assert "IndexIgnored" in events(node, target)
        else:
            node.publish(f"{fake_registry.host}/team/m:v1", target, attributes={"prefetch": "ondemand"})
            fake_registry.blobs[str(Digest.of(CONTENT))] = bytes(len(CONTENT))
            with open(target / "w.bin", "rb", buffering=0) as file, pytest.raises(OSError, match="Input/output"):
                os.pread(file.fileno(), 10, 0)
            assert "IntegrityFailure" in events(node, target)
        node.unpublish_all()
