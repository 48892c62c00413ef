"""Makes the schemas that manifests are validated against of KubeRay's own CRDs.

    git clone --branch v1.7.0 https://github.com/ray-project/kuberay
    python tests/deploy/strip_crds.py kuberay/ray-operator/config/crd/bases

What is not needed to tell right from wrong is left out: descriptions, versions that are not stored, and the templates
of pods, which are Kubernetes' own and are validated as such.
"""

import json
import sys
from pathlib import Path

import yaml

KINDS = ("rayclusters", "rayjobs", "rayservices")
POD = "x-pod-template"


def strip(schema):
    """Give a schema without words for people; a pod's template becomes a mark."""
    if not isinstance(schema, dict):
        return schema
    properties = schema.get("properties", {})
    if set(properties) == {"metadata", "spec"} and "containers" in properties["spec"].get("properties", {}):
        return {"type": "object", POD: True}
    kept = {key: value for key, value in schema.items() if key not in ("description", "x-kubernetes-map-type")}
    if "properties" in kept:
        kept["properties"] = {name: strip(inner) for name, inner in properties.items()}
        if not kept.get("x-kubernetes-preserve-unknown-fields"):
            # The API server would drop what it does not know, and say so only to those who ask.
            kept["additionalProperties"] = False
    for key in ("items", "additionalProperties"):
        if isinstance(kept.get(key), dict):
            kept[key] = strip(kept[key])
    return kept


def main(bases):
    """Write a schema for each kind, of the version that is stored."""
    for kind in KINDS:
        crd = yaml.safe_load((Path(bases) / f"ray.io_{kind}.yaml").read_text())
        [version] = [version for version in crd["spec"]["versions"] if version["storage"]]
        schema = strip(version["schema"]["openAPIV3Schema"])
        schema["properties"]["metadata"] = {"type": "object"}
        schema["properties"].pop("status", None)
        target = Path(__file__).parent / "schemas" / f"{crd['spec']['names']['kind']}.{version['name']}.json"
        target.write_text(json.dumps(schema, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
