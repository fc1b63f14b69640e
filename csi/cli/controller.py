"""`modelmount controller`: the CSI controller service that external-provisioner calls."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from csi.cli import login
from csi.credentials import Credentials, united
from csi.errors import InvalidVolumeError
from csi.keychain.own_logins import OwnLogins, own_logins
from csi.observe import logs
from csi.oci.reference import Reference
from csi.registry_hosts import RegistryHost

if TYPE_CHECKING:
    from kubernetes.client import ApiClient

    from csi.driver.provisioner import Provisioner

_RESOLVE_TIMEOUT_S = 12.0  # external-provisioner gives a call 15 s unless told otherwise


def add_parser(subparsers: Any) -> None:
    """Register the verb."""
    parser = subparsers.add_parser(
        "controller",
        help="the CSI controller service: a PersistentVolumeClaim becomes a volume of one digest",
        description="The CSI controller service, beside external-provisioner. Resolves a tag once per volume. Needs no "
        "rights on any node; reads manifests' sizes and nothing else of a model. In a cluster its volumes are ModelVolume "
        "objects (deploy/crds/modelvolumes.yaml); elsewhere name a directory with --volume-dir.",
    )
    parser.add_argument(
        "--endpoint",
        default=os.environ.get("CSI_ENDPOINT", ""),
        help="unix:///path.sock to serve CSI at (default: the environment's CSI_ENDPOINT)",
    )
    store = parser.add_mutually_exclusive_group()
    store.add_argument("--kubeconfig", metavar="FILE", help="the cluster to use, when not running in one")
    store.add_argument("--volume-dir", metavar="DIR", help="keep volumes as files there, without Kubernetes")
    parser.add_argument(
        "--plain-http-host",
        action="append",
        default=[],
        metavar="HOST[:PORT]",
        help="speak plain HTTP to this registry; may be repeated (loopback registries need no entry)",
    )
    login.add_hosts_flag(parser)
    parser.add_argument(
        "--registry-config",
        metavar="FILE",
        help="docker's configuration file with the controller's own logins and credential helpers, for every volume (default "
        "none)",
    )
    parser.add_argument(
        "--credential-provider-config",
        metavar="FILE",
        help="kubelet's CredentialProviderConfig: ask these plugins too, for every volume",
    )
    parser.add_argument(
        "--credential-provider-bin-dir", metavar="DIR", help="where the credential provider plugins lie"
    )
    parser.add_argument("--log-level", default="info", choices=["debug", "info", "warning", "error"])
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Serve until SIGTERM."""
    import asyncio
    from importlib.metadata import version

    from csi.driver.server import serve_controller
    from csi.jail.privileges import undumpable

    logs.set_up("controller", args.log_level)
    undumpable()  # credentials pass through it
    if not args.endpoint:
        raise InvalidVolumeError("no CSI endpoint: give --endpoint unix:///path.sock or set CSI_ENDPOINT")
    client = None
    if args.volume_dir is None:
        from csi.kube.api import connect

        client = connect(args.kubeconfig)
    if bool(args.credential_provider_config) != bool(args.credential_provider_bin_dir):
        raise InvalidVolumeError("--credential-provider-config and --credential-provider-bin-dir go together")
    own = own_logins(args.registry_config, args.credential_provider_config, args.credential_provider_bin_dir)
    provisioner = make_provisioner(
        args.volume_dir, client, args.plain_http_host, lambda reference: login.hosts_of(args, reference), own
    )
    asyncio.run(serve_controller(args.endpoint, version("modelmount"), provisioner))
    return 0


def make_provisioner(
    volume_dir: str | None,
    client: ApiClient | None,
    plain_http_hosts: Iterable[str],
    hosts: Callable[[Reference], tuple[RegistryHost, ...]],
    own: OwnLogins,
) -> Provisioner:
    """Over files in `volume_dir`, or over the Kubernetes API of `client`; one of the two is given. `hosts` says who serves a
    reference's registry, `own` has the logins that are tried after a volume's.
    """
    from csi.driver.provisioner import Provisioner
    from csi.driver.volume_files import ProvisionedVolumeFiles
    from csi.oci.digest import Digest
    from csi.registry.address_rules import AddressRules
    from csi.registry.resolve import resolve_model
    from csi.registry.sources import SourceSettings

    rules = AddressRules(plain_http_hosts=frozenset(host.lower() for host in plain_http_hosts))

    def resolve(reference: Reference, variant: str, credentials: Credentials) -> tuple[Digest, int]:
        theirs = own.candidates(reference.registry, reference.repository) if own else ()
        settings = SourceSettings(rules=rules, credentials=united(credentials, theirs), hosts=hosts(reference))
        found = resolve_model(reference, settings, _RESOLVE_TIMEOUT_S, variant)
        return found.digest, found.size_bytes

    if client is None:
        assert volume_dir is not None
        return Provisioner(ProvisionedVolumeFiles(volume_dir), None, resolve)
    from csi.kube.claims import KubeClaims
    from csi.kube.volumes import KubeProvisionedVolumes

    return Provisioner(KubeProvisionedVolumes(client), KubeClaims(client), resolve)
