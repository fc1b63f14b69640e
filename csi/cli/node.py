"""`modelmount node`: the CSI node service, alone or with everything it needs as one process tree."""

from __future__ import annotations

import argparse
import logging
import os
import socket
from typing import Any

from csi.cli import supervisor
from csi.driver.sockets import endpoint_path, registration_paths
from csi.driver.token_login import parse_token_logins
from csi.errors import ControlError, InvalidVolumeError
from csi.observe import logs
from csi.pods import Events

log = logging.getLogger(__name__)

_PLUGINS_REGISTRY = "/var/lib/kubelet/plugins_registry"


def add_parser(subparsers: Any) -> None:
    """Register the verb."""
    parser = subparsers.add_parser(
        "node",
        help="the CSI node service that kubelet calls",
        description="The CSI node service. With --all-in-one it starts a keeper and a supervisor of its own.",
    )
    parser.add_argument(
        "--endpoint",
        default=os.environ.get("CSI_ENDPOINT", ""),
        help="unix:///path.sock to serve CSI at (default: the environment's CSI_ENDPOINT)",
    )
    parser.add_argument(
        "--node-id",
        default=os.environ.get("MODELMOUNT_NODE_ID") or socket.gethostname(),
        help="this node's name in the cluster (default: MODELMOUNT_NODE_ID, else the host name)",
    )
    parser.add_argument("--state-dir", default="/run/modelmount", help="sockets and records (default %(default)s)")
    registration = parser.add_mutually_exclusive_group()
    registration.add_argument(
        "--registration-dir",
        metavar="DIR",
        help="register with kubelet through its plugins_registry directory "
        f"(default: {_PLUGINS_REGISTRY} where that exists)",
    )
    registration.add_argument(
        "--no-registration", action="store_true", help="leave registration to a node-driver-registrar sidecar"
    )
    parser.add_argument(
        "--kubelet-endpoint", metavar="PATH", help="the CSI socket as kubelet sees it, where that is another path"
    )
    parser.add_argument(
        "--sharing",
        default="shared",
        choices=["shared", "isolated"],
        help="who shares the cache and the mounts: all pods that may pull a model (default), or those of one namespace",
    )
    parser.add_argument(
        "--token-login",
        action="append",
        default=[],
        metavar="REGISTRY=METHOD",
        help="log in to this registry with the pod's service-account token (tokenRequests of the CSIDriver object): METHOD is "
        "'identity' (its token service exchanges it), 'bearer' (it takes the token itself), 'basic:USER', or "
        "'exchange:USER:URL' (the token service at URL gives USER's password for it, by RFC 8693); may be repeated",
    )
    events = parser.add_mutually_exclusive_group()
    events.add_argument(
        "--no-events", action="store_true", help="post no Kubernetes events (default: in a cluster, post)"
    )
    events.add_argument("--kubeconfig", metavar="FILE", help="the cluster to post events to, when not running in a pod")
    parser.add_argument("--all-in-one", action="store_true", help="run keeper and supervisor as children")
    parser.add_argument(
        "--target-root", action="append", metavar="DIR", help="with --all-in-one: see 'modelmount keeper --help'"
    )
    parser.add_argument(
        "--with-controller",
        action="store_true",
        help="serve the Controller service at the same socket too, its volumes kept as files below --data-dir; for one "
        "node without Kubernetes (in a cluster run 'modelmount controller')",
    )
    parser.add_argument(
        "--remove-startup-taint",
        action="store_true",
        help="take the taint csi.modelmount.dev/agent-not-ready from the node once kubelet has registered the driver "
        "(needs a service account that may patch nodes)",
    )
    parser.add_argument(
        "--metrics-address",
        metavar="HOST:PORT",
        help="serve Prometheus metrics (/metrics, docs/metrics.md) and health (/healthz) there (default: nowhere)",
    )
    parser.add_argument("--log-level", default="info", choices=["debug", "info", "warning", "error"])
    supervisor.add_flags(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Serve until SIGTERM."""
    logs.set_up("node", args.log_level)
    if not args.endpoint:
        raise InvalidVolumeError("no CSI endpoint: give --endpoint unix:///path.sock or set CSI_ENDPOINT")
    if args.registration_dir is None and not args.no_registration and os.path.isdir(_PLUGINS_REGISTRY):
        args.registration_dir = _PLUGINS_REGISTRY
    token_logins = parse_token_logins(args.token_login)
    # Said here, before anything runs: a tree of processes would start the node again and again.
    endpoint_path(args.endpoint)
    if args.registration_dir is not None:
        registration_paths(args.registration_dir)
    if args.all_in_one:
        from csi.cli.process_tree import run_tree

        return run_tree(args)
    from csi.jail.privileges import keep_only, no_new_privileges, undumpable

    undumpable()  # credentials pass through it
    keep_only(frozenset())
    no_new_privileges()
    import asyncio
    from importlib.metadata import version

    from csi.driver.server import NodeSettings, serve
    from csi.volume import Sharing

    provisioner = None
    if args.with_controller:
        from csi.cli.controller import make_provisioner
        from csi.cli.login import hosts_of
        from csi.keychain.own_logins import own_logins

        provisioner = make_provisioner(
            os.path.join(args.data_dir, "volumes"),
            None,
            args.plain_http_host,
            lambda reference: hosts_of(args, reference),
            own_logins(args.node_registry_config, args.credential_provider_config, args.credential_provider_bin_dir),
        )
    remove_startup_taint = None
    if args.remove_startup_taint:
        from csi.driver.sockets import DRIVER_NAME
        from csi.kube.api import connect
        from csi.kube.taint import StartupTaint

        remove_startup_taint = StartupTaint(connect(), args.node_id, DRIVER_NAME).remove_if_registered
    asyncio.run(
        serve(
            NodeSettings(
                endpoint=args.endpoint,
                node_id=args.node_id,
                state_dir=args.state_dir,
                data_dir=args.data_dir,
                version=version("modelmount"),
                registration_dir=args.registration_dir,
                kubelet_endpoint=args.kubelet_endpoint,
                sharing=Sharing(args.sharing),
                token_logins=token_logins,
                metrics_address=args.metrics_address,
            ),
            provisioner,
            remove_startup_taint,
            _events(args),
        )
    )
    return 0


def _events(args: argparse.Namespace) -> Events | None:
    """Where to post events. The client library is loaded only where there is a cluster."""
    if args.no_events or not (args.kubeconfig or os.environ.get("KUBERNETES_SERVICE_HOST")):
        return None
    from csi.kube.api import connect
    from csi.kube.events import KubeEvents

    try:
        return KubeEvents(connect(args.kubeconfig), args.node_id)
    except ControlError as exc:
        if args.kubeconfig:
            raise
        log.info("no Kubernetes events: %s", exc)  # a pod without a service account's token
        return None
