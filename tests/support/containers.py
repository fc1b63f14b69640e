"""Containers as their runtime makes them, as far as volumes go: a process in a mount name space and a root of its own.

The image is the host's root file system, read-only, without anything that is mounted in it; volumes are bound below /mnt
with the flags a runtime gives them (`ro` or `rw`: the host's nosuid and nodev do not reach a container), private, so that what is
mounted on the host later is not seen, unless the pod asks for `mountPropagation: HostToContainer`. The old root is detached, so a container holds on to nothing else of the host's.

Source: runc's rootfs_linux.go (prepareRoot, mountPropagate, pivotRoot), measured on a real node.
"""

from __future__ import annotations

import subprocess
import uuid
from collections.abc import Sequence
from dataclasses import dataclass

from fakes.kubelet import FakeKubelet, Pod

_START = r"""
set -eu
root=$1; count=$2; shift 2
mount --bind / "$root"
mount -t tmpfs none "$root/mnt"
while [ "$count" -gt 0 ]; do
  source=$1 name=$2 options=$3 propagation=$4; shift 4; count=$((count - 1))
  if [ -d "$source" ]; then mkdir "$root/mnt/$name"; else : > "$root/mnt/$name"; fi
  mount --no-canonicalize --bind "$source" "$root/mnt/$name"
  mount --no-canonicalize "--make-r$propagation" "$root/mnt/$name"
  mount --no-canonicalize -o "remount,bind,$options" "$root/mnt/$name"
done
mount --rbind /proc "$root/proc"
mount --rbind /dev "$root/dev"
mount -o remount,bind,ro "$root"
cd "$root"
pivot_root . mnt
umount -l mnt
exec "$@"
"""
_UNSHARE = ("unshare", "--mount", "--propagation", "slave", "sh", "-c", _START, "container")


@dataclass(frozen=True, kw_only=True)
class VolumeMount:
    """`volumeMounts[]`: the volume `name` is seen at `/mnt/<at>`."""

    name: str
    at: str
    sub_path: str = ""
    read_only: bool = True
    host_to_container: bool = False


class Container:
    """Use as a context manager: leaving it kills the process, as a pod's end does. A process that ends by itself is a
    container that ended.
    """

    def __init__(self, kubelet: FakeKubelet, pod: Pod, command: Sequence[str], *mounts: VolumeMount) -> None:
        assert kubelet.is_mounted(pod), f"kubelet starts no container of {pod.name} yet: {kubelet.events_of(pod)[-3:]}"
        self.name = uuid.uuid4().hex[:8]
        root = kubelet.root / "containers" / self.name
        root.mkdir(parents=True)
        arguments: list[str] = []
        for index, mount in enumerate(mounts):
            source = (
                kubelet.prepare_sub_path(pod, mount.name, mount.sub_path, self.name, index)
                if mount.sub_path
                else kubelet.target(pod, mount.name)
            )
            options = f"{'ro' if mount.read_only else 'rw'},suid,dev,exec,noatime"
            arguments += [str(source), mount.at, options, "slave" if mount.host_to_container else "private"]
        self.process = subprocess.Popen(
            [*_UNSHARE, str(root), str(len(mounts)), *arguments, *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            bufsize=1,
        )

    def __enter__(self) -> Container:
        return self

    def __exit__(self, *exc: object) -> None:
        self.process.kill()
        self.process.communicate()

    def ask(self, line: str) -> str:
        """For a command that answers each line it reads with one: its answer."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(line + "\n")
        answer: str = self.process.stdout.readline()
        assert answer, f"the container has ended: {self.process.communicate()[1]}"
        return answer.removesuffix("\n")

    def result(self) -> tuple[int, str, str]:
        """Exit status, output and errors of a command that ends by itself."""
        out, error = self.process.communicate()
        return self.process.returncode, out, error
