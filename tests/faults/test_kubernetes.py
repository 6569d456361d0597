"""The manifests for Kubernetes: rendered, held against Kubernetes' schemas, and against what serve and the image do."""

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import kubernetes_validate
import pytest
import yaml
from promql import selectors
from served import Serve
from throwaway_ca import ThrowawayCa

from hstu_trt.serving import probe, serve, server
from hstu_trt.serving.supervision import drain
from hstu_trt.serving.supervision.processes import processes_of

ROOT = Path(__file__).resolve().parents[2]
OPS = ROOT / "ops/kubernetes"
OVERLAYS = ("cpu", "gpu")
SCHEMAS = "1.32"
UNPACKED = ROOT / "build/kustomize/usr/bin/kustomize"


def renderer():
    """The command that renders a folder."""
    if found := shutil.which("kustomize") or (UNPACKED.is_file() and str(UNPACKED)):
        return [found, "build"]
    if found := shutil.which("kubectl"):
        return [found, "kustomize"]
    return None


@pytest.fixture(scope="module", params=OVERLAYS)
def manifests(request):
    """{kind: document} of an overlay."""
    command = renderer()
    if command is None:
        assert os.environ.get("CI") != "true", "no kustomize: `make test` brings it, and in CI this test must run"
        pytest.skip("no kustomize: make kustomize, or put one on PATH")
    rendered = subprocess.run(
        [*command, str(OPS / "overlays" / request.param)], capture_output=True, text=True, timeout=60, check=True
    )
    assert "deprecated" not in rendered.stderr
    documents = list(yaml.safe_load_all(rendered.stdout))
    assert len({document["kind"] for document in documents}) == len(documents)
    return {document["kind"]: document for document in documents} | {"overlay": request.param}


@pytest.fixture
def pod(manifests):
    return manifests["Deployment"]["spec"]["template"]["spec"]


@pytest.fixture
def container(pod):
    (container,) = pod["containers"]
    return container


def test_kubernetes_takes_them(manifests):
    kinds = {"Namespace", "ServiceAccount", "Deployment", "Service", "PodDisruptionBudget", "HorizontalPodAutoscaler"}
    assert set(manifests) == kinds | {"NetworkPolicy", "overlay"}
    for kind in kinds | {"NetworkPolicy"}:
        kubernetes_validate.validate(manifests[kind], SCHEMAS, strict=True)


def test_the_check_finds_a_misspelt_field(manifests):
    document = yaml.safe_load(yaml.safe_dump(manifests["Deployment"]))
    document["spec"]["template"]["spec"]["containers"][0]["readinesProbe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError, match="readinesProbe"):
        kubernetes_validate.validate(document, SCHEMAS, strict=True)


def options(words):
    return dict(word.split("=", 1) for word in words if word.startswith("--"))


def test_serve_takes_the_options(container):
    assert container["command"] == ["hstu-trt", "serve"]
    parsed = serve._parser().parse_args(container["args"])
    assert (parsed.log_format, parsed.address) == ("json", "0.0.0.0")
    assert parsed.tls_cert and parsed.tls_key and parsed.tls_client_ca and parsed.restart


def test_probes_ask_as_serve_listens(container):
    served = options(container["args"])
    for name in ("startupProbe", "readinessProbe", "livenessProbe"):
        command = container[name]["exec"]["command"]
        assert command[:3] == ["python", "-m", probe.__name__]
        asked = options(command)
        assert asked["--url"] == f"127.0.0.1:{served['--grpc-port']}"
        assert {key: value for key, value in asked.items() if "tls" in key} == {
            key: value for key, value in served.items() if "tls" in key
        }
        assert container[name]["timeoutSeconds"] > 2 * float(asked["--deadline"])
    start = container["startupProbe"]
    assert start["periodSeconds"] * start["failureThreshold"] >= float(served["--ready-timeout"])


def test_ports_agree(manifests, container):
    served = options(container["args"])
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports == {"grpc": int(served["--grpc-port"]), "metrics": int(served["--metrics-port"])}
    assert ports["grpc"] == server.DEFAULT_GRPC_PORT
    assert [port["targetPort"] for port in manifests["Service"]["spec"]["ports"]] == ["grpc"]
    allowed = [port["port"] for rule in manifests["NetworkPolicy"]["spec"]["ingress"] for port in rule["ports"]]
    assert sorted(allowed) == sorted(ports)
    annotations = manifests["Deployment"]["spec"]["template"]["metadata"]["annotations"]
    assert annotations["prometheus.io/port"] == str(ports["metrics"])


def test_the_image_agrees(pod, container):
    dockerfile = (ROOT / "docker/Dockerfile").read_text()
    version = re.search(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(), flags=re.MULTILINE)[1]
    assert container["image"].endswith(f"/hstu-trt:{version}")
    user, group = re.findall(r"^USER (\d+):(\d+)", dockerfile, flags=re.MULTILINE)[-1]
    context = pod["securityContext"]
    assert (context["runAsUser"], context["runAsGroup"]) == (int(user), int(group))
    assert re.search(rf"^EXPOSE {options(container['args'])['--grpc-port']}$", dockerfile, flags=re.MULTILINE)
    started = re.search(r"^CMD \[(.*)\]", dockerfile, flags=re.MULTILINE)[1].replace('"', "").split(", ")
    assert started[:2] == container["command"]


def test_files_are_where_they_are_mounted(pod, container):
    mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert sorted(mount["name"] for mount in mounts.values()) == sorted(volumes)
    for option, value in options(container["args"]).items():
        if value.startswith("/"):
            (mount,) = [mount for path, mount in mounts.items() if Path(value).is_relative_to(path)]
            assert mount.get("readOnly", False) == (option != "--run"), option
    assert "emptyDir" in volumes[mounts["/run/hstu-trt"]["name"]]
    assert volumes[mounts["/dev/shm"]["name"]]["emptyDir"]["medium"] == "Memory"
    assert volumes[mounts["/tls"]["name"]]["secret"]["defaultMode"] & 0o007 == 0  # what serve checks of a key


def test_a_pod_may_do_little(manifests, pod, container):
    assert pod["securityContext"]["runAsNonRoot"] and pod["automountServiceAccountToken"] is False
    assert manifests["ServiceAccount"]["automountServiceAccountToken"] is False
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert manifests["NetworkPolicy"]["spec"]["policyTypes"] == ["Ingress", "Egress"]
    assert not manifests["NetworkPolicy"]["spec"].get("egress")


def test_a_pod_has_time_to_drain(pod, container):
    command, seconds = container["lifecycle"]["preStop"]["exec"]["command"]
    assert command == "sleep"
    assert pod["terminationGracePeriodSeconds"] >= int(seconds) + drain.GRACE_S + server.EXIT_TIMEOUT_S + 10
    readiness = container["readinessProbe"]
    assert int(seconds) >= readiness["periodSeconds"] * readiness["failureThreshold"]


def test_selectors_meet_the_pods(manifests):
    labels = manifests["Deployment"]["spec"]["template"]["metadata"]["labels"].items()
    chosen = [
        manifests["Deployment"]["spec"]["selector"]["matchLabels"],
        manifests["Service"]["spec"]["selector"],
        manifests["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"],
        manifests["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"],
    ]
    assert all(selector.items() <= labels for selector in chosen)
    scaled = manifests["HorizontalPodAutoscaler"]["spec"]["scaleTargetRef"]
    assert scaled["name"] == manifests["Deployment"]["metadata"]["name"]


def test_one_gpu_per_pod(manifests, container):
    gpus = container["resources"]["limits"].get("nvidia.com/gpu")
    assert gpus == ("1" if manifests["overlay"] == "gpu" else None)


def test_the_autoscaler_s_metric_is_made_of_what_the_dashboard_asks_for(manifests):
    (rule,) = yaml.safe_load((OPS / "prometheus-adapter.yaml").read_text())["rules"]["custom"]
    (metric,) = manifests["HorizontalPodAutoscaler"]["spec"]["metrics"]
    assert metric["pods"]["metric"]["name"] == rule["name"]["as"]
    query = rule["metricsQuery"].replace("<<.GroupBy>>", "pod").replace("<<.LabelMatchers>>", 'pod="x"')
    asked = {name for text in (query, rule["seriesQuery"]) for name, _ in selectors(text)}
    assert asked == {"hstu_trt_waited_seconds_total", "nv_inference_queue_duration_us", "hstu_trt_begun_total"}
    # The dashboard's test holds the same names against a running server.
    assert all(name in (ROOT / "ops/grafana/hstu-trt.json").read_text() for name in asked)


PATIENCE_S = 25  # for a right answer of a busy machine; what is not there is told at once


def ask(url, *given):
    command = [sys.executable, "-m", "hstu_trt.serving.probe", "--url", url, *map(str, given)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.triton
@pytest.mark.faults
def test_the_probe_tells_a_server_that_answers(deployment, tmp_path):
    ca = ThrowawayCa(tmp_path)
    cert, key = ca.issue("server")
    files = ["--tls-cert", cert, "--tls-key", key, "--tls-client-ca", ca.path]
    running = Serve(deployment, *map(str, files))
    try:
        healthy, without_tls = ask(running.url, *files, "--deadline", PATIENCE_S), ask(running.url)
        assert healthy.returncode == 0, healthy
        assert healthy.stdout == "ranking: right answer; ranking_fused: right answer\n"
        assert without_tls.returncode == 1 and "UNAVAILABLE" in without_tls.stderr
    finally:
        assert running.stop() == 0
    gone = ask(running.url, *files)
    assert gone.returncode == 1 and "UNAVAILABLE" in gone.stderr


@pytest.mark.triton
@pytest.mark.faults
def test_the_probe_tells_a_model_that_died(deployment):
    running = Serve(deployment, "--no-restart")
    try:
        (model,) = [process for process in processes_of(running.facts["pid"]) if process.name == "ranking_fused"]
        os.kill(model.pid, signal.SIGKILL)
        sick = ask(running.url, "--deadline", PATIENCE_S)
        assert sick.returncode == 1 and "ranking_fused" in sick.stderr, sick
    finally:
        running.stop(signal.SIGKILL)
