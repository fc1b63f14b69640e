"""Runs a plan of the reference-model test: a real node, two registries, processes that read all the while.

What a read may do, by what its volume was promised (docs/semantics.md):

chunk, eager   the file's bytes; EIO for a block that a registry lies about
whole          the same, or the very bytes a registry made up, until the blob is complete; then EIO. The same of what was
               overwritten in the cache of a blob that was not complete: there is nothing to check it by until it is
all            EIO once the deadline has passed while a registry (or what serves the mount) was away
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
from fakes.registry import FakeRegistry, Fault
from support import checking_reader
from support.model_plan import REGISTRIES, Plan
from support.node_process import NodeProcess, alive, children_of

from csi import mountinfo
from csi.cache.format import DATA_NAME, MAP_NAME, BlobState, is_segment, unpack_header
from csi.control.keeper import KeeperClient
from csi.control.supervisor import SupervisorClient
from csi.errors import CacheError, ControlError
from csi.oci.digest import Digest
from csi.stream.blocks import BLOCK_BYTES, SEGMENT_BYTES

DEADLINE_S = 12.0
_SLACK_S = 15.0
"""How long after its end a fault may still be what a read waited for: back-off, and a busy machine."""
_PREPARE_S = 90.0
_SIZES = {"a": 17 * BLOCK_BYTES + 4321, "b": 3 * BLOCK_BYTES + 17, "c": BLOCK_BYTES + 99, "d": 100}
_FILES = {"m1": ("a", "c", "d"), "m2": ("a", "b"), "m3": ("b", "c")}


class WrongError(AssertionError):
    """A read or an error that the plan does not allow."""


class PlannedRegistry(FakeRegistry):
    """Serves blobs at a pace, and lies about single bytes for a while."""

    def __init__(self, contents: dict[str, bytes], pace_s: float) -> None:
        super().__init__()
        self.lies: dict[str, dict[int, int]] = {}
        """Digest → position → how many more times."""
        self.told: set[tuple[str, int]] = set()
        """(digest, position) of the lies that somebody was told."""
        for model, names in _FILES.items():
            files = {f"{name}.bin": contents[name] for name in names}
            self.add_model(f"team/{model}", "indexed", files, indexed=True)
            self.add_model(f"team/{model}", "plain", files)
        for content in contents.values():
            digest = str(Digest.of(content))
            del self.blobs[digest]
            self.blob_readers[digest] = (len(content), self._reader(digest, content, pace_s))

    def _reader(self, digest: str, content: bytes, pace_s: float) -> Callable[[int, int], bytes]:
        def read(offset: int, length: int) -> bytes:
            time.sleep(pace_s * length / (1 << 20))
            answer = content[offset : offset + length]
            with self._lock:
                for position, times in self.lies.get(digest, {}).items():
                    if times > 0 and offset <= position < offset + length:
                        self.lies[digest][position] = times - 1
                        self.told.add((digest, position))
                        at = position - offset
                        answer = answer[:at] + bytes([answer[at] ^ 0x5A]) + answer[at + 1 :]
            return answer

        return read

    def lie(self, digest: str, position: int, times: int) -> None:
        with self._lock:
            self.lies.setdefault(digest, {})[position] = times

    def be_honest(self) -> None:
        with self._lock:
            self.lies.clear()


@dataclass(slots=True)
class Slot:
    """A published volume."""

    name: str
    target: Path
    registry: int
    files: tuple[str, ...]
    verify: str
    began: float
    mount_id: str = ""


@dataclass(slots=True)
class Span:
    """Something that was so for a while."""

    began: float
    ended: float = float("inf")

    def overlaps(self, began: float, ended: float) -> bool:
        return self.began <= ended and began <= self.ended


@dataclass(slots=True)
class Lie:
    registry: int
    file: str
    position: int
    span: Span


@dataclass(frozen=True, slots=True)
class Overwritten:
    """Bytes of a blob that was not complete, in the cache of one mount: with `whole` they are believed until it is."""

    mount_id: str
    file: str
    first: int
    end: int
    path: Path
    inode: int

    def is_there(self) -> bool:
        """Else the cache has dropped it, and nobody reads it any more."""
        with contextlib.suppress(OSError):
            return self.path.stat().st_ino == self.inode
        return False


@dataclass(slots=True)
class Memory:
    """What happened, so that what a reader says can be judged."""

    away: list[Span] = field(default_factory=list)
    lies: list[Lie] = field(default_factory=list)
    tainted: list[tuple[int, str]] = field(default_factory=list)
    """(registry, file): a mount of `whole` or `eager` may have got a lie."""
    overwritten: list[Overwritten] = field(default_factory=list)
    damaged: bool = False
    """Anything was, of any kind."""


class ReaderProcess:
    """One `checking_reader`."""

    def __init__(self, seed: int, on_report: Callable[[dict[str, Any]], None]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, checking_reader.__file__, str(seed)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self._on_report = on_report
        self._number = 0
        self._done: dict[int, threading.Event] = {}
        self.reads = 0
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            said = json.loads(line)
            if "done" in said:
                self.reads = said["reads"]
                self._done[said["done"]].set()
            else:
                self._on_report(said)

    def tell(self, op: str, **fields: Any) -> threading.Event:
        self._number += 1
        event = self._done[self._number] = threading.Event()
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.write(json.dumps({"op": op, "number": self._number, **fields}).encode() + b"\n")
            self._process.stdin.flush()
        return event

    def stop(self) -> None:
        event = self.tell("end")
        if not event.wait(DEADLINE_S * 3):
            self._process.kill()
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        self._process.wait(DEADLINE_S * 3)
        self._listener.join()
        assert self._process.stdout is not None
        self._process.stdout.close()


class Run:
    """Use `run`. Everything lies below `directory`, which is removed at the end of a run that went well."""

    def __init__(self, plan: Plan, directory: Path) -> None:
        self._plan, self._directory = plan, directory
        chosen = random.Random(plan.seed)
        self._contents = {name: chosen.randbytes(size) for name, size in _SIZES.items()}
        self._digests = {name: str(Digest.of(content)) for name, content in self._contents.items()}
        self._registries = [PlannedRegistry(self._contents, plan.pace_s) for _ in range(REGISTRIES)]
        flags = [
            f"--read-deadline={DEADLINE_S:g}",
            f"--fuse-backend={plan.backend.replace('passthrough', 'raw')}",
            f"--passthrough={'auto' if plan.backend == 'passthrough' else 'off'}",
            f"--seal={plan.seal}",
            "--patience=3",
            "--cache-min-free=1",
        ]
        if plan.cache_limit:
            flags.append(f"--cache-limit={plan.cache_limit}")
        self.node = NodeProcess(directory / "n", *flags)
        self._memory = Memory()
        self._slots: dict[int, Slot] = {}
        self._published = 0
        self._reports: list[dict[str, Any]] = []
        self._volumes: dict[str, Slot] = {}
        self._timers: list[threading.Timer] = []
        self._readers: list[ReaderProcess] = []
        self._began = time.monotonic()
        self._step = "start"

    def run(self) -> int:
        """How many reads there were. Raises: WrongError."""
        for model, names in _FILES.items():
            (self._directory / model).mkdir(parents=True)
            for name in names:
                (self._directory / model / f"{name}.bin").write_bytes(self._contents[name])
        with contextlib.ExitStack() as stack:
            for registry in self._registries:
                stack.enter_context(registry)
            stack.enter_context(self.node)
            try:
                for number in range(self._plan.readers):
                    self._readers.append(ReaderProcess(self._plan.seed * 10 + number, self._reports.append))
                for step in self._plan.steps:
                    self._step = str(step)
                    getattr(self, f"_do_{step.kind}")(**step.fields)
                    self._judge()
                self._step = "the end"
                self._end()
            finally:
                for timer in self._timers:
                    timer.cancel()
                    timer.join()
                self._calm()
                for reader in self._readers:
                    reader.stop()
            self._judge()
            self.node.unpublish_all()
        shutil.rmtree(self._directory)
        return sum(reader.reads for reader in self._readers)

    # Steps. Each is one of a plan that may have lost any other, so what it needs may not be there.

    def _do_publish(self, slot: int, registry: int, model: str, indexed: bool, verify: str, ondemand: bool) -> None:
        self._do_unpublish(slot)
        self._published += 1
        name = f"v{self._published}"
        reference = f"{self._registries[registry].host}/team/{model}:{'indexed' if indexed else 'plain'}"
        attributes = {} if verify == "default" else {"verify": verify}
        if ondemand:
            attributes["prefetch"] = "ondemand"
        promised = verify if verify != "default" else "chunk" if indexed else "whole"
        new = Slot(name, self.node.target(name), registry, _FILES[model], promised, time.monotonic())
        if promised != "chunk":  # what is lied about from here on may be in its cache
            for lie in self._memory.lies:
                if lie.registry == registry and lie.span.overlaps(new.began, new.began):
                    self._memory.tainted.append((registry, lie.file))
        while True:
            try:
                self.node.publish(reference, new.target, name, attributes=attributes)
                break
            except grpc.RpcError as exc:
                problem, now = f"{exc.code()}: {exc.details()}", time.monotonic()
                waiting = exc.code() in (grpc.StatusCode.ABORTED, grpc.StatusCode.UNAVAILABLE)
                if (waiting or self._is_away(new.began, now)) and now < new.began + _PREPARE_S:
                    time.sleep(0.1)
                    continue
                if exc.code() is grpc.StatusCode.DATA_LOSS and any(
                    lie.registry == registry and lie.file in new.files and self._was_told(lie)
                    for lie in self._memory.lies
                ):
                    return
                if verify == "eager" and exc.code() is grpc.StatusCode.ABORTED and self._may_lack_room(new):
                    return
                raise WrongError(f"publish of {reference} ({promised}): {problem}") from None
        new.mount_id = self._mount_id_of(new.target)
        self._slots[slot] = self._volumes[name] = new
        for reader in self._readers:
            reader.tell("open", volume=name, mount=str(new.target), plain=str(self._directory / model))

    def _may_lack_room(self, new: Slot) -> bool:
        """Whether all volumes in use could take up the cache: each with files of its own, and the store with a copy of each file. So
        could a download that was given up and goes on.
        """
        in_use = [new.files, *(slot.files for slot in self._slots.values())]
        needed = sum(_SIZES[file] for files in in_use for file in files) + sum(
            _SIZES[file] for file in set().union(*in_use)
        )
        given_up = any(not mount["targets"] for mount in self.node.status())
        return 0 < self._plan.cache_limit < needed or (self._plan.cache_limit > 0 and given_up)

    def _mount_id_of(self, target: Path) -> str:
        for mount in self.node.status():
            if str(target) in mount["targets"]:
                return str(mount["mount_id"])
        raise WrongError(f"{target} is published, and no mount has it: {self.node.status()}")

    def _do_unpublish(self, slot: int) -> None:
        if (old := self._slots.pop(slot, None)) is None:
            return
        self._wait([reader.tell("close", volume=old.name) for reader in self._readers])
        try:
            self.node.unpublish(old.target, old.name)
        except grpc.RpcError as exc:
            raise WrongError(f"unpublish: {exc.code()}: {exc.details()}") from None
        self._judge()
        self._forget_taint()
        self._forget_overwritten()

    def _do_run(self, seconds: float) -> None:
        time.sleep(seconds)

    def _do_check(self, slot: int) -> None:
        if (volume := self._slots.get(slot)) is not None:
            self._wait([self._readers[0].tell("check", volume=volume.name)])

    def _do_kill(self, role: str, slot: int, after_s: float) -> None:
        timer = threading.Timer(after_s, self._kill, (role, slot))
        self._timers.append(timer)
        timer.start()

    def _kill(self, role: str, slot: int) -> None:
        now = time.monotonic()
        self._memory.away.append(Span(now, now + _SLACK_S))
        for pid in self._pids_of(role):
            if role == "store" or self._serves(pid, slot):
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGKILL)
                return

    def _serves(self, pid: int, slot: int) -> bool:
        volume = self._slots.get(slot)
        return volume is not None and any(
            pid in (mount["worker_pid"], mount["fetcher_pid"])
            for mount in self._status()
            if str(volume.target) in mount["targets"]
        )

    def _do_restart(self, role: str) -> None:
        """SIGKILL, and until what depends on it is whole again: of keeper and supervisor one has what the other needs."""
        now = time.monotonic()
        self._memory.away.append(Span(now, now + _SLACK_S))
        before = self._pids_of(role)
        for pid in before:
            os.kill(pid, signal.SIGKILL)
        if role == "nursery":  # the next one is started when something is to be forked
            return
        deadline = now + 60
        while not (set(self._pids_of(role)) - set(before) and self._is_whole()):
            if time.monotonic() > deadline:
                raise WrongError(f"{role} was killed, and is not back")
            time.sleep(0.05)

    def _pids_of(self, role: str) -> list[int]:
        found = []
        for pid in children_of(self.node.pid):
            with contextlib.suppress(OSError):
                arguments = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
                if role.encode() in arguments and alive(pid):
                    found.append(pid)
        return found

    def _is_whole(self) -> bool:
        try:
            self.node.status()
            return all(mount.connected for mount in KeeperClient(str(self.node.state_dir)).mounts())
        except ControlError:
            return False

    def _status(self) -> list[dict[str, Any]]:
        """The supervisor's, once it answers."""
        deadline = time.monotonic() + 30
        while True:
            try:
                return self.node.status()
            except ControlError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)

    def _do_prune(self) -> None:
        self._cache("prune")

    def _do_verify_cache(self) -> None:
        self._cache("verify")

    def _cache(self, verb: str) -> dict[str, Any] | None:
        try:
            return SupervisorClient(str(self.node.state_dir)).cache(verb)
        except ControlError:  # the store is being started again
            return None

    def _do_damage(self, how: str, which: float, at: float) -> None:
        """Of what no mount uses now."""
        live = {mount["mount_id"] for mount in self._status()}
        used = {path.stat().st_ino for path in self._cache_files() if live & set(path.parts)}
        unused = [path for path in self._cache_files() if not live & set(path.parts) and path.stat().st_ino not in used]
        if not unused:
            return
        path = unused[int(which * len(unused))]
        size = path.stat().st_size
        self._memory.damaged = True
        beside = self._incomplete_links(path)  # asked before, and those of them that stay what they are
        match how:
            case "flip":
                if size:
                    self._note_overwritten(beside, int(at * size), int(at * size) + 1)
                    with open(path, "r+b") as file:
                        file.seek(int(at * size))
                        value = file.read(1)[0]
                        file.seek(int(at * size))
                        file.write(bytes([value ^ 0xA5]))
            case "cut":
                os.truncate(path, int(at * size))
            case "empty":
                os.truncate(path, 0)
            case "swap":
                other = path.with_name("other")
                other.write_bytes(random.Random(size).randbytes(size))
                shutil.copystat(path, other)
                os.chown(other, path.stat().st_uid, path.stat().st_gid)
                other.replace(path)
                self._note_overwritten([link for link in beside if link == path], 0, size)
            case "remove":
                path.unlink()

    def _incomplete_links(self, path: Path) -> list[Path]:
        """All names of that file under which a mount has bytes of a blob that is not known to be complete."""
        inode, links = path.stat().st_ino, []
        for link in self._cache_files():
            with contextlib.suppress(OSError):
                if link.stat().st_ino == inode and "mounts" in link.parts and _is_filling(link.with_name(MAP_NAME)):
                    links.append(link)
        return links

    def _note_overwritten(self, links: list[Path], first: int, end: int) -> None:
        """`first` and `end` within the file."""
        for link in links:
            if link.name == DATA_NAME:
                start = 0
            elif is_segment(link.name) and link.name[-5:].isdigit():
                start = int(link.name[-5:]) * SEGMENT_BYTES
            else:
                continue
            for file, content in self._contents.items():
                if Digest.of(content).path_name == link.parent.name:
                    mount_id, inode = link.parent.parent.name, link.stat().st_ino
                    one = Overwritten(mount_id, file, start + first, start + end, link, inode)
                    self._memory.overwritten.append(one)

    def _forget_overwritten(self) -> None:
        """What the cache has dropped of mounts that are gone: their readers have said everything."""
        used = {slot.mount_id for slot in self._slots.values()}
        self._memory.overwritten = [one for one in self._memory.overwritten if one.mount_id in used or one.is_there()]

    def _do_cut_live(self, which: float, at: float) -> None:
        """Of what a mount reads from this instant."""
        files = [path for path in self._cache_files() if path.stat().st_size > BLOCK_BYTES // 2]
        if self._plan.backend == "passthrough":  # the kernel reads that by itself, and to the end it finds
            files = [path for path in files if path.name != "data"]
        shown = self._shown()
        files = [path for path in files if path.stat().st_ino not in shown]
        if files:
            path = files[int(which * len(files))]
            with contextlib.suppress(OSError):
                os.truncate(path, int(at * path.stat().st_size))

    def _shown(self) -> set[int]:
        """The inodes of plain files that volumes show: they are read as they are."""
        ids = {mountinfo.sealed_mount(entry) for entry in mountinfo.read()}
        return {path.stat().st_ino for path in self._cache_files() if "sealed" in path.parts and ids & set(path.parts)}

    def _cache_files(self) -> list[Path]:
        found = []
        for path in sorted((self.node.data_dir / "cache").rglob("*")):
            with contextlib.suppress(OSError):
                being_made = any(part.startswith(".") for part in path.parts)  # the store writes it this instant
                if path.is_file() and not being_made:
                    found.append(path)
        return found

    def _do_fault(self, registry: int, how: str, times: int, at: float) -> None:
        now = time.monotonic()
        faults = {
            "503": Fault("/blobs/", times, status=503),
            "stall": Fault("/blobs/", times, stall_s=at * 4),
            "short": Fault("/blobs/", times, cut_at=int(at * 2 * BLOCK_BYTES)),
            "reset": Fault("/blobs/", times, cut_at=0),
            "gzip": Fault("/blobs/", times, gzip=True),
        }
        if how == "flip":
            self._lie(registry, "abc"[times - 1], at, times, 3.0)
            return
        self._memory.away.append(Span(now, now + _SLACK_S))
        self._registries[registry].faults.append(faults[how])

    def _do_outage(self, registry: int, seconds: float) -> None:
        fault = Fault("", times=1 << 30, status=503)
        span = Span(time.monotonic())
        self._memory.away.append(span)
        self._registries[registry].faults.insert(0, fault)
        time.sleep(seconds)
        self._registries[registry].faults.remove(fault)
        span.ended = time.monotonic() + _SLACK_S

    def _do_lie(self, registry: int, file: str, at: float, seconds: float) -> None:
        self._lie(registry, file, at, 1 << 30, seconds)
        time.sleep(seconds)

    def _lie(self, registry: int, file: str, at: float, times: int, seconds: float) -> None:
        lie = Lie(registry, file, int(at * _SIZES[file]), Span(time.monotonic()))
        self._memory.lies.append(lie)
        if any(slot.registry == registry and slot.verify != "chunk" for slot in self._slots.values()):
            self._memory.tainted.append((registry, file))
        digest = str(Digest.of(self._contents[file]))
        self._registries[registry].lie(digest, lie.position, times)

        def end() -> None:
            self._registries[registry].lie(digest, lie.position, 0)
            lie.span.ended = time.monotonic() + _SLACK_S

        timer = threading.Timer(seconds, end)
        self._timers.append(timer)
        timer.start()

    # What holds at the end of every plan.

    def _calm(self) -> None:
        for registry in self._registries:
            registry.faults.clear()
            registry.be_honest()
        now = time.monotonic()
        for span in (*self._memory.away, *(lie.span for lie in self._memory.lies)):
            span.ended = min(span.ended, now + _SLACK_S)

    def _end(self) -> None:
        for timer in self._timers:
            timer.join()
        self._calm()
        for slot in list(self._slots):
            self._do_check(slot)
            self._do_unpublish(slot)
        self._judge()
        self._memory.lies.clear()  # from here on there is no excuse
        self._memory.away.clear()
        self._cache_surely("df")
        if self._memory.damaged:
            self._cache_surely("prune")
            self._memory.damaged = False
            self._memory.overwritten.clear()
        for number, model in enumerate(_FILES):
            self._do_publish(number, number % REGISTRIES, model, number != 1, "default", False)
            self._do_check(number)
        self._judge()
        for slot in list(self._slots):
            self._do_unpublish(slot)
        verified = self._cache_surely("verify")
        for path in (self.node.data_dir / "cache").rglob("blobs/sha256-*"):
            expected = next(c for c in self._contents.values() if Digest.of(c).path_name == path.name)
            if (kept := (path / "data").read_bytes()) != expected:
                raise WrongError(
                    f"{verified}, and the store keeps other bytes as proven: {path.name}, {len(kept)} for {len(expected)}"
                )
        self._cache_surely("prune")
        # A download that was given up goes on for a while, in case somebody asks again.
        given_up = {
            mount["mount_id"] for mount in self.node.status() if not mount["targets"] and mount["verify"] == "eager"
        }
        if (left := self._cache_surely("ls")["entries"]) and not given_up:
            raise WrongError(f"nothing is published, and prune leaves {left}; mounts: {self.node.status()}")

    def _cache_surely(self, verb: str) -> dict[str, Any]:
        deadline = time.monotonic() + 60
        while (answer := self._cache(verb)) is None:
            if time.monotonic() > deadline:
                raise WrongError(f"the store does not answer {verb}")
            time.sleep(0.1)
        return answer

    # Judging

    def _wait(self, events: list[threading.Event]) -> None:
        deadline = time.monotonic() + 20 * DEADLINE_S
        for event in events:
            if not event.wait(max(0.0, deadline - time.monotonic())):
                raise WrongError("a reader hangs")

    def _is_away(self, began: float, ended: float) -> bool:
        return any(span.overlaps(began, ended) for span in self._memory.away)

    def _forget_taint(self) -> None:
        """A registry whose volumes are all gone, and that is honest, starts anew."""
        now = time.monotonic()
        self._memory.tainted = [
            (registry, file)
            for registry, file in self._memory.tainted
            if any(slot.registry == registry and slot.verify != "chunk" for slot in self._slots.values())
            or any(lie.span.ended > now + _SLACK_S and lie.registry == registry for lie in self._memory.lies)
        ]

    def _judge(self) -> None:
        reports, self._reports[:] = list(self._reports), []
        for report in reports:
            if not self._is_allowed(report):
                at = {"began": report["began"] - self._began, "ended": report["ended"] - self._began}
                raise WrongError(f"{report | at} of {self._volumes[report['volume']]} after {self._step}")

    def _is_allowed(self, report: dict[str, Any]) -> bool:
        volume = self._volumes[report["volume"]]
        file, began, ended = report["file"].partition(".")[0], report["began"], report["ended"]
        first, end = report["offset"], report["offset"] + report["length"]
        if "errno" in report:
            if report["errno"] not in ("EIO", "EFAULT") or (report["errno"] == "EFAULT") != (
                report["way"] == "_mapped"
            ):
                return False
            if ended - began > DEADLINE_S - 0.5 and self._is_away(began, ended):
                return True
            if volume.verify == "whole":
                tainted = (volume.registry, file) in self._memory.tainted
                return (tainted and any(self._told_to(volume, file))) or any(self._overwritten_of(volume, file))
            return any(
                lie.file == file
                and self._was_told(lie)
                and lie.span.overlaps(began, ended)
                and first // BLOCK_BYTES <= lie.position // BLOCK_BYTES <= (end - 1) // BLOCK_BYTES
                for lie in self._memory.lies
            )
        if volume.verify != "whole" or report["got_length"] != max(0, min(end, _SIZES[file]) - first):
            return False
        made_up = {lie.position: self._contents[file][lie.position] ^ 0x5A for lie in self._told_to(volume, file)}
        if report["differences"] == len(report["differ"]):
            return all(
                made_up.get(position) == value or self._was_overwritten(volume, file, position, position + 1)
                for position, value in report["differ"]
            )
        return all(
            self._was_overwritten(volume, file, *span) or (span[1] - span[0] == 1 and span[0] in made_up)
            for span in report["spans"]
        )

    def _was_told(self, lie: Lie) -> bool:
        return (self._digests[lie.file], lie.position) in self._registries[lie.registry].told

    def _told_to(self, volume: Slot, file: str) -> Iterator[Lie]:
        for lie in self._memory.lies:
            if lie.file == file and lie.registry == volume.registry and self._was_told(lie):
                yield lie

    def _was_overwritten(self, volume: Slot, file: str, first: int, end: int) -> bool:
        """All of that span."""
        for one in sorted(self._overwritten_of(volume, file), key=lambda one: one.first):
            if one.first <= first:
                first = max(first, one.end)
        return first >= end

    def _overwritten_of(self, volume: Slot, file: str) -> Iterator[Overwritten]:
        for one in self._memory.overwritten:
            if one.file == file and one.mount_id == volume.mount_id:
                yield one


def _is_filling(path: Path) -> bool:
    with contextlib.suppress(OSError, CacheError):
        return unpack_header(path.read_bytes()).state is BlobState.FILLING
    return False
