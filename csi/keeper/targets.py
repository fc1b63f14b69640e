"""Target directories: made, checked, bound over and removed without following a link a pod could have planted.

A target path is given by kubelet. Its parent is opened below one of the keeper's target roots with openat2; from
there on only descriptors are used, and what is mounted at a target is told by mount ids (fdinfo), not by its path,
which somebody may rename meanwhile. Nothing here ever asks a mounted file system anything: a dead one would answer
with an error, a hung one never.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Container, Iterator, Sequence

from csi import mountinfo
from csi.errors import InvalidVolumeError, MountError
from csi.keeper import syscalls

_BIND_ATTRIBUTES = (
    syscalls.MOUNT_ATTR_RDONLY
    | syscalls.MOUNT_ATTR_NOSUID
    | syscalls.MOUNT_ATTR_NODEV
    | syscalls.MOUNT_ATTR_NOEXEC
    | syscalls.MOUNT_ATTR_NOATIME
)
_MAX_DEAD = 8  # below one another; then they go first
_MAX_STACKED = 64  # mounts on one target; more means somebody else mounts while we unmount


class Targets:
    """Binds and unbinds below `roots` (absolute directories; links in the roots themselves are followed once)."""

    def __init__(self, roots: Sequence[str]) -> None:
        self._roots = [(os.path.normpath(root), os.path.realpath(root)) for root in roots]

    def bind(self, root_fd: int, mount_id: str, device: str, target_path: str, live: Container[str] = ()) -> bool:
        """Bind what `root_fd` names, the root of a superblock or a directory of plain files, read-only to `target_path`, which
        is created if need be. By descriptor and not by where it is mounted: if somebody has unmounted it there, a pod would see
        the node's own directory below.

        A target that shows that mount already, in either way, is left alone (returns False). Another one of ours, over plain
        files or over a superblock among the `live` devices, is replaced. Over one that is dead the new one is put: then it comes
        up in running containers too, where they have the volume with `mountPropagation: HostToContainer`; a dead mount that was
        taken away first would stay in them. `unbind` takes all of them away.

        Raises: MountError for a target that is not an empty directory, or holds a mount that is not ours; then
        nothing was changed, and a directory made here is gone again.
        """
        with self._parent_of(target_path) as (parent_fd, name):
            created = _make_directory(parent_fd, name, target_path)
            try:
                stacked = _mounted_at(parent_fd, name)
                if stacked and mountinfo.shows(stacked[-1], mount_id, device):
                    return False
                if not all(map(mountinfo.is_model, stacked)):
                    raise MountError(
                        f"target {target_path}: a {stacked[-1].fs_type} file system is mounted there already; "
                        "unmount it, or choose another target",
                        target_path=target_path,
                    )
                over_dead = 0 < len(stacked) < _MAX_DEAD and _is_dead(stacked[-1], live)
                if not over_dead:
                    _detach_all(parent_fd, name, target_path)
                target_fd = os.open(name, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent_fd)
                try:
                    if over_dead:
                        _require_mount(target_fd, stacked[-1], target_path)
                    elif not created:
                        _require_empty(target_fd, parent_fd, target_path)
                    tree_fd = syscalls.clone_tree(f"/proc/self/fd/{root_fd}")
                    try:
                        syscalls.set_tree_attributes(tree_fd, _BIND_ATTRIBUTES)
                        syscalls.attach_tree(tree_fd, target_fd)
                    finally:
                        os.close(tree_fd)
                finally:
                    os.close(target_fd)
            except OSError as exc:
                if created:
                    _remove_directory(parent_fd, name)
                raise MountError(
                    f"target {target_path}: bind mount failed: {exc.strerror}", target_path=target_path, errno=exc.errno
                ) from exc
            except MountError:
                if created:
                    _remove_directory(parent_fd, name)
                raise
        return True

    def unbind(self, target_path: str) -> None:
        """Detach every mount of ours at `target_path` and remove the directory. Nothing there: nothing to do.

        Raises: MountError when something else is there: a foreign mount, a file, a directory with content.
        """
        try:
            with self._parent_of(target_path) as (parent_fd, name):
                for entry in _mounted_at(parent_fd, name):
                    if not mountinfo.is_model(entry):
                        raise MountError(
                            f"target {target_path}: holds a {entry.fs_type} mount that is not ModelMount's; "
                            "unmount it by hand",
                            target_path=target_path,
                        )
                _detach_all(parent_fd, name, target_path)
                _remove_target(parent_fd, name, target_path)
        except MountError as exc:
            if exc.fields.get("errno") == errno.ENOENT:
                return
            raise

    @contextlib.contextmanager
    def _parent_of(self, target_path: str) -> Iterator[tuple[int, str]]:
        """The opened parent directory and the last component."""
        parent, name = os.path.split(target_path)
        if not target_path.startswith("/") or not name or os.path.normpath(target_path) != target_path:
            raise InvalidVolumeError(
                f"target_path {target_path!r} must be absolute, without '.', '..' or a trailing slash",
                field="target_path",
            )
        parent_fd = self._open_parent(parent, target_path)
        try:
            yield parent_fd, name
        finally:
            os.close(parent_fd)

    def _open_parent(self, parent: str, target_path: str) -> int:
        for spelled, real in self._roots:
            for prefix in (spelled, real):
                if parent != prefix and not parent.startswith(prefix.rstrip("/") + "/"):
                    continue
                root_fd = os.open(real, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
                try:
                    return syscalls.open_beneath(root_fd, os.path.relpath(parent, prefix))
                except OSError as exc:
                    hint = {
                        errno.ENOENT: "its parent directory does not exist; kubelet creates it before the call",
                        errno.ELOOP: "a component of the path is a symbolic link",
                    }.get(exc.errno or 0, exc.strerror)
                    raise MountError(f"target {target_path}: {hint}", target_path=target_path, errno=exc.errno) from exc
                finally:
                    os.close(root_fd)
        raise InvalidVolumeError(
            f"target_path {target_path!r} is outside the directories this node serves "
            f"({', '.join(spelled for spelled, _ in self._roots)})",
            field="target_path",
        )


def _make_directory(parent_fd: int, name: str, target_path: str) -> bool:
    try:
        os.mkdir(name, 0o750, dir_fd=parent_fd)
    except FileExistsError:
        return False
    except OSError as exc:
        raise MountError(
            f"target {target_path}: cannot create the directory: {exc.strerror}",
            target_path=target_path,
            errno=exc.errno,
        ) from exc
    return True


def _is_dead(entry: mountinfo.MountEntry, live: Container[str]) -> bool:
    """Plain files never are."""
    return entry.device not in live and mountinfo.sealed_mount(entry) is None


def _require_mount(target_fd: int, wanted: mountinfo.MountEntry, target_path: str) -> None:
    if _mount_no(target_fd) != wanted.mount_no:
        raise MountError(f"target {target_path}: something else was mounted there meanwhile", target_path=target_path)


def _require_empty(target_fd: int, parent_fd: int, target_path: str) -> None:
    """Asks the host's own file system only: what a mount hides, or a mount itself, is never listed."""
    if _mount_no(target_fd) != _mount_no(parent_fd):
        raise MountError(f"target {target_path}: something was mounted there meanwhile", target_path=target_path)
    listing_fd = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=target_fd)
    try:
        found = os.listdir(listing_fd)
    finally:
        os.close(listing_fd)
    if found:
        raise MountError(
            f"target {target_path}: the directory is not empty ({len(found)} entries, such as {sorted(found)[0]!r}); "
            "a model is mounted only over an empty directory, so that no data is hidden: empty it or choose another",
            target_path=target_path,
        )


def _mount_no(fd: int) -> int:
    """The number mountinfo gives the mount that a descriptor is of. Source: proc_pid_fdinfo(5), mnt_id."""
    with open(f"/proc/self/fdinfo/{fd}", encoding="ascii") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("mnt_id:"))


def _mounted_at(parent_fd: int, name: str) -> list[mountinfo.MountEntry]:
    """What is mounted at `name`, bottom first. An O_PATH descriptor of a mount's root asks no file system.

    Raises: OSError (no such name: nothing is mounted there, an empty list).
    """
    try:
        fd = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent_fd)
    except FileNotFoundError:
        return []
    try:
        topmost = _mount_no(fd)
    finally:
        os.close(fd)
    below = _mount_no(parent_fd)
    by_number = {entry.mount_no: entry for entry in mountinfo.read()}
    stacked: list[mountinfo.MountEntry] = []
    while topmost != below and (entry := by_number.get(topmost)):
        stacked.append(entry)
        topmost = entry.parent_no
    return stacked[::-1]


def _detach_all(parent_fd: int, name: str, target_path: str) -> None:
    """umount2 takes a path; with the parent as working directory it is one component, and no link is followed."""
    os.fchdir(parent_fd)
    try:
        for _ in range(_MAX_STACKED):
            if not _mounted_at(parent_fd, name):
                return
            syscalls.detach(name)
    except OSError as exc:
        raise MountError(f"target {target_path}: unmount failed: {exc.strerror}", errno=exc.errno) from exc
    finally:
        os.chdir("/")
    raise MountError(f"target {target_path}: mounts keep appearing there while it is unmounted")


def _remove_directory(parent_fd: int, name: str) -> None:
    with contextlib.suppress(OSError):
        os.rmdir(name, dir_fd=parent_fd)


def _remove_target(parent_fd: int, name: str, target_path: str) -> None:
    """rmdir(2) looks at the directory below a mount, and answers EBUSY for a mount point: it asks nobody else."""
    try:
        os.rmdir(name, dir_fd=parent_fd)
    except FileNotFoundError:
        return
    except NotADirectoryError as exc:
        raise MountError(
            f"target {target_path}: is not a directory; not removed", target_path=target_path, errno=exc.errno
        ) from exc
    except OSError as exc:
        raise MountError(
            f"target {target_path}: not removed: {exc.strerror}; nothing of ModelMount is mounted there any more",
            target_path=target_path,
            errno=exc.errno,
        ) from exc
