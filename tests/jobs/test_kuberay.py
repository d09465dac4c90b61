"""The manifests of deploy/ cannot be applied here: they are asked what KubeRay's schemas, botocore and our own command line know."""

from __future__ import annotations

import copy
import gzip
import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from botocore.session import get_session
from botocore.validate import ParamValidator

from lora_diffusion.config import load_config
from lora_diffusion.factory.config import CorpusConfig
from lora_diffusion.jobs.run import JOBS, read_options
from lora_diffusion.synthesis.training.train_config import TrainConfig

ROOT = Path(__file__).resolve().parents[2]
JOB_FILES = ("rayjob-corpus.yaml", "rayjob-train.yaml")
CONFIGS: dict[str, type[Any]] = {"corpus": CorpusConfig, "train": TrainConfig}
Manifest = dict[str, Any]


def read(name: str) -> Manifest:
    return yaml.safe_load((ROOT / "deploy" / name).read_text())


def closed(schema: Any) -> Any:
    """A name that a schema does not know is an error, as to `kubectl apply` with strict validation."""
    if isinstance(schema, list):
        return [closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    new = {key: closed(value) for key, value in schema.items()}
    if isinstance(schema.get("properties"), dict) and "additionalProperties" not in schema:
        new["additionalProperties"] = False
    return new


@pytest.fixture(scope="module")
def schemas() -> dict[str, Any]:
    return json.loads(gzip.decompress((ROOT / "tests/data/kuberay/crds.json.gz").read_bytes()))


def check_schema(manifest: Manifest, schemas: dict[str, Any]) -> None:
    kind = copy.deepcopy(schemas["kinds"][manifest["kind"]])
    kind["properties"]["metadata"] = {"type": "object", "required": ["name"]}
    jsonschema.validate(manifest, {**closed(kind), "definitions": closed(schemas["definitions"])})


def check_laws(manifest: Manifest) -> None:
    """What no schema says: that the command is one of ours, that pods hold what it asks for, and where they may run."""
    spec = manifest["spec"]
    program, job, *words = shlex.split(spec["entrypoint"])
    assert program == "lora-diffusion"
    options = read_options(JOBS[job], words)
    config = load_config(CONFIGS[job], options.config, options.overrides)
    cluster = spec["rayClusterSpec"]
    head, (group,) = cluster["headGroupSpec"], cluster["workerGroupSpecs"]
    pinned = (ROOT / "constraints.txt").read_text()
    assert f"\nray=={cluster['rayVersion']}\n" in pinned
    assert head["rayStartParams"]["num-cpus"] == "0", "tasks would land on the head"
    assert (group["minReplicas"], group["replicas"]) == (0, 0), "it would cost money without work"
    most = config.workers.finetune_max if job == "corpus" else config.workers.max_workers
    assert group["maxReplicas"] == most
    cpus = config.workers.finetune_cpus if job == "corpus" else config.workers.cpus
    (container,) = group["template"]["spec"]["containers"]
    assert int(container["resources"]["limits"]["cpu"]) >= cpus
    assert container["resources"]["limits"] == container["resources"]["requests"], (
        "Ray counts limits, Kubernetes requests"
    )
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"
    policy = json.loads((ROOT / "deploy/iam-policy.json").read_text())
    allowed = [
        place for s in policy["Statement"] for place in [s["Resource"]] if isinstance(place, list) for place in place
    ]
    for word in words:
        if "s3://" in word:
            place = word.partition("s3://")[2]
            assert any(f"arn:aws:s3:::{place}/x".startswith(resource.rstrip("*")) for resource in allowed), word
    check_pods(cluster)
    affinity = {
        name: part["template"]["spec"]["affinity"]["nodeAffinity"] for name, part in (("head", head), ("gpu", group))
    }
    assert "on-demand" in str(affinity["head"]["requiredDuringSchedulingIgnoredDuringExecution"]), (
        "a lost head is a lost job"
    )
    assert "spot" in str(affinity["gpu"]["preferredDuringSchedulingIgnoredDuringExecution"])
    assert "requiredDuringSchedulingIgnoredDuringExecution" not in affinity["gpu"], "no way to on-demand"
    stop = str(group["template"]["spec"]["containers"][0]["lifecycle"]["preStop"])
    assert (
        int(stop.partition("--grace-period ")[2].partition("'")[0])
        < group["template"]["spec"]["terminationGracePeriodSeconds"]
    )


def check_pods(cluster: Manifest) -> None:
    """Their rights, and a cache that user `ray` of the image may write."""
    assert cluster["authOptions"] == {"mode": "token"}, "who reaches the dashboard could run code"
    for part in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = part["template"]["spec"]
        (container,) = pod["containers"]
        assert pod["serviceAccountName"] == "lora-diffusion"
        values = {variable["name"]: variable.get("value") for variable in container["env"]}
        assert "AWS_DEFAULT_REGION" in values
        (mount,) = (m for m in container["volumeMounts"] if m["mountPath"] == values["LORA_DIFFUSION_CACHE"])
        (volume,) = (volume for volume in pod["volumes"] if volume["name"] == mount["name"])
        if "hostPath" in volume:  # the kubelet makes it for root
            (init,) = pod["initContainers"]
            assert (init["volumeMounts"], init["securityContext"]) == ([mount], {"runAsUser": 0})
            assert init["command"] == ["install", "-d", "-o", "1000", "-g", "100", mount["mountPath"]]
        else:
            assert pod["securityContext"] == {"fsGroup": 100}


def test_the_pods_of_the_endpoint_have_rights_and_a_cache_too() -> None:
    check_pods(read("rayservice.yaml")["spec"]["rayClusterConfig"])


@pytest.mark.parametrize("name", [*JOB_FILES, "rayservice.yaml"])
def test_kuberay_takes_it(name: str, schemas: dict[str, Any]) -> None:
    check_schema(read(name), schemas)


@pytest.mark.parametrize("name", JOB_FILES)
def test_its_laws_hold(name: str) -> None:
    check_laws(read(name))


def put(path: str, value: Any) -> Callable[[Manifest], None]:
    def edit(manifest: Any) -> None:
        *parents, last = path.split("/")
        for key in parents:
            manifest = manifest[int(key) if key.isdecimal() else key]
        manifest[last] = value

    return edit


CLUSTER = "spec/rayClusterSpec"
WORKER = f"{CLUSTER}/workerGroupSpecs/0"


@pytest.mark.parametrize(
    ("law", "edit"),
    [
        ("schema", put("spec/entryPoint", "x")),
        ("schema", put("spec/submissionMode", 3)),
        ("schema", put(f"{CLUSTER}/authOptions/mode", "tokens")),
        ("schema", put(f"{CLUSTER}/autoscalerOptions/version", "v3")),
        ("schema", put(f"{CLUSTER}/autoscalerOptions/upscalingMode", "Fast")),
        ("schema", put(f"{WORKER}/maxReplica", 3)),
        ("schema", put(f"{WORKER}/template/spec/toleration", [])),
        ("schema", put(f"{WORKER}/template/spec/containers/0/imagePullPolicies", "Always")),
        ("law", put("spec/entrypoint", "lora-diffusion corpus peeple=a")),
        ("law", put("spec/entrypoint", "lora-diffusion corpus configs/sd15.yaml output=s3://your-bucket/elsewhere")),
        ("law", put(f"{CLUSTER}/rayVersion", "2.59.0")),
        ("law", put(f"{CLUSTER}/headGroupSpec/rayStartParams", {"num-cpus": "4"})),
        ("law", put(f"{WORKER}/minReplicas", 1)),
        ("law", put(f"{WORKER}/template/spec/terminationGracePeriodSeconds", 30)),
        ("law", put(f"{WORKER}/template/spec/volumes", [])),
    ],
)
def test_a_mistake_in_it_does_not_pass(law: str, edit: Callable[[Manifest], None], schemas: dict[str, Any]) -> None:
    manifest = copy.deepcopy(read("rayjob-corpus.yaml"))
    edit(manifest)
    with pytest.raises((jsonschema.ValidationError, AssertionError, ValueError)):
        check_schema(manifest, schemas) if law == "schema" else check_laws(manifest)


def test_the_policy_gives_the_least_rights() -> None:
    policy = json.loads((ROOT / "deploy/iam-policy.json").read_text())
    for statement in policy["Statement"]:
        actions = [statement["Action"]] if isinstance(statement["Action"], str) else statement["Action"]
        places = [statement["Resource"]] if isinstance(statement["Resource"], str) else statement["Resource"]
        assert statement["Effect"] == "Allow"
        assert all(action.startswith("s3:") and "*" not in action for action in actions)
        assert all(place.startswith("arn:aws:s3:::your-bucket") for place in places)
        if any(verb in action for action in actions for verb in ("Put", "Delete")):
            assert not any("/people/" in place or "/models/" in place for place in places), (
                "photos are read, never written"
            )


def test_s3_takes_the_lifecycle() -> None:
    rules = json.loads((ROOT / "deploy/s3-lifecycle.json").read_text())
    model = get_session().get_service_model("s3").operation_model("PutBucketLifecycleConfiguration").input_shape
    report = ParamValidator().validate({"Bucket": "your-bucket", "LifecycleConfiguration": rules}, model)
    assert not report.has_errors(), report.generate_report()
    expired = [rule["Filter"]["Prefix"] for rule in rules["Rules"] if "Expiration" in rule]
    assert expired == ["loras/"], (
        "nothing that was paid for is thrown away by the clock, but LoRAs of an endpoint that is gone"
    )
