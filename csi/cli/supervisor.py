"""`modelmount supervisor`, and the flags it shares with `modelmount node --all-in-one`."""

from __future__ import annotations

import argparse
import os
from typing import Any

from csi.errors import InvalidVolumeError
from csi.jail.privileges import Capability
from csi.observe import logs
from csi.quantity import parse_size

# To start children as other users and to end them; CHOWN to give the cache's directories to the users they belong to.
_CAPABILITIES = frozenset({Capability.SETUID, Capability.SETGID, Capability.KILL, Capability.CHOWN})
_NODE_FILES = (
    "registry_config_dir", "node_registry_config", "credential_provider_config", "credential_provider_bin_dir",
)  # fmt: skip

# Numbers that no distribution gives to a user; the files they own are the cache's alone.
WORKER_UID, FETCHER_UID, STORE_UID, CHILD_GID, STORE_GID = 64100, 64101, 64102, 64100, 64102


def add_parser(subparsers: Any) -> None:
    """Register the verb."""
    parser = subparsers.add_parser(
        "supervisor",
        help="starts, watches and replaces the workers and fetchers of a node",
        description="Starts, watches and replaces workers and fetchers; holds a second copy of every connection.",
    )
    parser.add_argument("--state-dir", default="/run/modelmount", help="sockets and trees (default %(default)s)")
    parser.add_argument("--log-level", default="info", choices=["debug", "info", "warning", "error"])
    parser.add_argument(
        "--end-mounts",
        action="store_true",
        help="end every mount on SIGTERM (default: they go on, and the next supervisor gets them)",
    )
    parser.add_argument(
        "--ready-file",
        metavar="FILE",
        help="made when this supervisor has replaced everything of the one before it: then that one may end",
    )
    add_flags(parser)
    parser.set_defaults(run=run)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that say how models are fetched and cached."""
    group = parser.add_argument_group("fetching and cache")
    group.add_argument("--data-dir", default="/var/lib/modelmount", help="cache and pins (default %(default)s)")
    group.add_argument(
        "--cache-limit",
        type=parse_size,
        default=0,
        metavar="SIZE",
        help="hard limit of the cache, such as 500GB or 2TiB (default: none but the floor)",
    )
    group.add_argument(
        "--cache-min-free",
        type=float,
        default=16.0,
        metavar="PERCENT",
        help="of the cache's file system stay free (default 16: kubelet evicts pods at 15)",
    )
    group.add_argument(
        "--allow-registry",
        action="append",
        default=[],
        type=str.lower,
        metavar="HOST[:PORT]",
        help="volumes may name this registry, or with *.example.com any below that domain, and no other; may be repeated "
        "(default: any)",
    )
    group.add_argument(
        "--plain-http-host",
        action="append",
        default=[],
        metavar="HOST[:PORT]",
        help="speak plain HTTP to this registry; may be repeated (loopback registries need no entry)",
    )
    group.add_argument(
        "--registry-config-dir",
        metavar="DIR",
        help="mirrors and certificates of registries: hosts.toml files in containerd's layout, such as "
        "/etc/containerd/certs.d (default none)",
    )
    group.add_argument(
        "--node-registry-config",
        metavar="FILE",
        help="docker's configuration file with this node's own logins and credential helpers, for every volume of it "
        "(default none)",
    )
    group.add_argument(
        "--credential-provider-config",
        metavar="FILE",
        help="kubelet's CredentialProviderConfig: ask the node's credential provider plugins, as kubelet does for images",
    )
    group.add_argument(
        "--credential-provider-bin-dir", metavar="DIR", help="where the credential provider plugins lie, as on kubelet"
    )
    group.add_argument(
        "--logins-kept",
        type=float,
        default=120.0,
        metavar="S",
        help="look for the node's own logins again after so long, also while models are mounted (default 120 s); at less "
        "than half their life they are renewed before they end",
    )
    group.add_argument(
        "--layout-root",
        action="append",
        default=[],
        metavar="DIR",
        help="allow oci-layout: references below this directory; may be repeated (default none)",
    )
    group.add_argument(
        "--index-key",
        action="append",
        default=[],
        metavar="PATH",
        help="take block indexes that were attached to a model ('modelmount index build') if signed by this public key (PEM), "
        "or by one in this directory; read by each fetcher as it starts; may be repeated (default none)",
    )
    group.add_argument(
        "--fetch-threads", type=int, default=4, metavar="N", help="connections per mount, to begin with (default 4)"
    )
    group.add_argument(
        "--patience",
        type=float,
        default=10.0,
        metavar="S",
        help="how long a publish waits for layers that must be read first, before it answers how far they are "
        "(default 10 s)",
    )
    group.add_argument(
        "--abandon-after",
        type=float,
        default=600.0,
        metavar="S",
        help="end the preparation of a model that nobody has asked for again for so long (default 600 s)",
    )
    group.add_argument(
        "--read-deadline", type=float, default=120.0, metavar="S", help="how long a read waits (default 120 s)"
    )
    group.add_argument(
        "--idle-exit",
        type=float,
        default=300.0,
        metavar="S",
        help="end the worker of a mount that nobody reads for so long; the next read starts one, which takes it some 50 ms "
        "(default 300 s; 0: never)",
    )
    group.add_argument(
        "--access-life",
        type=float,
        default=24.0,
        metavar="H",
        help="how long a pod that could pull a cached model may have it while its registry is down (default 24 hours)",
    )
    group.add_argument(
        "--read-ahead-kb", type=int, default=16384, metavar="KIB", help="the kernel's read-ahead (default 16384)"
    )
    group.add_argument(
        "--fuse-backend",
        choices=["auto", "raw", "pyfuse3"],
        default="auto",
        help="who serves mounts made from now on: our own FUSE server or pyfuse3 (default auto: see the documentation)",
    )
    group.add_argument(
        "--passthrough",
        choices=["auto", "off"],
        default="auto",
        help="let the kernel read files that are proven blobs by itself, where it can (Linux 6.9, the raw backend), or never "
        "(default auto)",
    )
    group.add_argument(
        "--seal",
        choices=["auto", "always", "never"],
        default="auto",
        help="show a volume of a complete, proven model as plain files of the cache, at native speed: where the kernel does not "
        "read them by itself (auto), always, or never (default auto)",
    )
    group.add_argument(
        "--jail",
        choices=["require", "degrade"],
        default="degrade",
        help="where the kernel lacks a part of the jail of workers and fetchers (Landlock, seccomp): refuse to serve, or "
        "serve and say so (default degrade)",
    )
    group.add_argument(
        "--child-memory-mib",
        type=int,
        default=1024,
        metavar="MIB",
        help="private memory of one worker or fetcher; one that needs more ends alone (default 1024, 0: no limit)",
    )
    group.add_argument(
        "--memory-budget",
        type=parse_size,
        default=1 << 30,
        metavar="SIZE",
        help="for the blocks that all mounts together have in work, from 28MiB for each mount to 160MiB (default 1GiB)",
    )
    group.add_argument("--spares", type=int, default=1, metavar="N", help="workers and fetchers kept ready (default 1)")


def flags_of(args: argparse.Namespace) -> list[str]:
    """The same flags again, for a child process."""
    flags = [
        f"--data-dir={args.data_dir}",
        f"--fetch-threads={args.fetch_threads}",
        f"--patience={args.patience}",
        f"--logins-kept={args.logins_kept}",
        f"--abandon-after={args.abandon_after}",
        f"--read-deadline={args.read_deadline}",
        f"--idle-exit={args.idle_exit}",
        f"--access-life={args.access_life}",
        f"--read-ahead-kb={args.read_ahead_kb}",
        f"--fuse-backend={args.fuse_backend}",
        f"--passthrough={args.passthrough}",
        f"--seal={args.seal}",
        f"--jail={args.jail}",
        f"--child-memory-mib={args.child_memory_mib}",
        f"--memory-budget={args.memory_budget}",
        f"--spares={args.spares}",
        f"--cache-limit={args.cache_limit}",
        f"--cache-min-free={args.cache_min_free}",
    ]
    flags += [f"--plain-http-host={host}" for host in args.plain_http_host]
    flags += [f"--allow-registry={host}" for host in args.allow_registry]
    for name in _NODE_FILES:
        value = getattr(args, name)
        flags += [f"--{name.replace('_', '-')}={value}"] if value else []
    flags += [f"--index-key={path}" for path in args.index_key]
    return flags + [f"--layout-root={root}" for root in args.layout_root]


def run(args: argparse.Namespace) -> int:
    """Serve until SIGTERM."""
    import asyncio

    from csi.fuse.handshake import BackendName
    from csi.jail.privileges import keep_only, no_new_privileges, undumpable
    from csi.supervisor.main import serve
    from csi.supervisor.settings import SupervisorSettings

    logs.set_up("supervisor", args.log_level)
    if bool(args.credential_provider_config) != bool(args.credential_provider_bin_dir):
        raise InvalidVolumeError("--credential-provider-config and --credential-provider-bin-dir go together")
    for path in args.index_key:
        if not os.path.exists(path):  # else no fetcher would start
            raise InvalidVolumeError(f"--index-key {path}: no such file or directory", field="index-key")
    undumpable()  # it holds every volume's credentials
    is_root = os.geteuid() == 0
    if is_root:
        keep_only(_CAPABILITIES)
        no_new_privileges()
    settings = SupervisorSettings(
        state_dir=args.state_dir,
        data_dir=args.data_dir,
        plain_http_hosts=tuple(args.plain_http_host),
        allowed_registries=tuple(args.allow_registry),
        registry_config_dir=args.registry_config_dir,
        node_registry_config=args.node_registry_config,
        index_keys=tuple(args.index_key),
        credential_provider_config=args.credential_provider_config,
        credential_provider_bin_dir=args.credential_provider_bin_dir,
        logins_kept_s=args.logins_kept,
        layout_roots=tuple(args.layout_root),
        read_ahead_kb=args.read_ahead_kb,
        fuse_backend=BackendName.RAW if args.fuse_backend == "auto" else BackendName(args.fuse_backend),
        passthrough=args.passthrough == "auto",
        seal=args.seal,
        fetch_threads=args.fetch_threads,
        patience_s=args.patience,
        unwanted_s=args.abandon_after,
        read_deadline_s=args.read_deadline,
        idle_exit_s=args.idle_exit,
        access_life_s=args.access_life * 3600,
        spares=args.spares,
        jail=args.jail,
        child_memory_mib=args.child_memory_mib,
        memory_budget_bytes=args.memory_budget,
        worker_uid=WORKER_UID if is_root else None,
        fetcher_uid=FETCHER_UID if is_root else None,
        child_gid=CHILD_GID if is_root else None,
        store_uid=STORE_UID if is_root else None,
        store_gid=STORE_GID if is_root else None,
        cache_limit_bytes=args.cache_limit,
        cache_min_free=args.cache_min_free / 100,
        allowed_uids=frozenset({0, os.geteuid()}),
        end_mounts=args.end_mounts,
        ready_file=args.ready_file,
    )
    asyncio.run(serve(settings))
    return 0
