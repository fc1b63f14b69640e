"""Settings of the supervisor, and the paths they imply."""

from __future__ import annotations

import os
from dataclasses import dataclass

from csi.cache.paths import area_path, domain_path, sealed_path
from csi.fuse.handshake import BackendName
from csi.volume import SHARED_DOMAIN, MountKey


@dataclass(frozen=True, kw_only=True, slots=True)
class SupervisorSettings:
    """`state_dir` is of this boot (sockets, trees), `data_dir` lasts (the cache). Uids None: keep our own."""

    state_dir: str
    data_dir: str
    plain_http_hosts: tuple[str, ...] = ()
    allowed_registries: tuple[str, ...] = ()
    """Which registries volumes may name: `host`, `host:port`, `*.domain`; empty for any."""
    registry_config_dir: str | None = None
    """Where `hosts.toml` files lie, in containerd's layout."""
    node_registry_config: str | None = None
    """docker's configuration file with the node's own logins."""
    credential_provider_config: str | None = None
    credential_provider_bin_dir: str | None = None
    """kubelet's credential provider plugins; both or neither."""
    index_keys: tuple[str, ...] = ()
    """Files with public keys whose signature makes an attached block index trusted."""
    logins_kept_s: float = 120.0
    """How long the node's own logins are used without looking again. Running programs for every republish would be a nuisance; a
    guess, not measured.
    """
    layout_roots: tuple[str, ...] = ()
    """Directories below which `oci-layout:` references may lie; none by default, as tenants write references."""
    read_ahead_kb: int = 16 * 1024
    """With 10 ms per request an mmap reader gets 10-20 MB/s at the kernel's 128 KiB, 450-790 at 16 MiB (measured)."""
    fuse_backend: BackendName = BackendName.RAW
    """Who serves mounts made from now on; those that exist keep theirs."""
    passthrough: bool = True
    """Let the kernel read proven files of the cache by itself, where it can."""
    seal: str = "auto"
    """Show a complete, proven model as plain files: `auto` where there is no passthrough, `always`, `never`."""
    fetch_threads: int = 4
    resolve_timeout_s: float = 20.0
    patience_s: float = 10.0
    """How long a publish waits for a model that must be read or checked first, before its caller hears how far it is."""
    unwanted_s: float = 600.0
    """After how long without a call for it the preparation of a model ends; kubelet calls every two minutes at least."""
    read_deadline_s: float = 120.0
    idle_exit_s: float = 300.0
    """After how long without a request a mount's processes end, until the next one; 0: never."""
    access_life_s: float = 24 * 3600.0
    """How long a caller that could read a model may have it while its registry cannot be asked."""
    spares: int = 1
    jail: str = "degrade"
    """What a child does where the kernel lacks a part of its jail: `require` (refuse to serve) or `degrade`."""
    child_memory_mib: int = 1024
    """Private memory of one worker or fetcher; idle they have 20, and each thread counts with its stack of 8."""
    memory_budget_bytes: int = 1024 * 1024 * 1024
    """What all mounts together may hold between registry and readers, see `csi.supervisor.memory`."""
    worker_uid: int | None = None
    fetcher_uid: int | None = None
    child_gid: int | None = None
    store_uid: int | None = None
    store_gid: int | None = None
    cache_limit_bytes: int = 0
    """0: only the free-space floor counts."""
    cache_min_free: float = 0.16
    """Of the file system, above the 15 % at which kubelet begins to evict pods."""
    allowed_uids: frozenset[int] = frozenset({0})
    end_mounts: bool = False
    """On SIGTERM: end every mount. Else they go on, and the next supervisor gets them."""
    ready_file: str | None = None
    """Made when nothing of an earlier supervisor is needed any more."""

    def jail_flags(self, *read_dirs: str) -> tuple[str, ...]:
        """What a child is told of its jail at its start."""
        flags = (f"--data-dir={self.data_dir}", f"--jail={self.jail}", f"--memory-mib={self.child_memory_mib}")
        return flags + tuple(f"--read-dir={path}" for path in read_dirs)

    def fetcher_flags(self) -> tuple[str, ...]:
        """What a fetcher is told at its start."""
        return self.jail_flags(*self.layout_roots) + tuple(f"--index-key={path}" for path in self.index_keys)

    @property
    def address_rules(self) -> dict[str, list[str]]:
        """What fetchers are told of the addresses they may speak to."""
        return {
            "plain_http_hosts": list(self.plain_http_hosts),
            "allowed_registries": list(self.allowed_registries),
        }

    @property
    def cache_dir(self) -> str:
        """The cache, of every layout there ever was."""
        return os.path.join(self.data_dir, "cache")

    @property
    def domain_dir(self) -> str:
        """The cache of the trust domain."""
        return os.path.join(self.cache_dir, domain_path(SHARED_DOMAIN))

    @property
    def sealed_dir(self) -> str:
        """Where the store puts together models to be shown as plain files."""
        return os.path.join(self.cache_dir, sealed_path())

    def area_dir(self, key: MountKey) -> str:
        """The cache area of a mount."""
        return os.path.join(self.cache_dir, area_path(key.domain, key.mount_id))
