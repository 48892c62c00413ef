"""KubeRay's manifests: a cluster that takes jobs, a job for each stage, and a service; and what they stand on.

Ray's head keeps what it knows in Redis, so that a new head goes on where one was lost. Workers come and go by the
autoscaler. Pods run without privileges, and only those who have to can reach them.
"""

from __future__ import annotations

from typing import Any

import yaml
from settings import CACHE, CONFIGS, NAME, TOKENS, USER, DeployConfig, Node

from gsl_dist.cluster.job import STAGES
from gsl_dist.config import ROOT

STORE = f"{NAME}-store"
REDIS = f"{NAME}-redis"
SECRETS = {REDIS: "password", f"{NAME}-tokens": "tokens.json"}
"""Secrets that must be there before, and the key in each."""
ON_GPU = ("train", "encode")

Manifest = dict[str, Any]


def render_manifests(config: DeployConfig) -> dict[str, list[Manifest]]:
    """Give every manifest by its path; files with a number are applied in its order."""
    files = {
        "kuberay/00-namespace.yaml": [_make("v1", "Namespace", config, name=config.namespace)],
        "kuberay/20-redis.yaml": _render_redis(config),
        "kuberay/30-network.yaml": _render_network(config),
        "kuberay/40-budgets.yaml": _render_budgets(config),
        "kuberay/50-cluster.yaml": [_render_cluster(config)],
        "kuberay/60-service.yaml": [_render_service(config)],
    }
    if config.is_shared_folder:
        files["kuberay/10-volume.yaml"] = [_render_volume(config)]
    stages = [stage for stage in STAGES if stage != "serve"]
    files |= {f"kuberay/jobs/{stage}.yaml": [_render_job(config, stage)] for stage in (*stages, "pipeline")}
    return dict(sorted(files.items()))


def _make(api: str, kind: str, config: DeployConfig, *, name: str = NAME, **rest: Any) -> Manifest:
    metadata: Manifest = {"name": name, "labels": {"app.kubernetes.io/part-of": NAME}}
    if kind == "Namespace":
        metadata["labels"]["pod-security.kubernetes.io/enforce"] = "baseline"
        metadata["labels"]["pod-security.kubernetes.io/warn"] = "restricted"
    else:
        metadata["namespace"] = config.namespace
    return {"apiVersion": api, "kind": kind, "metadata": metadata, **rest}


def _render_volume(config: DeployConfig) -> Manifest:
    spec = {
        "accessModes": ["ReadWriteMany"],
        "resources": {"requests": {"storage": config.volume.size}},
    }
    if config.volume.storage_class:
        spec["storageClassName"] = config.volume.storage_class
    return _make("v1", "PersistentVolumeClaim", config, name=f"{NAME}-data", spec=spec)


def _render_redis(config: DeployConfig) -> list[Manifest]:
    port, labels = config.ports.redis, {"app.kubernetes.io/name": REDIS}
    password = {"valueFrom": {"secretKeyRef": {"name": REDIS, "key": SECRETS[REDIS]}}}
    probe = {
        "exec": {"command": ["sh", "-c", "redis-cli ping | grep -q PONG"]},
        "periodSeconds": 5,
        "timeoutSeconds": 3,
    }
    container = {
        "name": "redis",
        "image": config.redis_image,
        "command": [
            "sh",
            "-c",
            f'exec redis-server --port {port} --dir /data --appendonly yes --requirepass "$PASSWORD"',
        ],
        "env": [{"name": "PASSWORD", **password}, {"name": "REDISCLI_AUTH", **password}],
        "ports": [{"name": "redis", "containerPort": port}],
        "readinessProbe": probe,
        "livenessProbe": {**probe, "failureThreshold": 6},
        "resources": {"requests": {"cpu": "100m", "memory": "256Mi"}, "limits": {"memory": "1Gi"}},
        "volumeMounts": [{"name": "data", "mountPath": "/data"}],
        "securityContext": _confine(),
    }
    claim = {
        "metadata": {"name": "data"},
        "spec": {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "5Gi"}}},
    }
    spec = {
        "serviceName": REDIS,
        "replicas": 1,
        "selector": {"matchLabels": labels},
        "template": {
            "metadata": {"labels": labels},
            "spec": {
                "automountServiceAccountToken": False,
                "securityContext": {**_be_user(), "runAsUser": 999, "fsGroup": 999},
                "containers": [container],
            },
        },
        "volumeClaimTemplates": [claim],
    }
    service = {"selector": labels, "ports": [{"name": "redis", "port": port, "targetPort": "redis"}]}
    return [
        _make("v1", "Service", config, name=REDIS, spec=service),
        _make("apps/v1", "StatefulSet", config, name=REDIS, spec=spec),
    ]


def _render_network(config: DeployConfig) -> list[Manifest]:
    """Let in nobody but those who have to: Ray's nodes each other, the operator, clients, Prometheus."""
    ports = config.ports
    nodes = {"matchLabels": {"ray.io/is-ray-node": "yes"}}
    operator, monitoring = (
        {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": space}}}
        for space in (config.operator_namespace, config.monitoring_namespace)
    )
    clients = {"namespaceSelector": {"matchLabels": {f"{NAME}-client": "true"}}}
    inside = {"podSelector": {}}
    rules = [
        {"from": [{"podSelector": nodes}]},
        {"from": [operator], "ports": _name_ports(ports.dashboard, ports.agent, ports.serve)},
        {"from": [inside], "ports": _name_ports(ports.dashboard, ports.serve, ports.direct, ports.grpc)},
        {"from": [clients], "ports": _name_ports(ports.serve, ports.direct, ports.grpc)},
        {"from": [monitoring], "ports": _name_ports(ports.metrics, ports.serve)},
    ]
    redis = {"matchLabels": {"app.kubernetes.io/name": REDIS}}
    keeper = [{"from": [{"podSelector": nodes}], "ports": _name_ports(ports.redis)}]
    # KubeRay's own job empties Redis of a cluster that was removed.
    keeper[0]["from"].append({"podSelector": {"matchLabels": {"app.kubernetes.io/created-by": "kuberay-operator"}}})
    return [
        _limit(config, "nothing", {}, []),
        _limit(config, "ray", nodes, rules),
        _limit(config, "redis", redis, keeper),
    ]


def _limit(config: DeployConfig, name: str, pods: Manifest, ingress: list[Manifest]) -> Manifest:
    spec = {"podSelector": pods, "policyTypes": ["Ingress"], "ingress": ingress}
    return _make("networking.k8s.io/v1", "NetworkPolicy", config, name=f"{NAME}-{name}", spec=spec)


def _name_ports(*ports: int) -> list[Manifest]:
    return [{"protocol": "TCP", "port": port} for port in ports]


def _render_budgets(config: DeployConfig) -> list[Manifest]:
    """Let nodes be drained one at a time: a copy of every shard stays, and Redis is moved by hand."""
    serving = {"selector": {"matchLabels": {"ray.io/group": "serve"}}, "maxUnavailable": 1}
    redis = {"selector": {"matchLabels": {"app.kubernetes.io/name": REDIS}}, "minAvailable": 1}
    return [
        _make("policy/v1", "PodDisruptionBudget", config, name=f"{NAME}-serve", spec=serving),
        _make("policy/v1", "PodDisruptionBudget", config, name=REDIS, spec=redis),
    ]


def _render_cluster(config: DeployConfig) -> Manifest:
    groups = {"cpu": config.nodes.cpu, "gpu": config.nodes.gpu}
    return _make("ray.io/v1", "RayCluster", config, spec=_describe_cluster(config, "train", groups))


def _render_job(config: DeployConfig, stage: str) -> Manifest:
    """Give a job with a cluster of its own, which goes when it is done; artefacts that are whole are not made again."""
    kinds = ("cpu", "gpu") if stage in (*ON_GPU, "pipeline") else ("cpu",)
    groups = {kind: getattr(config.nodes, kind) for kind in kinds}
    words = ["python", "-m", "gsl_dist.cluster.pipeline", CONFIGS]
    spec = {
        "entrypoint": " ".join(words if stage == "pipeline" else [*words, f"stages=[{stage}]"]),
        "submissionMode": "K8sJobMode",
        "backoffLimit": 2,
        "shutdownAfterJobFinishes": True,
        "ttlSecondsAfterFinished": 300,
        "rayClusterSpec": _describe_cluster(config, "train", groups, is_for_job=True),
        "submitterPodTemplate": {"spec": _describe_submitter(config)},
    }
    return _make("ray.io/v1", "RayJob", config, name=f"{NAME}-{stage}", spec=spec)


def _render_service(config: DeployConfig) -> Manifest:
    application = {
        "name": NAME,
        "route_prefix": "/",
        "import_path": "gsl_dist.cluster.serve:build_app",
        "args": config.service,
    }
    serve = {
        "proxy_location": "EveryNode",
        "http_options": {"host": "0.0.0.0", "port": config.ports.serve},
        "applications": [application],
    }
    spec = {
        "serviceUnhealthySecondThreshold": 900,
        "deploymentUnhealthySecondThreshold": 300,
        "upgradeStrategy": {"type": "NewCluster"},
        "excludeHeadPodFromServeSvc": True,
        "serveConfigV2": yaml.safe_dump(serve, sort_keys=False),
        "rayClusterConfig": _describe_cluster(config, "serve", {"serve": config.nodes.serve}),
    }
    return _make("ray.io/v1", "RayService", config, spec=spec)


def _describe_cluster(
    config: DeployConfig, target: str, groups: dict[str, Node], *, is_for_job: bool = False
) -> Manifest:
    head = _describe_pod(config, target, "head", config.nodes.head, reads_configs=is_for_job)
    return {
        "rayVersion": config.image.ray,
        "authOptions": {"mode": "token"},
        "enableInTreeAutoscaling": True,
        "autoscalerOptions": {
            "version": "v2",
            "idleTimeoutSeconds": 60,
            "resources": _show_resources(1, 1, 0),
            "securityContext": _confine(),
        },
        # A job that lost its head starts again with another cluster; what it made is there.
        **({} if is_for_job else {"gcsFaultToleranceOptions": _keep_in_redis(config)}),
        # Nothing runs on the head but what keeps the cluster together.
        "headGroupSpec": {"rayStartParams": {"num-cpus": "0", **_start_params(config)}, "template": head},
        "workerGroupSpecs": [
            {
                "groupName": name,
                "replicas": node.least,
                "minReplicas": node.least,
                "maxReplicas": node.most,
                "rayStartParams": _start_params(config),
                "template": _describe_pod(config, target, "worker", node),
            }
            for name, node in groups.items()
        ],
    }


def _keep_in_redis(config: DeployConfig) -> Manifest:
    password = {"valueFrom": {"secretKeyRef": {"name": REDIS, "key": SECRETS[REDIS]}}}
    return {"redisAddress": f"redis://{REDIS}:{config.ports.redis}", "redisPassword": password}


def _start_params(config: DeployConfig) -> dict[str, str]:
    return {"metrics-export-port": str(config.ports.metrics)}


def _describe_pod(config: DeployConfig, target: str, role: str, node: Node, *, reads_configs: bool = False) -> Manifest:
    volumes = {
        "ray": ({"emptyDir": {}}, "/tmp/ray"),
        # Ray's object store; without it there are 64 MB.
        "shm": ({"emptyDir": {"medium": "Memory", "sizeLimit": f"{max(1, node.memory_gb * 3 // 10)}Gi"}}, "/dev/shm"),
    }
    if config.is_shared_folder:
        volumes["data"] = ({"persistentVolumeClaim": {"claimName": f"{NAME}-data"}}, config.root)
    elif target == "serve":
        volumes["cache"] = ({"emptyDir": {"sizeLimit": f"{config.cache_gb}Gi"}}, CACHE)
    if reads_configs:
        volumes["configs"] = ({"configMap": {"name": f"{NAME}-configs"}}, CONFIGS)
    if target == "serve":
        volumes["tokens"] = ({"secret": {"secretName": f"{NAME}-tokens", "defaultMode": 0o440}}, TOKENS)
    container = {
        "name": f"ray-{role}",
        "image": config.image.target(target),
        "imagePullPolicy": config.image.pull,
        "env": [{"name": ROOT, "value": config.root}, {"name": "RAY_USAGE_STATS_ENABLED", "value": "0"}],
        # Keys of an object store, where `root` is one: AWS_ACCESS_KEY_ID and so on.
        "envFrom": [{"secretRef": {"name": STORE, "optional": True}}],
        "ports": _list_ports(config, target, role),
        "resources": _show_resources(node.cpus, node.memory_gb, node.gpus),
        "securityContext": _confine(),
        "volumeMounts": [{"name": name, "mountPath": path} for name, (_, path) in volumes.items()],
    }
    return {
        "spec": {
            "securityContext": _be_user(),
            "containers": [container],
            "volumes": [{"name": name, **kind} for name, (kind, _) in volumes.items()],
        }
    }


def _list_ports(config: DeployConfig, target: str, role: str) -> list[Manifest]:
    ports = config.ports
    named = {"metrics": ports.metrics}
    if role == "head":
        named |= {"gcs-server": ports.gcs, "dashboard": ports.dashboard, "client": ports.client}
    if target == "serve":
        named |= {"serve": ports.serve, "direct": ports.direct, "grpc": ports.grpc}
    return [{"name": name, "containerPort": port} for name, port in named.items()]


def _describe_submitter(config: DeployConfig) -> Manifest:
    container = {
        "name": "submitter",
        "image": config.image.target("train"),
        "imagePullPolicy": config.image.pull,
        "resources": {"requests": {"cpu": "500m", "memory": "512Mi"}, "limits": {"memory": "2Gi"}},
        "securityContext": _confine(),
    }
    return {"restartPolicy": "Never", "securityContext": _be_user(), "containers": [container]}


def _show_resources(cpus: int, memory_gb: int, gpus: int) -> Manifest:
    # Requests are limits: Ray counts on what the limit says.
    taken: Manifest = {"cpu": str(cpus), "memory": f"{memory_gb}Gi"}
    if gpus:
        taken["nvidia.com/gpu"] = str(gpus)
    return {"requests": dict(taken), "limits": dict(taken)}


def _be_user() -> Manifest:
    return {
        "runAsNonRoot": True,
        "runAsUser": USER,
        "fsGroup": USER,
        "fsGroupChangePolicy": "OnRootMismatch",
        "seccompProfile": {"type": "RuntimeDefault"},
    }


def _confine() -> Manifest:
    return {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
