"""The chart by itself, and what an API server says of it."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from e2e.api import KubernetesApi
from e2e.helm import CHART, ROOT, Helm, flags_of

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(120)]

EVERYTHING: dict[str, Any] = {
    "namespace.create": True,
    "imagePullSecrets": [{"name": "pull"}],
    "image.digest": "sha256:" + "a" * 64,
    "fetch.plainHTTPHosts": ["registry.internal:5000"],
    "fetch.registryConfigDir": "/etc/containerd/certs.d",
    "tokenRequests": [{"audience": "registry.example.com", "expirationSeconds": 3600}],
    "affinity": {"nodeAffinity": {}},
    "podAnnotations": {"example.com/a": "b"},
    "podLabels": {"example.com/c": "d"},
    "supervisor.hostNetwork": True,
    "supervisor.updateStrategy": "OnDelete",
    "cache.limit": "2TiB",
    "jail": "require",
    "uninstall.keepCache": True,
    "node.registrar.enabled": True,
    "sharing": "isolated",
    "node.removeStartupTaint": True,
    "controller.readSecrets": True,
    "storageClasses": [
        {"name": "by-claim", "allowedRepositories": ["registry.example.com/team/*"], "verify": "chunk"},
        {
            "name": "one-model",
            "reference": "registry.example.com/team/model:v1",
            "provisionerSecret": {"name": "pull", "namespace": "default"},
            "nodePublishSecret": {"name": "pull", "namespace": "default"},
        },
    ],
    "networkPolicy.enabled": True,
    "networkPolicy.registryEgress": [{"to": [{"ipBlock": {"cidr": "192.0.2.0/24"}}]}],
    "networkPolicy.metricsFrom": [{"namespaceSelector": {"matchLabels": {"name": "monitoring"}}}],
    "serviceAccounts.annotations": {"example.com/role": "reader"},
}


@pytest.fixture(scope="module")
def chart_helm(helm_binary: str, tmp_path_factory: pytest.TempPathFactory) -> Helm:
    """helm without a cluster."""
    return Helm(helm_binary, tmp_path_factory.mktemp("helm"))


def template(helm: Helm, values: dict[str, Any]) -> str:
    return helm.run("template", "modelmount", str(CHART), "--namespace", "modelmount-system", *flags_of(values))


@pytest.mark.parametrize("values", [{}, EVERYTHING], ids=["defaults", "everything"])
def test_lint_finds_nothing(chart_helm: Helm, values: dict[str, Any]) -> None:
    chart_helm.run("lint", "--strict", str(CHART), *flags_of(values))


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("keeper.replicas", 3, "replicas"),
        ("kubeletDir", "var/lib/kubelet", "kubeletDir"),
        ("kubeletDir", "/" + "long/" * 20 + "x", "kubeletDir"),
        ("image.digest", "latest", "digest"),
        ("logLevel", "loud", "logLevel"),
        ("cache.limit", "much", "limit"),
        ("supervisor.updateStrategy", "Recreate", "updateStrategy"),
        ("storageClasses", [{"name": "open-to-all"}], "storageClasses"),
        ("tokenRequests", [{"expirationSeconds": 3600}], "audience"),
    ],
)
def test_a_wrong_value_is_refused_by_its_name(chart_helm: Helm, key: str, value: Any, expected: str) -> None:
    assert expected in chart_helm.fails("template", str(CHART), *flags_of({key: value}))


def test_every_value_of_the_schema_has_a_default(chart_helm: Helm) -> None:
    import json

    shown = chart_helm.run("show", "values", str(CHART))
    schema = json.loads((CHART / "values.schema.json").read_text(encoding="utf-8"))
    for name in set(schema["properties"]) - {"global"}:
        assert re.search(rf"^{name}:", shown, re.MULTILINE), f"{name} is in the schema, not in values.yaml"
    for name in re.findall(r"^(\w+):", shown, re.MULTILINE):
        assert name in schema["properties"], f"{name} is in values.yaml, not in the schema"


def test_tokens_travel_in_secrets_and_only_when_they_are_asked_for(chart_helm: Helm) -> None:
    assert "serviceAccountTokenInSecrets" not in template(chart_helm, {})
    assert "serviceAccountTokenInSecrets: true" in template(chart_helm, EVERYTHING)


def test_only_the_keeper_is_privileged(chart_helm: Helm) -> None:
    for values in ({}, EVERYTHING):
        privileged = [
            document for document in template(chart_helm, values).split("\n---\n") if "privileged: true" in document
        ]
        names = sorted(re.findall(r"^  name: (\S+)", document, re.MULTILINE)[0] for document in privileged)
        # The second exists only after the release's end, to unmount what the first has left.
        assert names == ["modelmount-keeper", "modelmount-uninstall"]


def test_every_container_has_a_read_only_root_and_limits(chart_helm: Helm) -> None:
    rendered = template(chart_helm, EVERYTHING)
    containers = len(re.findall(r"^ +image: ", rendered, re.MULTILINE))
    assert containers == 9
    for what in ("readOnlyRootFilesystem: true", "limits:", "requests:"):
        assert rendered.count(what) == containers, what


def objects(helm: Helm, values: dict[str, Any]) -> list[dict[str, Any]]:
    """What the chart renders, hooks included."""
    return [found for found in yaml.safe_load_all(template(helm, values)) if found]


def pod_specs(helm: Helm, values: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The pod templates by the name of their DaemonSet, Deployment or Job."""
    return {
        found["metadata"]["name"] + ("-await" if found["kind"] == "Job" else ""): found["spec"]["template"]["spec"]
        for found in objects(helm, values)
        if found["kind"] in ("DaemonSet", "Deployment", "Job")
    }


@pytest.mark.parametrize("values", [{}, EVERYTHING], ids=["defaults", "everything"])
def test_what_is_not_privileged_has_no_more_than_it_needs(chart_helm: Helm, values: dict[str, Any]) -> None:
    added: dict[str, list[str]] = {}
    for name, pod in pod_specs(chart_helm, values).items():
        for container in [*pod.get("initContainers", []), *pod["containers"]]:
            security = container["securityContext"]
            if security.get("privileged"):
                continue
            where = f"{name}/{container['name']}"
            profile = {**pod.get("securityContext", {}), **security}["seccompProfile"]
            assert profile == {"type": "RuntimeDefault"}, where
            assert security["allowPrivilegeEscalation"] is False, where
            assert security["capabilities"]["drop"] == ["ALL"], where
            added[where] = security["capabilities"].get("add", [])
        assert not pod.get("hostPID"), name
        assert not pod.get("hostIPC"), name
    assert {where: what for where, what in added.items() if what} == {
        "modelmount-supervisor/supervisor": ["SETUID", "SETGID", "KILL", "CHOWN"]
    }


def test_pods_of_a_node_come_before_those_that_use_models(chart_helm: Helm) -> None:
    classes = {name: pod.get("priorityClassName") for name, pod in pod_specs(chart_helm, {}).items()}
    assert {classes[f"modelmount-{component}"] for component in ("keeper", "supervisor", "node")} == {
        "system-node-critical"
    }
    assert classes["modelmount-controller"] == "system-cluster-critical"


@pytest.mark.parametrize("values", [{}, EVERYTHING], ids=["defaults", "everything"])
def test_no_account_may_do_what_the_documentation_does_not_name(chart_helm: Helm, values: dict[str, Any]) -> None:
    """docs/install.md says of every rule why it is there; only the listed components have a token at all."""
    page = (ROOT / "docs" / "install.md").read_text(encoding="utf-8")
    for found in objects(chart_helm, values):
        for rule in found.get("rules", []) if found["kind"] in ("Role", "ClusterRole") else []:
            assert "*" not in [*rule["verbs"], *rule["resources"], *rule["apiGroups"]]
            for resource in rule["resources"]:
                assert resource.rstrip("s") in page, f"{found['metadata']['name']}: {resource}"
    tokens = [name for name, pod in pod_specs(chart_helm, values).items() if pod["automountServiceAccountToken"]]
    assert sorted(tokens) == ["modelmount-controller", "modelmount-node", "modelmount-uninstall-await"]


def test_prometheus_finds_the_nodes_metrics(chart_helm: Helm) -> None:
    rendered = objects(chart_helm, {"podMonitor.enabled": True, "podMonitor.labels": {"team": "a"}})
    (monitor,) = (found for found in rendered if found["kind"] == "PodMonitor")
    (node,) = (f for f in rendered if f["kind"] == "DaemonSet" and f["metadata"]["name"] == "modelmount-node")
    labels = node["spec"]["template"]["metadata"]["labels"]
    assert monitor["spec"]["selector"]["matchLabels"].items() <= labels.items()
    ports = [port["name"] for port in node["spec"]["template"]["spec"]["containers"][0]["ports"]]
    assert [endpoint["port"] for endpoint in monitor["spec"]["podMetricsEndpoints"]] == ports
    assert monitor["metadata"]["labels"]["team"] == "a"


@pytest.mark.parametrize("values", [{}, EVERYTHING], ids=["defaults", "everything"])
def test_the_commands_accept_the_flags_the_chart_gives_them(chart_helm: Helm, values: dict[str, Any]) -> None:
    """Parsed by the very parsers, so that a flag that is renamed fails here and not on a node."""
    from csi.cli.main import build_parser

    documents = template(chart_helm, values).split("\n---\n")
    parsed = []
    for document in documents:
        for found in re.findall(r"^          args:\n((?:            (?:- |#).*\n)+)", document, re.MULTILINE):
            arguments = [line[14:] for line in found.splitlines() if line.startswith("            - ")]
            if arguments[0].startswith("-"):
                continue  # a sidecar's
            parsed.append(build_parser([arguments[0]]).parse_args(arguments).verb)
    assert sorted(parsed) == ["controller", "keeper", "node", "supervisor", "uninstall", "uninstall"]


def test_the_plain_manifests_are_what_the_chart_renders(helm_binary: str) -> None:
    script = str(ROOT / "deploy" / "manifests" / "render")
    done = subprocess.run([script, helm_binary, "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("values", [{}, EVERYTHING], ids=["defaults", "everything"])
def test_the_api_server_accepts_every_object(
    cluster: KubernetesApi, chart_helm: Helm, values: dict[str, Any], tmp_path: Path
) -> None:
    """Server-side dry run with strict field checks. The namespace must exist for its objects to be looked at."""
    rendered = template(chart_helm, values).replace("namespace: modelmount-system", "namespace: default")
    shown = cluster.kubectl(
        "apply",
        "--server-side",
        "--dry-run=server",
        "--validate=strict",
        "--force-conflicts",
        "-f",
        "-",
        stdin=rendered,
    )
    assert shown.count("serverside-applied") == rendered.count("\nkind: ")
