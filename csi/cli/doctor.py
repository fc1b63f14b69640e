"""`modelmount doctor`: is this machine fit to mount models, and if not, what to do about it.

Findings are decided by plain functions of what was read; `examine` reads it. A finding that would keep models from being
mounted is a failure, one that only costs something (speed, resilience) a warning.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import platform
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

from csi.cli.found_model import add_source_flags, open_finder
from csi.cli.state_dir import HELP, running_state_dir
from csi.errors import ModelMountError

_OLDEST_KERNEL, _RESEND_KERNEL = (5, 12), (6, 9)  # mount_setattr(2); FUSE_NOTIFY_RESEND
_LITTLE_SPACE = 0.16  # the default of --cache-min-free
_ADJTIMEX_BYTES = 512  # struct timex has 208 on 64-bit machines; room for others
_TIME_ERROR = 5  # adjtimex(2): the clock is not synchronised


class Verdict(StrEnum):
    """What a finding means for mounting models."""

    OK = "ok"
    WARNING = "warning"
    FAILURE = "failure"


@dataclass(frozen=True, slots=True)
class Finding:
    """`advice` says what to do; empty when there is nothing to do."""

    subject: str
    verdict: Verdict
    found: str
    advice: str = ""


def add_parser(subparsers: Any) -> None:
    """Register the verb."""
    parser = subparsers.add_parser(
        "doctor",
        help="check this machine, the driver's processes and a registry, and say what to do",
        description="Check kernel, FUSE, cgroups, the driver's processes, disk and clock; with a reference also whether its "
        "registry answers and takes the credentials. Changes nothing. Exit status 1 when something keeps models from being "
        "mounted.",
    )
    add_source_flags(parser, optional=True)
    parser.add_argument("--state-dir", default=running_state_dir(), help=HELP)
    parser.add_argument("--data-dir", default="/var/lib/modelmount", help="where the cache lies (%(default)s)")
    parser.add_argument("--output", choices=["text", "json"], default="text", help="what stdout gets (default: text)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print every finding. Returns 1 when one is a failure."""
    findings = list(examine(args))
    if args.output == "json":
        print(json.dumps({"findings": [asdict(finding) for finding in findings]}, sort_keys=True))
    else:
        for finding in findings:
            print(f"{finding.verdict:>8}  {finding.subject}: {finding.found}")
            if finding.advice:
                print(f"{'':>8}  → {finding.advice}")
    return 1 if any(finding.verdict is Verdict.FAILURE for finding in findings) else 0


def examine(args: argparse.Namespace) -> Iterator[Finding]:
    """Look at everything, in the order in which things depend on each other."""
    yield kernel_finding(platform.system(), platform.release())
    keeper = _answer_of_keeper(args.state_dir)
    yield fuse_finding(keeper is not None, _read("/proc/filesystems"), os.path.exists("/dev/fuse"))
    yield cgroup_finding(os.path.exists("/sys/fs/cgroup/cgroup.controllers"))
    yield process_finding("keeper", keeper)
    yield process_finding("supervisor", _answer_of_supervisor(args.state_dir))
    yield _disk(args.state_dir, args.data_dir)
    yield clock_finding(_adjtimex())
    if args.reference:
        yield _registry(args)


def kernel_finding(system: str, release: str) -> Finding:
    """From uname(2)."""
    from csi.keeper.main import kernel_version

    if system != "Linux":
        return Finding("kernel", Verdict.FAILURE, system, "models are mounted on Linux only")
    version = kernel_version(release)
    if version < _OLDEST_KERNEL:
        return Finding("kernel", Verdict.FAILURE, release, "Linux 5.12 or later is needed")
    if version < _RESEND_KERNEL:
        return Finding(
            "kernel",
            Verdict.WARNING,
            release,
            "before Linux 6.9 reads in flight may be stuck when a worker crashes; planned upgrades lose nothing",
        )
    return Finding("kernel", Verdict.OK, release)


def fuse_finding(keeper_answers: bool, filesystems: str, has_device: bool) -> Finding:
    """A keeper that serves has the device: this process may well not see it, in a container."""
    if keeper_answers:
        return Finding("FUSE", Verdict.OK, "the keeper has it")
    if "fuse\n" not in filesystems:
        return Finding("FUSE", Verdict.FAILURE, "the kernel does not know it", "modprobe fuse, and at every boot")
    if not has_device:
        return Finding(
            "FUSE", Verdict.FAILURE, "/dev/fuse is missing", "modprobe fuse; in a container give it the device"
        )
    return Finding("FUSE", Verdict.OK, "/dev/fuse is there")


def cgroup_finding(is_v2: bool) -> Finding:
    """Version 2 ends a container as a whole when it runs out of memory; version 1 ends one process of it."""
    if is_v2:
        return Finding("cgroups", Verdict.OK, "version 2")
    return Finding(
        "cgroups", Verdict.WARNING, "version 1, or mixed", "it works; Kubernetes itself is leaving version 1 behind"
    )


def process_finding(name: str, answer: str | None) -> Finding:
    """`answer`: what it says of itself; None when it does not answer."""
    if answer is not None:
        return Finding(name, Verdict.OK, answer)
    return Finding(
        name,
        Verdict.FAILURE,
        "does not answer",
        f"start 'modelmount {name}' (in a cluster: look at its DaemonSet's pod on this node), or name its --state-dir",
    )


def cache_finding(used: Mapping[str, Any]) -> Finding:
    """From what the store says of its cache, as `modelmount cache df`: this process may well not see that disk, in a container."""
    free, total, floor = (used[f"{name}_bytes"] for name in ("free", "total", "floor"))
    found = f"{used['used_bytes'] / 1e9:,.1f} GB in the cache; {free / 1e9:,.1f} of {total / 1e9:,.1f} GB free"
    if used["room_bytes"] > 0:
        return Finding("disk", Verdict.OK, f"{found}, room for {used['room_bytes'] / 1e9:,.1f} GB more")
    if free <= floor:
        advice = (
            f"{floor / 1e9:,.1f} GB stay free: free space, give the cache a disk, or lower --cache-min-free (chart: "
        )
        advice += "cache.minFreePercent)"
    else:
        advice = "raise --cache-limit (chart: cache.limit), or unpin what need not stay ('modelmount cache ls')"
    return Finding(
        "disk", Verdict.WARNING, f"{found}, no room for more", f"models still stream, but are not kept; {advice}"
    )


def disk_finding(data_dir: str, size_bytes: int, free_bytes: int, writable: bool) -> Finding:
    """From statvfs(3) of the cache's directory."""
    found = f"{data_dir}: {free_bytes / 1e9:,.1f} of {size_bytes / 1e9:,.1f} GB free"
    if not writable:
        return Finding(
            "disk", Verdict.FAILURE, f"{found}, mounted read-only", "remount it, or choose another --data-dir"
        )
    if free_bytes < _LITTLE_SPACE * size_bytes:
        return Finding(
            "disk",
            Verdict.WARNING,
            found,
            "models still stream, but are not kept: 16 % stay free by default. Free space, give the cache a disk, or lower "
            "--cache-min-free (chart: cache.minFreePercent)",
        )
    return Finding("disk", Verdict.OK, found)


def clock_finding(state: int | None) -> Finding:
    """`state` is what adjtimex(2) returns; None where it cannot be asked. Tokens and certificates depend on the clock."""
    if state is None:
        return Finding(
            "clock", Verdict.WARNING, "the kernel does not say whether it is synchronised", "check it yourself"
        )
    if state == _TIME_ERROR:
        return Finding(
            "clock",
            Verdict.WARNING,
            "not synchronised",
            "run a time service (chrony, systemd-timesyncd): registries' tokens and certificates fail on a wrong clock",
        )
    return Finding("clock", Verdict.OK, "synchronised")


def _registry(args: argparse.Namespace) -> Finding:
    try:
        with open_finder(args) as finder:
            found = finder.find("")
    except ModelMountError as exc:
        return Finding("registry", Verdict.FAILURE, str(exc), "the message says what to change; then run this again")
    return Finding("registry", Verdict.OK, f"answers for {args.reference}: {found.root.digest}")


def _answer_of_keeper(state_dir: str) -> str | None:
    from csi.control.keeper import KeeperClient

    try:
        said = KeeperClient(state_dir).ping()
    except (ModelMountError, OSError):
        return None
    return f"answers, pid {said.get('pid')}"


def _answer_of_supervisor(state_dir: str) -> str | None:
    from csi.control.supervisor import SupervisorClient

    try:
        mounts = SupervisorClient(state_dir).status()
    except (ModelMountError, OSError):
        return None
    return f"answers, {len(mounts)} models mounted"


def _disk(state_dir: str, data_dir: str) -> Finding:
    from csi.control.supervisor import SupervisorClient

    with contextlib.suppress(ModelMountError, OSError):
        return cache_finding(SupervisorClient(state_dir).cache("df"))
    existing = os.path.abspath(data_dir)
    while not os.path.isdir(existing):  # it is made at the first start
        existing = os.path.dirname(existing)
    try:
        found = os.statvfs(existing)
    except OSError as exc:
        return Finding("disk", Verdict.FAILURE, f"{data_dir}: {exc.strerror}", "choose another --data-dir")
    writable = not found.f_flag & os.ST_RDONLY
    return disk_finding(data_dir, found.f_blocks * found.f_frsize, found.f_bavail * found.f_frsize, writable)


def _adjtimex() -> int | None:
    libc = ctypes.CDLL(None, use_errno=True)
    if not sys.platform.startswith("linux"):
        return None
    state = libc.adjtimex(ctypes.create_string_buffer(_ADJTIMEX_BYTES))  # modes = 0: asks only
    return None if state < 0 else int(state)


def _read(path: str) -> str:
    try:
        with open(path, encoding="ascii", errors="replace") as file:
            return file.read()
    except OSError:
        return ""
