"""A cluster as the scenarios see it: its API, kubectl, pods that read. Where it runs is the subclasses' business."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import requests

DRIVER = "csi.modelmount.dev"
NAMESPACE = "modelmount-system"
_WORKLOADS = "/apis/apps/v1/namespaces"


def is_ready(found: dict[str, Any]) -> bool:
    """Whether a node's or a pod's conditions say so."""
    conditions = found.get("status", {}).get("conditions", [])
    return any(entry["type"] == "Ready" and entry["status"] == "True" for entry in conditions)


class KubernetesApi:
    """Calls of one cluster as its administrator. `is_local`: this process runs the node and may look at it."""

    is_local = False
    reader_image = "docker.io/library/busybox:1.37"
    driver_image = ""
    pull_policy = "IfNotPresent"

    def __init__(self, url: str, kubeconfig: Path, kubectl: str) -> None:
        self.kubeconfig = kubeconfig
        self._url = url
        self._kubectl = kubectl
        self._session = requests.Session()
        self._session.trust_env = False

    # --- calls --------------------------------------------------------------------------------------------------

    def request(self, method: str, path: str, body: Any = None, **parameters: str) -> Any:
        """One call of the Kubernetes API. Raises: requests.HTTPError."""
        content_type = "application/json" if method != "PATCH" else "application/merge-patch+json"
        response = self._session.request(
            method,
            f"{self._url}{path}",
            data=None if body is None else json.dumps(body),
            params=parameters,
            headers={"Content-Type": content_type},
            timeout=30,
        )
        if response.status_code >= 400:
            raise requests.HTTPError(
                f"{method} {path}: {response.status_code} {response.text[:500]}", response=response
            )
        return response.json()

    def get(self, path: str) -> dict[str, Any] | None:
        """None when there is no such object."""
        try:
            return dict(self.request("GET", path))
        except requests.HTTPError as exc:
            if exc.response is not None and exc.response.status_code == 404:
                return None
            raise

    def kubectl(self, *arguments: str, stdin: str | None = None, timeout_s: float = 60) -> str:
        """The output of one kubectl call. Raises: AssertionError with what it said."""
        done = subprocess.run(
            [self._kubectl, *arguments],
            input=stdin,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            env=self._kubectl_env,
        )
        assert done.returncode == 0, f"kubectl {' '.join(arguments)[:200]}: {done.stdout[-1500:]}{done.stderr[-1500:]}"
        return done.stdout

    @contextlib.contextmanager
    def kubectl_process(self, *arguments: str, terminal: int | None = None) -> Iterator[subprocess.Popen[str]]:
        """A kubectl that runs meanwhile, on a terminal or with its output in a pipe; killed at the end."""
        command = [self._kubectl, *arguments]
        output = subprocess.PIPE if terminal is None else terminal
        with subprocess.Popen(command, stdin=terminal, stdout=output, text=True, env=self._kubectl_env) as process:
            try:
                yield process
            finally:
                process.kill()

    @property
    def _kubectl_env(self) -> dict[str, str]:
        return os.environ | {"KUBECONFIG": str(self.kubeconfig)}

    def wait(self, what: str, condition: Callable[[], bool], timeout_s: float) -> None:
        """Poll until it holds. Raises: AssertionError with what the cluster says of itself."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline, f"waited {timeout_s:g} s for {what}\n{self.explain()}"
            time.sleep(0.1)

    def explain(self) -> str:
        """Pods, events and the driver's logs, for the message of a failure."""
        told = []
        for arguments in (
            ("get", "pods", "-A", "-o", "wide"),
            ("get", "events", "-A", "--sort-by=.lastTimestamp"),
            *(
                ("logs", "-n", NAMESPACE, "-l", f"app.kubernetes.io/component={component}", "--tail=15")
                for component in ("keeper", "supervisor", "node")
            ),
        ):
            with contextlib.suppress(Exception):
                told.append(f"$ kubectl {' '.join(arguments)}\n{self.kubectl(*arguments)[-3500:]}")
        return "\n".join(told)

    # --- pods ---------------------------------------------------------------------------------------------------

    def create(self, kind_path: str, body: dict[str, Any], namespace: str = "default") -> None:
        """`kind_path` such as `persistentvolumeclaims` or `/apis/apps/v1/deployments`; namespaced."""
        group, _, plural = kind_path.rpartition("/")
        self.request("POST", f"{group or '/api/v1'}/namespaces/{namespace}/{plural}", body)

    def pod(self, name: str, namespace: str = "default") -> dict[str, Any]:
        """A pod. Raises: requests.HTTPError."""
        return dict(self.request("GET", f"/api/v1/namespaces/{namespace}/pods/{name}"))

    def run_pod(
        self,
        name: str,
        command: str | list[str],
        volumes: list[dict[str, Any]],
        mounts: list[dict[str, Any]],
        *,
        image: str | None = None,
        namespace: str = "default",
        **spec: Any,
    ) -> None:
        """Create a pod of one container that runs a shell command (or an argument vector) once."""
        self.create("pods", self.pod_of(name, command, volumes, mounts, image=image, **spec), namespace)

    def pod_of(
        self,
        name: str,
        command: str | list[str],
        volumes: list[dict[str, Any]],
        mounts: list[dict[str, Any]],
        *,
        image: str | None = None,
        **spec: Any,
    ) -> dict[str, Any]:
        """The pod `run_pod` creates."""
        return {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": name, "labels": {"app": name}},
            "spec": {
                "restartPolicy": "Never",
                "automountServiceAccountToken": False,
                "terminationGracePeriodSeconds": 1,
                "volumes": volumes,
                "containers": [
                    {
                        "name": "reader",
                        "image": image or self.reader_image,
                        "imagePullPolicy": self.pull_policy,
                        "command": ["/bin/sh", "-c", command] if isinstance(command, str) else command,
                        "volumeMounts": mounts,
                    }
                ],
                **spec,
            },
        }

    def result(self, name: str, timeout_s: float = 90, namespace: str = "default") -> tuple[int, str]:
        """Exit status and termination message of a pod's container, once it has ended."""
        state: dict[str, Any] = {}

        def ended() -> bool:
            statuses = self.pod(name, namespace).get("status", {}).get("containerStatuses") or [{}]
            state.update(statuses[0].get("state", {}).get("terminated") or {})
            return bool(state)

        self.wait(f"pod {name} to end", ended, timeout_s)
        return int(state["exitCode"]), str(state.get("message", "")).strip()

    def is_running(self, name: str) -> bool:
        """Whether the pod's container runs."""
        statuses = self.pod(name).get("status", {}).get("containerStatuses") or [{}]
        return "running" in statuses[0].get("state", {})

    def wait_running(self, name: str, timeout_s: float = 60) -> None:
        """Until the pod's container runs."""
        self.wait(f"pod {name} to run", lambda: self.is_running(name), timeout_s)

    def delete_pod(self, name: str, timeout_s: float = 60) -> float:
        """Delete and wait until it is gone. Returns the seconds."""
        started = time.monotonic()
        with contextlib.suppress(requests.HTTPError):  # gone already
            self.request("DELETE", f"/api/v1/namespaces/default/pods/{name}")
        self.wait_gone(name, timeout_s)
        return time.monotonic() - started

    def wait_gone(self, name: str, timeout_s: float) -> None:
        """Wait until a pod that is being deleted is gone."""
        path = f"/api/v1/namespaces/default/pods/{name}"
        self.wait(f"pod {name} to be gone", lambda: self.get(path) is None, timeout_s)

    def events(self, name: str) -> list[str]:
        """Reason and message of the events of a pod or a claim of that name."""
        path = f"/api/v1/namespaces/default/events?fieldSelector=involvedObject.name={name}"
        return [f"{event['reason']}: {event['message']}" for event in self.request("GET", path)["items"]]

    # --- the driver ---------------------------------------------------------------------------------------------

    def driver_pods(self, component: str) -> list[dict[str, Any]]:
        """The pods of one of our DaemonSets that are not being deleted."""
        listing = self.request(
            "GET", f"/api/v1/namespaces/{NAMESPACE}/pods", labelSelector=f"app.kubernetes.io/component={component}"
        )
        return [pod for pod in listing["items"] if "deletionTimestamp" not in pod["metadata"]]

    def driver_exec(self, component: str, *command: str) -> str:
        """Run a command in the container of one of our pods."""
        name = self.driver_pods(component)[0]["metadata"]["name"]
        return self.kubectl("exec", "-n", NAMESPACE, name, "-c", component, "--", *command)

    def status(self) -> list[dict[str, Any]]:
        """`modelmount status` of the first node."""
        answer = self.driver_exec("node", "modelmount", "status", f"--state-dir={self.state_dir}", "--output=json")
        return list(json.loads(answer)["mounts"])

    @property
    def state_dir(self) -> str:
        """The driver's state directory on the nodes."""
        return "/run/modelmount"

    def wait_rolled_out(self, component: str, timeout_s: float = 120) -> None:
        """Until every pod of that DaemonSet is ready and of its current template (OnDelete: ready only)."""
        path = f"{_WORKLOADS}/{NAMESPACE}/daemonsets/modelmount-{component}"

        def rolled_out() -> bool:
            found = self.request("GET", path)
            status, wanted = found["status"], found["status"].get("desiredNumberScheduled", 0)
            observed = status.get("observedGeneration") == found["metadata"]["generation"]
            on_delete = found["spec"]["updateStrategy"]["type"] == "OnDelete"
            updated = on_delete or status.get("updatedNumberScheduled", 0) == wanted
            # The pods themselves: the DaemonSet may still count one that has just been deleted as ready.
            pods = self.driver_pods(component)
            return bool(observed and wanted and updated and len(pods) == wanted and all(map(is_ready, pods)))

        self.wait(f"{component} to be rolled out", rolled_out, timeout_s)

    def is_registered(self) -> bool:
        """Whether every node knows the driver."""
        nodes = self.request("GET", "/apis/storage.k8s.io/v1/csinodes")["items"]
        return bool(nodes) and all(
            any(entry["name"] == DRIVER for entry in node["spec"].get("drivers") or []) for node in nodes
        )
