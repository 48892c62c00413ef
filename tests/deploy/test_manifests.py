"""Manifests are what render.py gives, are accepted by the published schemas, and agree with each other."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

pytest.importorskip("ray")
pytest.importorskip("jsonschema")
pytest.importorskip("kubernetes_validate")
import jsonschema
import kubernetes_validate

sys.path.append(str(Path(__file__).resolve().parents[2] / "deploy"))
import render
from settings import DeployConfig

from gsl_dist.cluster.job import STAGES
from gsl_dist.cluster.serve import ServeConfig, build_app
from gsl_dist.config import check_config, load_config
from gsl_dist.errors import ConfigError

HERE = Path(__file__).resolve().parent
DEPLOY = HERE.parents[1] / "deploy"
KUBERNETES = "1.33"
CONFIG = load_config(DeployConfig, DEPLOY / "settings.yaml")
FILES = sorted(DEPLOY.rglob("kuberay/**/*.yaml"))
SCHEMAS = {path.stem.split(".")[0]: json.loads(path.read_text()) for path in HERE.glob("schemas/*.json")}
README = (DEPLOY / "README.md").read_text()


def read_all(path):
    return [document for document in yaml.safe_load_all(path.read_text()) if document]


MANIFESTS = [manifest for path in FILES for manifest in read_all(path)]


def find(kind, name=None):
    return next(m for m in MANIFESTS if m["kind"] == kind and name in (None, m["metadata"]["name"]))


def find_clusters():
    """Every description of a Ray cluster, whoever starts it."""
    for manifest in MANIFESTS:
        spec = manifest.get("spec", {})
        if manifest["kind"] in SCHEMAS:
            yield manifest["metadata"]["name"], spec.get("rayClusterSpec") or spec.get("rayClusterConfig") or spec


def find_pods():
    for _, cluster in find_clusters():
        yield cluster["headGroupSpec"]["template"]
        yield from (group["template"] for group in cluster["workerGroupSpecs"])
    yield from (m["spec"]["submitterPodTemplate"] for m in MANIFESTS if m["kind"] == "RayJob")
    yield find("StatefulSet")["spec"]["template"]


def walk(tree):
    yield tree
    for inner in tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ():
        yield from walk(inner)


@pytest.mark.parametrize("path", sorted(render.render(CONFIG)))
def test_a_file_is_what_render_gives(path):
    assert (DEPLOY / path).read_text() == render.render(CONFIG)[path], "run python deploy/render.py"


def test_no_manifest_is_left_that_nobody_renders():
    assert {str(path.relative_to(DEPLOY)) for path in FILES} <= set(render.render(CONFIG))


@pytest.mark.parametrize("manifest", MANIFESTS, ids=lambda m: f"{m['kind']}-{m['metadata']['name']}")
def test_a_manifest_is_accepted_by_the_schema_of_its_kind(manifest):
    if manifest["kind"] in SCHEMAS:
        jsonschema.validate(manifest, SCHEMAS[manifest["kind"]])
    else:
        kubernetes_validate.validate(manifest, KUBERNETES, strict=True)


@pytest.mark.parametrize("number", range(len(list(find_pods()))))
def test_the_pods_of_a_cluster_are_accepted_as_pods(number):
    template = list(find_pods())[number]
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, **template}
    kubernetes_validate.validate(pod, KUBERNETES, strict=True)


@pytest.mark.parametrize("change", [{"rayVersoin": "1"}, {"workerGroupSpecs": [{"groupName": "x"}]}, {"suspend": "no"}])
def test_schemas_refuse_what_is_misspelt_missing_or_of_another_type(change):
    cluster = find("RayCluster")
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**cluster, "spec": cluster["spec"] | change}, SCHEMAS["RayCluster"])


def test_every_stage_has_a_job_that_runs_it_from_the_configs_of_a_map():
    jobs = {m["metadata"]["name"]: m["spec"] for m in MANIFESTS if m["kind"] == "RayJob"}
    assert set(jobs) == {f"gsl-{stage}" for stage in (*STAGES, "pipeline")} - {"gsl-serve"}
    for name, spec in jobs.items():
        command, module, folder, *rest = spec["entrypoint"].split()[1:]
        assert (command, module) == ("-m", "gsl_dist.cluster.pipeline")
        assert rest == ([] if name == "gsl-pipeline" else [f"stages=[{name.removeprefix('gsl-')}]"])
        head = spec["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
        assert {"name": "configs", "mountPath": folder} in head["containers"][0]["volumeMounts"]
        assert {"name": "configs", "configMap": {"name": "gsl-configs"}} in head["volumes"]


def test_the_service_is_started_by_settings_that_the_serve_stage_accepts():
    spec = find("RayService")["spec"]
    told = yaml.safe_load(spec["serveConfigV2"])
    [application] = told["applications"]
    config = check_config(ServeConfig, application["args"])
    assert application["import_path"] == f"{build_app.__module__}:{build_app.__qualname__}"
    assert config.serve_port == told["http_options"]["port"] == CONFIG.ports.serve
    assert (config.port, config.grpc_port, config.host) == (CONFIG.ports.direct, CONFIG.ports.grpc, "0.0.0.0")
    # What one does without naming ports is what one does on a cluster.
    usual = check_config(ServeConfig, {"index": "index"})
    assert (usual.port, usual.serve_port) == (config.port, config.serve_port)
    [group] = spec["rayClusterConfig"]["workerGroupSpecs"]
    container = group["template"]["spec"]["containers"][0]
    mounts = {mount["mountPath"] for mount in container["volumeMounts"]}
    assert str(Path(config.tokens).parent) in mounts
    cores = group["minReplicas"] * int(container["resources"]["limits"]["cpu"])
    assert cores >= config.replicas * config.copies * config.resources.cpus


def test_ports_of_a_pod_have_a_number_each_and_the_same_everywhere():
    numbers = {}
    for _, cluster in find_clusters():
        groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
        for group in groups:
            ports = {p["name"]: p["containerPort"] for p in group["template"]["spec"]["containers"][0]["ports"]}
            assert len(set(ports.values())) == len(ports)
            assert group["rayStartParams"]["metrics-export-port"] == str(ports["metrics"])
            for name, number in ports.items():
                assert numbers.setdefault(name, number) == number
    assert {CONFIG.ports.agent, CONFIG.ports.redis - CONFIG.ports.gcs}.isdisjoint(numbers.values())
    used = {
        port["port"]
        for m in MANIFESTS
        if m["kind"] == "NetworkPolicy"
        for rule in m["spec"]["ingress"]
        for port in rule.get("ports", [])
    }
    assert used <= {*numbers.values(), CONFIG.ports.agent, CONFIG.ports.redis}
    redis = find("Service", "gsl-redis")["spec"]["ports"][0]["port"]
    addresses = [
        c["gcsFaultToleranceOptions"]["redisAddress"] for _, c in find_clusters() if "gcsFaultToleranceOptions" in c
    ]
    assert addresses == [f"redis://gsl-redis:{redis}"] * 2


def test_names_that_manifests_refer_to_are_made_or_told_of_in_the_guide():
    made = {(m["kind"], m["metadata"]["name"]) for m in MANIFESTS}
    for tree in walk([MANIFESTS]):
        if not isinstance(tree, dict):
            continue
        if "claimName" in tree:
            assert ("PersistentVolumeClaim", tree["claimName"]) in made
        for key in ("secretKeyRef", "secret", "secretRef", "configMap"):
            name = tree.get(key, {}).get("name") or tree.get(key, {}).get("secretName")
            assert name is None or f" {name} " in README, f"{name} is nowhere made"
    assert {m["metadata"].get("namespace") for m in MANIFESTS} == {None, CONFIG.namespace}


def test_mounts_are_of_volumes_that_are_there():
    claimed = {claim["metadata"]["name"] for claim in find("StatefulSet")["spec"]["volumeClaimTemplates"]}
    for template in find_pods():
        names = {volume["name"] for volume in template["spec"].get("volumes", [])}
        [container] = template["spec"]["containers"]
        known = claimed if container["name"] == "redis" else names
        assert {mount["name"] for mount in container.get("volumeMounts", [])} <= known


def test_pods_have_no_more_rights_than_they_need():
    for template in find_pods():
        spec = template["spec"]
        assert spec["securityContext"]["runAsNonRoot"] and spec["securityContext"]["runAsUser"] > 0
        for container in spec["containers"]:
            own = container["securityContext"]
            assert own == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
            assert container["resources"]["limits"]["memory"]


def test_policies_and_budgets_select_pods_that_there_are():
    labels = {("ray.io/is-ray-node", "yes"), ("app.kubernetes.io/created-by", "kuberay-operator")}
    labels |= {("app.kubernetes.io/name", "gsl-redis")}
    labels |= {("ray.io/group", g["groupName"]) for _, c in find_clusters() for g in c["workerGroupSpecs"]}
    for manifest in MANIFESTS:
        if manifest["kind"] in ("NetworkPolicy", "PodDisruptionBudget"):
            for tree in walk(manifest["spec"]):
                if isinstance(tree, dict) and ("podSelector" in tree or "selector" in tree):
                    chosen = (tree.get("podSelector") or tree.get("selector") or {}).get("matchLabels", {})
                    assert set(chosen.items()) <= labels


def test_a_store_in_place_of_a_volume_needs_none():
    settings = yaml.safe_load((DEPLOY / "settings.yaml").read_text())
    files = render.render(check_config(DeployConfig, settings | {"root": "s3://bucket/gsl"}))
    text = "".join(files.values())
    assert "kuberay/10-volume.yaml" not in files and "gsl-data" not in text and "value: s3://bucket/gsl" in text
    spec = yaml.safe_load(files["kuberay/60-service.yaml"])["spec"]
    served = yaml.safe_load(spec["serveConfigV2"])["applications"][0]["args"]["cache"]
    [group] = spec["rayClusterConfig"]["workerGroupSpecs"]
    pod = group["template"]["spec"]
    assert served["folder"] in [mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]]
    [room] = [volume["emptyDir"]["sizeLimit"] for volume in pod["volumes"] if volume["name"] == "cache"]
    assert served["limit_gb"] < int(room.removesuffix("Gi"))


@pytest.mark.parametrize(
    "change, words",
    [
        ({"serve": {"index": "i", "port": 1}}, "port follow from the deployment"),
        ({"serve": {"indx": "i"}}, "did you mean index"),
        ({"root": "data"}, "root"),
        ({"namespace": "A b"}, "namespace"),
        ({"volume": {"size": "5 TB"}}, "volume.size"),
    ],
)
def test_settings_that_would_not_run_are_refused(change, words):
    settings = yaml.safe_load((DEPLOY / "settings.yaml").read_text())
    with pytest.raises(ConfigError, match=words):
        check_config(DeployConfig, settings | change)


def test_figures_of_alerts_are_those_that_a_service_counts():
    meters = pytest.importorskip("gsl_dist.service.meters")
    told = {name for family in meters.Meters().registry.collect() for name in (family.name, f"{family.name}_total")}
    told |= {f"{name}{end}" for name in told for end in ("_bucket", "_count", "_sum")}
    [group] = yaml.safe_load((DEPLOY / "prometheus" / "alerts.yaml").read_text())["groups"]
    asked = {name for rule in group["rules"] for name in re.findall(r"\bgsl_\w+", rule["expr"])}
    assert len(group["rules"]) >= 8 and asked <= told and "gsl_partial_answers_total" in asked
    for rule in group["rules"]:
        assert re.fullmatch(r"\d+[mh]", rule["for"]) and rule["annotations"]["summary"] and rule["alert"][:3] == "Gsl"


def test_prometheus_asks_at_the_ports_where_figures_are():
    for name in ("kubernetes", "machines"):
        told = yaml.safe_load((DEPLOY / "prometheus" / f"{name}.yaml").read_text())
        service, nodes = told["scrape_configs"]
        assert service["static_configs"][0]["targets"][0].endswith(f":{CONFIG.ports.serve}")
        assert told["rule_files"] == ["alerts.yaml"] and {service["job_name"], nodes["job_name"]} == {"gsl", "gsl-ray"}
        for target in nodes.get("static_configs", [{"targets": []}])[0]["targets"]:
            assert target.endswith(f":{CONFIG.ports.metrics}")


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
@pytest.mark.parametrize("what, name", [("config", "kubernetes"), ("config", "machines"), ("rules", "alerts")])
def test_prometheus_accepts_its_files(what, name):
    subprocess.run(
        ["promtool", "check", what, *["--syntax-only"] * (what == "config"), f"{name}.yaml"],
        cwd=DEPLOY / "prometheus",
        check=True,
    )
