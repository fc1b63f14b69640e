"""Registries that fail for good: the reader gets EIO, and people get the reason: which model, which host, what was tried."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Iterator

import pytest
from fakes.registry import FakeRegistry, Fault
from support.mounts import mount_at, wait_for
from support.node_process import NodeProcess

from csi.driver.health import troubles_of
from csi.stream.blocks import BLOCK_BYTES

pytestmark = pytest.mark.fuse

_ALWAYS = 1 << 30
_DEADLINE_S = 3


@pytest.fixture(scope="module")
def hasty_node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NodeProcess]:
    """A read waits only a little there."""
    with NodeProcess(
        tmp_path_factory.mktemp("node"), f"--read-deadline={_DEADLINE_S}", "--passthrough=off", "--seal=never"
    ) as node:
        yield node
        node.unpublish_all()


def faults(host: str) -> dict[str, tuple[Fault, str, list[str]]]:
    """What goes wrong with every request of a blob, the reason in the volume's health, and what the event says besides."""
    port = host.rpartition(":")[2]

    def always(**what: object) -> Fault:
        return Fault(match="/blobs/", times=_ALWAYS, **what)  # type: ignore[arg-type]

    challenge = {"WWW-Authenticate": f'Bearer realm="http://{host}/nowhere",service="s"'}
    return {
        "503": (always(status=503), "RegistryUnreachable", ["answered 503", "see its log", "tried"]),
        "429": (
            always(status=429, headers={"Retry-After": "3600"}),
            "RegistryUnreachable",
            ["answered 429", "in 3600 s", "mirror"],
        ),
        "cut": (always(cut_at=1000), "RegistryUnreachable", ["before the range did", "tried"]),
        "tls": (always(redirect=f"https://127.0.0.1:{port}/x"), "RegistryUnreachable", ["TLS failed", "certificate"]),
        "dead": (always(redirect="http://127.0.0.1:1/x"), "RegistryUnreachable", ["cannot connect", "is it running"]),
        "refused": (always(redirect="http://169.254.169.254/x"), "FetchFailing", ["169.254.169.254", "refused"]),
        "no name": (always(redirect="https://gone.invalid/x"), "RegistryUnreachable", ["does not resolve", "DNS"]),
        "token": (always(status=401, headers=challenge), "", ["/nowhere", "token"]),
        "forbidden": (always(status=403), "CredentialsExpired", ["answered 403", "nodePublishSecretRef"]),
        "gone": (always(status=404), "ModelGone", ["not found", "pushed to this registry"]),
        "wrong": (always(flip_at=100), "IntegrityFailure", ["block index", "push the model again"]),
    }


@pytest.mark.parametrize("fault_name", list(faults("")))
def test_a_read_that_fails_leaves_an_event_that_says_why(
    hasty_node: NodeProcess, fake_registry: FakeRegistry, fault_name: str
) -> None:
    content = random.Random(fault_name).randbytes(BLOCK_BYTES + 1)
    repository = f"team/{fault_name.replace(' ', '-')}"
    digest = fake_registry.add_model(repository, "v1", {"w.bin": content}, indexed=True)
    target = hasty_node.target()
    hasty_node.publish(
        f"{fake_registry.host}/{repository}@{digest}", target, fault_name, attributes={"prefetch": "ondemand"}
    )
    fault, reason, words = faults(fake_registry.host)[fault_name]
    fake_registry.faults.append(fault)

    with open(target / "w.bin", "rb", buffering=0) as file:
        with pytest.raises(OSError) as caught:
            os.pread(file.fileno(), 4096, 0)
        assert caught.value.errno == errno.EIO
        mount = mount_at(hasty_node, target)
        said = next(event["message"] for event in mount["events"] if event["reason"] == "ReadFailed")
        for word in ("w.bin", f"{fake_registry.host}/{repository}", *words):
            assert word in said, said
        health = {trouble.reason: trouble.message for trouble in troubles_of(mount, str(target))}
        assert reason in health or not reason, health
        assert "reads have failed" in " ".join(health.values())

        fake_registry.faults.remove(fault)
        if fault_name not in ("wrong", "429"):  # that host is left alone for a while
            wait_for(lambda: reads(file.fileno()) == content[:4096], "bytes again once the registry is well")


def reads(fd: int) -> bytes:
    """What is there; nothing where that is an error."""
    try:
        return os.pread(fd, 4096, 0)
    except OSError:
        return b""
