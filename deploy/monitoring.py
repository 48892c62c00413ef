"""What Prometheus asks whom for, and what it wakes people for; `grafana/gsl_dist.json` draws the same figures."""

from __future__ import annotations

from typing import Any

from settings import NAME, DeployConfig

TOKEN_FILE = "/etc/prometheus/secrets/gsl-token"
"""A token that may read, of `gsl token`: the service tells its figures to nobody else."""


def render_monitoring(config: DeployConfig) -> dict[str, list[dict[str, Any]]]:
    """Give Prometheus' own files, for Kubernetes and for machines without, and the alerts of both."""
    return {
        "prometheus/kubernetes.yaml": [_scrape(_find_pods(config), f"{NAME}-serve-svc.{config.namespace}", config)],
        "prometheus/machines.yaml": [_scrape(_list_machines(config), config.machines.head, config)],
        "prometheus/alerts.yaml": [{"groups": [{"name": NAME, "rules": [_alert(*alert) for alert in _ALERTS]}]}],
    }


def _scrape(nodes: dict[str, Any], service: str, config: DeployConfig) -> dict[str, Any]:
    served = {
        "job_name": NAME,
        "metrics_path": "/metrics",
        "authorization": {"type": "Bearer", "credentials_file": TOKEN_FILE},
        "static_configs": [{"targets": [f"{service}:{config.ports.serve}"]}],
    }
    return {
        "global": {"scrape_interval": "15s", "evaluation_interval": "15s"},
        "rule_files": ["alerts.yaml"],
        "scrape_configs": [served, {"job_name": f"{NAME}-ray", **nodes}],
    }


def _find_pods(config: DeployConfig) -> dict[str, Any]:
    label = "__meta_kubernetes_pod_label_ray_io_"
    return {
        "kubernetes_sd_configs": [{"role": "pod", "namespaces": {"names": [config.namespace]}}],
        "relabel_configs": [
            {"source_labels": [f"{label}is_ray_node"], "regex": "yes", "action": "keep"},
            {"source_labels": ["__meta_kubernetes_pod_container_port_name"], "regex": "metrics", "action": "keep"},
            {"source_labels": [f"{label}cluster"], "target_label": "ray_io_cluster"},
            {"source_labels": [f"{label}group"], "target_label": "group"},
        ],
    }


def _list_machines(config: DeployConfig) -> dict[str, Any]:
    known = (config.machines.head, *config.machines.workers)
    return {"static_configs": [{"targets": [f"{machine}:{config.ports.metrics}" for machine in known]}]}


def _alert(name: str, expr: str, lasting: str, severity: str, summary: str) -> dict[str, Any]:
    labels, told = {"severity": severity}, {"summary": summary}
    return {"alert": name, "expr": expr, "for": lasting, "labels": labels, "annotations": told}


_ALERTS = (
    ("GslDown", f'up{{job="{NAME}"}} == 0 or absent(up{{job="{NAME}"}})', "1m", "page", "The service does not answer."),
    (
        "GslPartialAnswers",
        "sum(rate(gsl_partial_answers_total[5m])) / sum(rate(gsl_stage_seconds_count{stage='request'}[5m])) > 0.01",
        "5m",
        "page",
        "More than one answer in a hundred lacks shards.",
    ),
    (
        "GslReplicasMissing",
        'sum(gsl_replicas{state="connected"}) < sum(gsl_replicas{state="wanted"})',
        "5m",
        "ticket",
        "Replicas are gone and were not started anew; with copies answers are whole, with less to spare.",
    ),
    (
        "GslErrors",
        'sum(rate(gsl_requests_total{status=~"5.."}[5m])) / sum(rate(gsl_requests_total[5m])) > 0.01',
        "5m",
        "page",
        "More than one request in a hundred fails.",
    ),
    (
        "GslOverloaded",
        'sum(rate(gsl_requests_total{status="429"}[5m])) > 1',
        "5m",
        "ticket",
        "Requests are turned away: there is more to do than the service takes on (max_requests).",
    ),
    (
        "GslSlow",
        'histogram_quantile(0.99, sum by (le) (rate(gsl_stage_seconds_bucket{stage="request"}[5m]))) > 1',
        "10m",
        "ticket",
        "One request in a hundred takes more than a second.",
    ),
    (
        "GslRecallFell",
        "gsl_recall < 0.9 * max_over_time(gsl_recall[7d])",
        "15m",
        "ticket",
        "Recall of the queries held out has fallen by a tenth: look at the last version and at what was written since.",
    ),
    (
        "GslCompactSoon",
        "gsl_new_rows > 50000",
        "1h",
        "ticket",
        "Many rows were written since the version was made, and are searched one by one: gsl compact.",
    ),
    (
        "GslNodeGone",
        f'up{{job="{NAME}-ray"}} == 0',
        "5m",
        "ticket",
        "A node of the Ray cluster does not answer.",
    ),
)
