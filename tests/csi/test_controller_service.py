"""The CSI controller service over its real socket: what a name, a StorageClass and a claim become."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest
from fakes.kube_api import FakeKubeApi, Refusal
from fakes.registry import FakeRegistry, Fault
from formats import artifacts
from support.controller_process import ControllerProcess, capability, create_request
from support.node_process import COMMAND

from csi.wire import csi_pb2

FILES = {"config.json": b'{"a": 1}', "model.safetensors": os.urandom(2000)}
SIZE = sum(map(len, FILES.values()))


@pytest.fixture(scope="module")
def files_controller(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControllerProcess]:
    """A controller outside Kubernetes."""
    directory = tmp_path_factory.mktemp("controller")
    with ControllerProcess(directory, f"--volume-dir={directory}/volumes") as process:
        yield process


@pytest.fixture(scope="module")
def kube() -> Iterator[FakeKubeApi]:
    """A Kubernetes API."""
    with FakeKubeApi() as api:
        yield api


@pytest.fixture(scope="module")
def kube_controller(kube: FakeKubeApi, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControllerProcess]:
    """A controller over the Kubernetes API."""
    directory = tmp_path_factory.mktemp("controller")
    with ControllerProcess(directory, f"--kubeconfig={kube.kubeconfig(directory / 'kubeconfig')}") as process:
        yield process


@pytest.fixture(params=["files", "kubernetes"])
def controller(request: pytest.FixtureRequest) -> ControllerProcess:
    """Both stores keep the same promises."""
    name = "files_controller" if request.param == "files" else "kube_controller"
    found: ControllerProcess = request.getfixturevalue(name)
    return found


@pytest.fixture
def repository(fake_registry: FakeRegistry) -> str:
    """`registry/team/model`, with the tag `prod`."""
    fake_registry.add_model("team/model", "prod", FILES)
    return f"{fake_registry.host}/team/model"


def name_of(uid: str | None = None) -> str:
    return f"pvc-{uid or uuid.uuid4()}"


def refusal(call: Callable[[], object]) -> grpc.RpcError:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    return caught.value


def test_it_says_that_it_is_a_controller(files_controller: ControllerProcess) -> None:
    reply = files_controller.identity.GetPluginCapabilities(csi_pb2.GetPluginCapabilitiesRequest(), timeout=5)
    assert [one.service.type for one in reply.capabilities] == [csi_pb2.PluginCapability.Service.CONTROLLER_SERVICE]
    offered = files_controller.controller.ControllerGetCapabilities(
        csi_pb2.ControllerGetCapabilitiesRequest(), timeout=5
    )
    kinds = [one.rpc.type for one in offered.capabilities]
    assert kinds == [csi_pb2.ControllerServiceCapability.RPC.CREATE_DELETE_VOLUME]


def test_a_tag_becomes_a_digest_once(
    controller: ControllerProcess, fake_registry: FakeRegistry, repository: str
) -> None:
    name, parameters = name_of(), {"reference": f"{repository}:prod", "verify": "whole"}
    first = controller.create(name, parameters)
    digest = first.volume_context["reference"].partition("@")[2]
    assert first.volume_context == {"reference": f"{repository}:prod@{digest}", "verify": "whole"}
    assert first.capacity_bytes == 1 << 30
    fake_registry.add_model("team/model", "prod", {"config.json": b"other"})
    assert controller.create(name, parameters) == first
    other = controller.create(name_of(), parameters)
    assert other.volume_id != first.volume_id
    assert other.volume_context["reference"] != first.volume_context["reference"]


def test_the_answer_survives_a_restart_and_a_registry_that_is_gone(tmp_path: Path) -> None:
    with ControllerProcess(tmp_path, f"--volume-dir={tmp_path}/volumes") as controller:
        with FakeRegistry() as registry:
            registry.add_model("team/model", "prod", FILES)
            parameters = {"reference": f"{registry.host}/team/model:prod"}
            first = controller.create("pvc-restart", parameters)
        controller.stop()
        controller.start()
        assert controller.create("pvc-restart", parameters) == first


def test_capacity_is_what_was_asked_or_the_model_if_that_is_larger(
    controller: ControllerProcess, repository: str
) -> None:
    parameters = {"reference": f"{repository}:prod"}
    assert controller.create(name_of(), parameters, required_bytes=1).capacity_bytes == SIZE
    assert controller.create(name_of(), parameters, required_bytes=SIZE + 1).capacity_bytes == SIZE + 1
    error = refusal(lambda: controller.create(name_of(), parameters, required_bytes=1, limit_bytes=SIZE - 1))
    assert error.code() is grpc.StatusCode.OUT_OF_RANGE
    assert str(SIZE) in error.details()


@pytest.mark.parametrize(
    "change",
    [
        lambda r: r.parameters.update({"verify": "whole"}),
        lambda r: setattr(r.capacity_range, "required_bytes", 2 << 30),
        lambda r: r.volume_capabilities.append(capability("SINGLE_NODE_WRITER")),
    ],
)
def test_the_same_name_with_other_arguments_conflicts(
    controller: ControllerProcess, repository: str, change: Callable[[csi_pb2.CreateVolumeRequest], object]
) -> None:
    request = create_request(name_of(), {"reference": f"{repository}:prod"})
    controller.controller.CreateVolume(request, timeout=15)
    change(request)
    error = refusal(lambda: controller.controller.CreateVolume(request, timeout=15))
    assert error.code() is grpc.StatusCode.ALREADY_EXISTS


def _give_a_source(request: csi_pb2.CreateVolumeRequest) -> None:
    request.volume_content_source.snapshot.snapshot_id = "snap"


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda r: r.ClearField("name"), "name"),
        (lambda r: setattr(r, "name", "n" * 129), "128"),
        (lambda r: setattr(r, "name", "a\nb"), "control"),
        (lambda r: r.ClearField("volume_capabilities"), "volume_capabilities"),
        (lambda r: r.volume_capabilities[0].block.SetInParent(), "Block"),
        (lambda r: r.volume_capabilities[0].ClearField("access_mode"), "access_mode"),
        (lambda r: r.volume_capabilities[0].mount.mount_flags.append("exec"), "mountOptions"),
        (_give_a_source, "dataSource"),
        (lambda r: r.mutable_parameters.update({"tier": "gold"}), "tier"),
        (lambda r: r.parameters.update({"colour": "red"}), "colour"),
        (lambda r: r.parameters.update({"verify": "never"}), "verify"),
        (lambda r: r.parameters.update({"reference": "oci-layout:/srv/model"}), "one node"),
        (lambda r: r.parameters.update({"reference": "model:1"}), "registry host"),
        (lambda r: r.parameters.update({"allowedRepositories": "*"}), "the star"),
        (lambda r: r.parameters.update({"allowedRepositories": " ,"}), "lists nothing"),
        (lambda r: r.parameters.pop("reference"), "reference"),
        (lambda r: setattr(r.capacity_range, "limit_bytes", 5), "limit_bytes"),
        (lambda r: r.secrets.update({"token": "t"}), "username and password"),
    ],
)
def test_a_wrong_request_names_its_field(
    files_controller: ControllerProcess,
    repository: str,
    change: Callable[[csi_pb2.CreateVolumeRequest], object],
    word: str,
) -> None:
    request = create_request(name_of(), {"reference": f"{repository}:prod"})
    change(request)
    error = refusal(lambda: files_controller.controller.CreateVolume(request, timeout=15))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert word in error.details()


@pytest.mark.parametrize("name", ["m" * 128, "модель-日本語", "with / and .. and spaces"])
def test_names_may_be_any_text_of_128_bytes(controller: ControllerProcess, repository: str, name: str) -> None:
    volume = controller.create(name, {"reference": f"{repository}:prod"})
    assert volume.volume_id.isascii()
    assert len(volume.volume_id) <= 63
    controller.delete(volume.volume_id)


def test_what_the_registry_says_becomes_the_code(
    files_controller: ControllerProcess, fake_registry: FakeRegistry, repository: str
) -> None:
    missing = refusal(lambda: files_controller.create(name_of(), {"reference": f"{repository}:absent"}))
    assert missing.code() is grpc.StatusCode.NOT_FOUND
    fake_registry.faults.append(Fault(match="/manifests/", status=503))
    down = refusal(lambda: files_controller.create(name_of(), {"reference": f"{repository}:prod"}))
    assert down.code() is grpc.StatusCode.UNAVAILABLE
    with FakeRegistry("user", "secret-of-the-class") as private:
        private.add_model("team/model", "prod", FILES)
        parameters = {"reference": f"{private.host}/team/model:prod"}
        refused = refusal(lambda: files_controller.create(name_of(), parameters))
        assert refused.code() is grpc.StatusCode.PERMISSION_DENIED
        secrets = {"username": "user", "password": "secret-of-the-class"}
        assert files_controller.create(name_of(), parameters, secrets=secrets).volume_context
    assert "secret-of-the-class" not in files_controller.log_path.read_text()


def test_deleting_is_idempotent_and_the_name_is_free_again(
    controller: ControllerProcess, fake_registry: FakeRegistry, repository: str
) -> None:
    name, parameters = name_of(), {"reference": f"{repository}:prod"}
    first = controller.create(name, parameters)
    fake_registry.add_model("team/model", "prod", {"config.json": b"newer"})
    controller.delete(first.volume_id)
    controller.delete(first.volume_id)
    controller.delete("never/heard of")
    again = controller.create(name, parameters)
    assert again.volume_id == first.volume_id
    assert again.volume_context != first.volume_context
    error = refusal(lambda: controller.controller.DeleteVolume(csi_pb2.DeleteVolumeRequest(), timeout=5))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_capabilities_are_confirmed_or_the_message_says_why_not(controller: ControllerProcess, repository: str) -> None:
    volume = controller.create(name_of(), {"reference": f"{repository}:prod"})
    request = csi_pb2.ValidateVolumeCapabilitiesRequest(
        volume_id=volume.volume_id, volume_capabilities=[capability()], volume_context=volume.volume_context
    )
    validate = controller.controller.ValidateVolumeCapabilities
    assert validate(request, timeout=5).confirmed.volume_capabilities == request.volume_capabilities
    request.volume_capabilities[0].block.SetInParent()
    reply = validate(request, timeout=5)
    assert not reply.HasField("confirmed")
    assert "Block" in reply.message
    request.volume_id = "mv-unknown"
    assert refusal(lambda: validate(request, timeout=5)).code() is grpc.StatusCode.NOT_FOUND


def test_a_claim_names_its_model_within_what_the_class_allows(
    kube_controller: ControllerProcess, kube: FakeKubeApi, repository: str
) -> None:
    allowed = {"allowedRepositories": f"{repository.rpartition('/')[0]}/*"}
    for key in ("csi.modelmount.dev/reference", "model.csi.modelpack.org/reference", "modelRef", "image"):
        uid = str(uuid.uuid4())
        kube.add_claim("apps", f"claim-{uid}", uid, {key: f"oci://{repository}:prod"})
        volume = kube_controller.create(name_of(uid), allowed, claim=("apps", f"claim-{uid}"))
        assert volume.volume_context["reference"].startswith(f"{repository}:prod@sha256:")
        (stored,) = [one for one in kube.below("/modelvolumes/") if one["metadata"]["name"] == volume.volume_id]
        assert stored["spec"]["source"] == f"PersistentVolumeClaim apps/claim-{uid}"
        assert stored["spec"]["sizeBytes"] == SIZE
        kube.add_claim("apps", f"claim-{uid}", uid, {key: f"{repository}:other"})
        assert kube_controller.create(name_of(uid), allowed, claim=("apps", f"claim-{uid}")) == volume


def test_a_claim_gets_nothing_it_may_not_have(
    kube_controller: ControllerProcess, kube: FakeKubeApi, repository: str
) -> None:
    uid = str(uuid.uuid4())
    kube.add_claim("apps", "greedy", uid, {"csi.modelmount.dev/reference": f"{repository}:prod"})
    allowed = {"allowedRepositories": f"{repository}"}
    create = kube_controller.create
    claim = ("apps", "greedy")

    outside = refusal(lambda: create(name_of(uid), {"allowedRepositories": f"{repository}l, x.io/*"}, claim=claim))
    assert outside.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert "allowedRepositories" in outside.details()

    nothing = refusal(lambda: create(name_of(uid), {}, claim=claim))
    assert (nothing.code(), "allowedRepositories is missing" in nothing.details()) == (
        grpc.StatusCode.INVALID_ARGUMENT,
        True,
    )

    other_uid = refusal(lambda: create(name_of(), allowed, claim=claim))
    assert other_uid.code() is grpc.StatusCode.NOT_FOUND
    assert uid in other_uid.details()

    prefix = refusal(lambda: create(f"model-{uid}", allowed, claim=claim))
    assert prefix.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "pvc-<uid" in prefix.details()

    unknown = refusal(lambda: create(name_of(uid), allowed))
    assert "--extra-create-metadata" in unknown.details()

    assert create(name_of(uid), allowed, claim=claim).volume_context


def test_a_claim_without_the_annotation_is_told_which(kube_controller: ControllerProcess, kube: FakeKubeApi) -> None:
    uid = str(uuid.uuid4())
    kube.add_claim("apps", "silent", uid, {})
    error = refusal(
        lambda: kube_controller.create(name_of(uid), {"allowedRepositories": "r.io/*"}, claim=("apps", "silent"))
    )
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "csi.modelmount.dev/reference" in error.details()


def test_an_api_that_fails_is_asked_again_and_never_taken_for_an_answer(
    kube_controller: ControllerProcess, kube: FakeKubeApi, repository: str
) -> None:
    parameters = {"reference": f"{repository}:prod"}
    name = name_of()
    for status in (403, 500):
        kube.refusals.append(Refusal("/modelvolumes", status))
        error = refusal(lambda: kube_controller.create(name, parameters))
        kube.refusals.clear()
        assert error.code() is grpc.StatusCode.UNAVAILABLE
        assert "ModelVolume" in error.details()
    kube.refusals.append(Refusal("/modelvolumes", 404))
    error = refusal(lambda: kube_controller.create(name, parameters))
    kube.refusals.clear()
    assert "modelvolumes.yaml" in error.details()
    assert kube_controller.create(name, parameters).volume_id


def test_outside_a_cluster_it_says_what_to_name() -> None:
    import subprocess

    command = [*COMMAND, "controller", "--endpoint=unix:///tmp/never.sock"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert done.returncode == 1
    assert "--kubeconfig" in done.stderr


def test_an_index_is_pinned_as_it_is_and_a_variant_says_how_large_the_model_is(
    controller: ControllerProcess, fake_registry: FakeRegistry
) -> None:
    found = artifacts.quantizations()
    children = {}
    for child in found.children:
        for digest, data in child.blobs.items():
            fake_registry.blobs[digest] = data
        children[child.digest] = fake_registry.add_manifest("team/index", child.digest, child.data, child.media_type)
    fake_registry.add_manifest("team/index", "prod", found.data, found.media_type)
    parameters = {"reference": f"{fake_registry.host}/team/index:prod", "variant": "quantization=q8"}
    volume = controller.create(name_of(), parameters, required_bytes=1)
    assert volume.volume_context["reference"] == f"{fake_registry.host}/team/index:prod@{found.digest}"
    assert volume.volume_context["variant"] == "quantization=q8"
    assert volume.capacity_bytes == len(artifacts.body("q8.gguf"))
    error = refusal(lambda: controller.create(name_of(), {"reference": parameters["reference"]}))
    assert error.code() == grpc.StatusCode.FAILED_PRECONDITION
    assert "org.example.quantization=q4" in error.details()


def test_mirrors_and_logins_of_its_own(tmp_path: Path) -> None:
    """The registry wants a login that no StorageClass names; a mirror is asked first, and does not have it."""
    with FakeRegistry("ann", "pa55word") as registry, FakeRegistry() as mirror:
        registry.add_model("team/model", "prod", FILES)
        directory = tmp_path / "certs.d" / (registry.host.replace(":", "_") + "_")
        directory.mkdir(parents=True)
        (directory / "hosts.toml").write_text(f'[host."http://{mirror.host}"]\n')
        auths = {"auths": {registry.host: {"username": "ann", "password": "pa55word"}}}
        (tmp_path / "config.json").write_text(json.dumps(auths))
        parameters = {"reference": f"{registry.host}/team/model:prod"}
        flags = [f"--volume-dir={tmp_path}/volumes", f"--registry-config-dir={tmp_path}/certs.d"]
        with ControllerProcess(tmp_path / "without", *flags) as controller:
            assert refusal(lambda: controller.create("pvc-x", parameters)).code() == grpc.StatusCode.PERMISSION_DENIED
        with ControllerProcess(tmp_path / "with", *flags, f"--registry-config={tmp_path}/config.json") as controller:
            assert controller.create("pvc-x", parameters, required_bytes=1).capacity_bytes == SIZE
        assert mirror.requests("/manifests/")
        assert {seen.authorization for seen in mirror.seen} == {None}
