"""The cases. Each runs once a round, after its baseline of the same round where it has one of its own.

Cold: from the end of the publish to the last byte, with nothing of the model on the node. Warm: a second read, when
nothing is fetched or copied any more, with the kernel's FUSE pages dropped and the cache file's kept, so that every
byte passes through the worker.
"""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from bench import backends, passing, publishes
from bench.machine import (
    GIB,
    cache_files,
    cat,
    cpu_of_ours,
    drop,
    our_processes,
    resident_kib,
    role_of,
    settled,
    timed,
    touch_memory,
)
from bench.models import WEIGHTS, Model
from bench.servers import Front, capped_registry, delaying_proxy
from bench.table import Samples
from registry_process import RegistryProcess
from support.node_process import NodeProcess

CURLS = 4
_HERE = Path(__file__).parent
_CAP, _CAPPED_BYTES_PER_S = "2gbit", 250_000_000
_SLOW_DISK_BYTES_PER_S = 100_000_000


@dataclass(frozen=True, slots=True)
class Bench:
    """What every case needs. `sparse`: models by their size in GB."""

    directory: Path
    tools: Path
    binary: Path
    registry: RegistryProcess
    front: Front
    model: Model
    sparse: dict[int, Model]
    samples: Samples


Read = Callable[[Path], None]


def reader(kind: str, *arguments: str) -> Read:
    """See `readers.py`."""

    def read(path: Path) -> None:
        subprocess.run([sys.executable, "-S", str(_HERE / "readers.py"), kind, str(path), *arguments], check=True)

    return read


@contextlib.contextmanager
def published(bench: Bench, host: str, *flags: str, model: Model | None = None) -> Iterator[tuple[NodeProcess, Path]]:
    """A node of its own with the model published and nothing of it read; the weights' path."""
    model = model or bench.model
    place = bench.directory / "node"
    try:
        with NodeProcess(place, "--passthrough=off", "--seal=never", *flags) as node:
            target = node.target()
            touch_memory(3 * bench.model.size)
            node.publish(model.reference(host), target)
            yield node, target / WEIGHTS
            node.unpublish(target)
    finally:
        shutil.rmtree(place, ignore_errors=True)


def cold(bench: Bench, name: str, host: str, *flags: str, read: Read = cat) -> None:
    """One cold read of the whole model."""
    with published(bench, host, *flags) as (_, weights):
        bench.samples.add(name, timed(functools.partial(read, weights)))


def curl(bench: Bench, url: str, *flags: str, then_cat: bool = True) -> float:
    """Seconds of the baseline: parallel ranged curl into one preallocated file, then cat."""
    path, size = bench.directory / "baseline", bench.model.size
    touch_memory(3 * size)
    started = time.monotonic()
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    os.posix_fallocate(fd, 0, size)
    os.close(fd)
    step = -(-size // CURLS)
    running = []
    for first in range(0, size, step):
        out = os.open(path, os.O_WRONLY)
        os.lseek(out, first, os.SEEK_SET)
        command = ["curl", "-sf", *flags, "-r", f"{first}-{min(size, first + step) - 1}", url]
        running.append(subprocess.Popen(command, stdout=out))
        os.close(out)
    for process in running:
        if process.wait():
            raise SystemExit(f"curl failed with status {process.returncode}")
    if then_cat:
        cat(path)
    taken = time.monotonic() - started
    os.unlink(path)
    return taken


def fetch_alone(bench: Bench, host: str, *arguments: str) -> float:
    """Seconds of our own fetch engine into files, without FUSE, then cat."""
    place = bench.directory / "alone"
    place.mkdir()
    touch_memory(3 * bench.model.size)
    command = [sys.executable, str(_HERE / "fetch_alone.py"), bench.model.reference(host), str(place), *arguments]
    started = time.monotonic()
    subprocess.run(command, check=True)
    cat(*sorted(path for path in place.rglob("*") if path.is_file() and path.stat().st_size >= 1 << 20))
    taken = time.monotonic() - started
    shutil.rmtree(place)
    return taken


def sequential(bench: Bench) -> None:
    """Plain HTTP, docker-registry itself: cold, warm, memory."""
    host = bench.registry.host
    with published(bench, host) as (node, weights):
        bench.samples.add("cold", timed(functools.partial(cat, weights)))
        mount = node.status()[0]
        serving = {mount["worker_pid"], mount["fetcher_pid"]}
        for pid in our_processes(node):
            rss, pss = resident_kib(pid)
            bench.samples.add(f"Pss {role_of(pid, serving)}", pss / 1024)
            bench.samples.add(f"RSS {role_of(pid, serving)}", rss / 1024)
        bench.samples.add("Pss", sum(resident_kib(pid)[1] for pid in our_processes(node)) / 1024)
        settled(node)
        bench.samples.add("kernel-warm", timed(functools.partial(cat, weights)))
        drop(weights)
        bench.samples.add("warm", timed(functools.partial(cat, weights)))
        files = cache_files(node)
        cat(*files)
        bench.samples.add("plain file", timed(functools.partial(cat, *files)))
    bench.samples.add("curl", curl(bench, bench.model.url(host)))
    bench.samples.add("alone", fetch_alone(bench, host))


def tls(bench: Bench) -> None:
    """Through nginx with TLS; processor time of all our processes."""
    host = bench.front.tls_host
    gib = bench.model.size / GIB
    with published(bench, host, f"--registry-config-dir={bench.front.registry_config}") as (node, weights):
        before = cpu_of_ours(node)
        bench.samples.add("cold TLS", timed(functools.partial(cat, weights)))
        bench.samples.add("CPU TLS", (cpu_of_ours(node) - before) / gib)
        settled(node)
        bench.samples.add("CPU TLS settled", (cpu_of_ours(node) - before) / gib)
    bench.samples.add("curl TLS", curl(bench, bench.model.url(host, "https"), "--cacert", str(bench.front.ca)))
    bench.samples.add("alone TLS", fetch_alone(bench, host, str(bench.front.ca)))


def orders(bench: Bench) -> None:
    """Other ways of reading than from start to end."""
    round_number = str(len(bench.samples.values["cold scattered"]))
    host = bench.registry.host
    cold(bench, "cold scattered", host, read=reader("scattered", round_number))
    cold(bench, "cold mapped", host, read=reader("mapped"))
    cold(bench, "cold between", host)


def latency(bench: Bench) -> None:
    """A proxy that passes each request on later."""
    for delay_ms in (1, 20, 100):
        with delaying_proxy(bench.front.host, delay_ms, bench.directory / f"proxy-{delay_ms}") as host:
            cold(bench, f"cold {delay_ms} ms", host)


def slow_disk(bench: Bench) -> None:
    """The cache's writer takes 100 MB/s."""
    environment = {
        "PYTHONPATH": str(_HERE.parent / "support" / "slow_disk"),
        "MODELMOUNT_TEST_WRITE_BYTES_PER_S": str(_SLOW_DISK_BYTES_PER_S),
    }
    cold(bench, "cold quick disk", bench.registry.host)
    os.environ.update(environment)
    try:
        cold(bench, "cold slow disk", bench.registry.host)
    finally:
        for name in environment:
            del os.environ[name]


def capped(bench: Bench) -> None:
    """A link of 250 MB/s."""
    place = bench.directory / "capped"
    try:
        with capped_registry(bench.binary, bench.registry, place, _CAP) as behind:
            cold(bench, "cold capped", behind.host, f"--plain-http-host={behind.host}")
            bench.samples.add("curl capped", curl(bench, bench.model.url(behind.host), then_cat=False))
    finally:
        shutil.rmtree(place, ignore_errors=True)


def first_byte(bench: Bench) -> None:
    """From the call of the publish to a byte of the weights."""
    for gigabytes, model in bench.sparse.items():
        place = bench.directory / "node"
        with NodeProcess(place, "--passthrough=off") as node:
            target = node.target()
            started = time.monotonic()
            node.publish(model.reference(bench.registry.host), target)
            with open(target / WEIGHTS, "rb", buffering=0) as file:
                os.pread(file.fileno(), 1, model.size // 2)
            bench.samples.add(f"first byte {gigabytes} GB", time.monotonic() - started)
            node.unpublish(target)
        shutil.rmtree(place)


def rclone(bench: Bench) -> None:
    """`rclone mount --vfs-cache-mode full`, the same file over HTTP from nginx; ours from the same nginx."""
    with published(bench, bench.front.host) as (node, weights):
        bench.samples.add("cold nginx", timed(functools.partial(cat, weights)))
        settled(node)
        drop(weights)
        bench.samples.add("warm nginx", timed(functools.partial(cat, weights)))
    link = bench.front.files / WEIGHTS
    if not link.exists():
        os.link(bench.model.stored(bench.registry), link)
    place, cache = bench.directory / "rclone", bench.directory / "rclone-cache"
    place.mkdir()
    touch_memory(3 * bench.model.size)
    url = f"http://{bench.front.host}/files/"
    command = [rclone_binary(bench.tools), "mount", ":http:", str(place), "--http-url", url, "--read-only"]
    command += ["--vfs-cache-mode", "full", "--cache-dir", str(cache), "--config", str(bench.directory / "none.conf")]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 20
        while not os.path.ismount(place):
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit("rclone does not mount")
            time.sleep(0.05)
        bench.samples.add("cold rclone", timed(functools.partial(cat, place / WEIGHTS)))
        time.sleep(1)
        drop(place / WEIGHTS)
        bench.samples.add("warm rclone", timed(functools.partial(cat, place / WEIGHTS)))
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(20)
        subprocess.run(["umount", "-l", str(place)], check=False, capture_output=True)
        place.rmdir()
        shutil.rmtree(cache, ignore_errors=True)


def rclone_binary(tools: Path) -> str:
    """rclone of the PATH, or Debian's, unpacked below `tools`."""
    if found := shutil.which("rclone"):
        return found
    unpacked = tools / "rclone" / "usr" / "bin" / "rclone"
    if not unpacked.exists():
        place = tools / "rclone"
        place.mkdir(parents=True, exist_ok=True)
        subprocess.run(["apt-get", "download", "-qq", "rclone"], cwd=place, check=True)
        (package,) = place.glob("rclone_*.deb")
        subprocess.run(["dpkg", "-x", str(package), str(place)], check=True)
    return str(unpacked)


def both_backends(bench: Bench) -> None:
    """pyfuse3 and raw, see `backends.py`."""
    backends.measure_round(bench.directory, bench.model.reference(bench.registry.host), bench.model.size, bench.samples)


def passthrough(bench: Bench) -> None:
    """Passthrough and the worker against the plain file, see `passing.py`."""
    passing.measure_round(bench.directory, bench.model.reference(bench.registry.host), bench.model.size, bench.samples)


def storms(bench: Bench) -> None:
    """Many publishes at once, in the first round only; see `publishes.py`."""
    if not bench.samples.facts:
        bench.samples.facts.extend(publishes.measure(bench.directory, bench.registry))


CASES: dict[str, Callable[[Bench], None]] = {
    "sequential": sequential,
    "tls": tls,
    "orders": orders,
    "latency": latency,
    "slow-disk": slow_disk,
    "capped": capped,
    "first-byte": first_byte,
    "rclone": rclone,
    "backends": both_backends,
    "passthrough": passthrough,
    "publishes": storms,
}
