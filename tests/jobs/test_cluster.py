"""cluster.yaml cannot be run here, so it is asked everything that can be asked without AWS.

Ray's own schema and scheduler, botocore's model of EC2, and the laws that neither knows.
"""

import copy
import os
import shlex
import subprocess
import tomllib
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import click
import jsonschema
import pytest
import yaml
from botocore.session import get_session
from botocore.validate import ParamValidator

from lora_diffusion.config import load_config
from lora_diffusion.factory.config import CorpusConfig

ROOT = Path(__file__).resolve().parents[2]
TAKEN_BY_RAY = {"SubnetIds"}  # keys of node_config that Ray itself reads and EC2 does not know
PROVIDER_KEYS = {"type", "region", "availability_zone", "cache_stopped_nodes", "security_group", "use_internal_ips"}
Cluster = dict[str, Any]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))  # Ray's launcher keeps keys and caches there


@pytest.fixture
def cluster() -> Cluster:
    return yaml.safe_load((ROOT / "cluster.yaml").read_text())


def check_schema(cluster: Cluster) -> Cluster:
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared = prepare_config(copy.deepcopy(cluster))
    validate_config(prepared)
    return prepared


@lru_cache
def run_instances() -> Any:
    return get_session().get_service_model("ec2").operation_model("RunInstances").input_shape


def check_ec2(cluster: Cluster) -> None:
    """What Ray hands to EC2's RunInstances unread: names, types and enumerations of node_config."""
    model = run_instances()
    for name, node in cluster["available_node_types"].items():
        parameters = {key: value for key, value in node["node_config"].items() if key not in TAKEN_BY_RAY}
        report = ParamValidator().validate({**parameters, "MinCount": 1, "MaxCount": 1}, model)
        if report.has_errors():
            raise ValueError(f"{name}: {report.generate_report()}")
        check_enums(parameters, model, name)


def check_enums(value: Any, shape: Any, where: str) -> None:
    """botocore's validator leaves enumerations to the server."""
    if shape.type_name == "structure":
        for key, inner in value.items():
            check_enums(inner, shape.members[key], f"{where}.{key}")
    elif shape.type_name == "list":
        for inner in value:
            check_enums(inner, shape.member, where)
    elif getattr(shape, "enum", None) and value not in shape.enum:
        raise ValueError(f"{where}: EC2 knows no {value!r}")


def check_laws(cluster: Cluster) -> None:
    """What no schema says: who runs where, what it may cost, and who may come in."""
    nodes, provider = cluster["available_node_types"], cluster["provider"]
    head = nodes[cluster["head_node_type"]]
    assert set(provider) <= PROVIDER_KEYS
    zones = provider["availability_zone"].split(",")
    assert all(zone[:-1] == provider["region"] for zone in zones), "the zones lie in another region"
    assert f"--env AWS_DEFAULT_REGION={provider['region']}" in cluster["docker"]["run_options"]
    assert head["resources"] == {"CPU": 0}, "tasks would land on the head"
    assert "GPU" not in head["resources"]
    assert "InstanceMarketOptions" not in head["node_config"], "a lost head is a lost job"
    spot = nodes["gpu_spot"]
    assert spot["node_config"]["InstanceMarketOptions"]["MarketType"] == "spot"
    assert spot["max_workers"] > 0
    for name, node in nodes.items():
        assert node.get("min_workers", 0) == 0, f"{name} would cost money without work"
    assert nodes["gpu_on_demand"]["max_workers"] == 0
    starts = [word for line in cluster["head_start_ray_commands"] for word in shlex.split(line)]
    assert "--dashboard-host=127.0.0.1" in starts
    assert "--env RAY_AUTH_MODE=token" in cluster["docker"]["run_options"]
    (token,) = (where for where, source in cluster["file_mounts"].items() if source == "~/.ray/auth_token")
    assert f"--env RAY_AUTH_TOKEN_PATH={token}" in cluster["docker"]["run_options"]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = {"pyproject.toml", "constraints.txt", "lora_diffusion", project["readme"], *project["license-files"]}
    mounts = {where: source for where, source in cluster["file_mounts"].items() if where != token}
    assert mounts == {f"/home/ray/lora-diffusion/{name}": name for name in needed}, "what `pip install` needs, no more"


def test_ray_takes_it(cluster: Cluster) -> None:
    prepared = check_schema(cluster)
    assert prepared["head_node_type"] == "head"
    assert prepared["available_node_types"]["head"]["max_workers"] == 0
    # Setup runs on both: Ray puts it before the commands of each kind.
    assert prepared["head_setup_commands"] == prepared["worker_setup_commands"] == cluster["setup_commands"]


def test_ec2_takes_its_machines(cluster: Cluster) -> None:
    check_ec2(cluster)


def test_its_laws_hold(cluster: Cluster) -> None:
    check_laws(cluster)


def rename(path: str, new: str) -> Callable[[Cluster], None]:
    def edit(cluster: Cluster) -> None:
        *parents, old = path.split("/")
        for key in parents:
            cluster = cluster[key]
        cluster[new] = cluster.pop(old)

    return edit


def put(path: str, value: Any) -> Callable[[Cluster], None]:
    def edit(cluster: Cluster) -> None:
        *parents, last = path.split("/")
        for key in parents:
            cluster = cluster[key]
        cluster[last] = value

    return edit


NODE = "available_node_types/gpu_spot"


@pytest.mark.parametrize(
    ("check", "error", "edit"),
    [
        (check_schema, jsonschema.ValidationError, rename("idle_timeout_minutes", "idle_timeout")),
        (check_schema, jsonschema.ValidationError, rename(f"{NODE}/max_workers", "maximum_workers")),
        (check_schema, jsonschema.ValidationError, put(f"{NODE}/resources", {"CPU": 7.5})),
        (check_schema, jsonschema.ValidationError, put("docker/run_option", [])),
        (check_schema, ValueError, put("head_node_type", "nobody")),
        (check_ec2, ValueError, rename(f"{NODE}/node_config/InstanceMarketOptions", "InstanceMarketOption")),
        (check_ec2, ValueError, put(f"{NODE}/node_config/InstanceMarketOptions/MarketType", "sport")),
        (check_ec2, ValueError, put(f"{NODE}/node_config/InstanceType", "g6e.2xlarg")),
        (check_ec2, ValueError, put(f"{NODE}/node_config/IamInstanceProfile", "lora-diffusion")),
        (check_laws, AssertionError, rename("provider/region", "regoin")),
        (check_laws, AssertionError, put("provider/availability_zone", "us-west-2a,eu-west-1a")),
        (check_laws, AssertionError, put("available_node_types/head/resources", {})),
        (check_laws, AssertionError, put("head_start_ray_commands", ["ray start --head --dashboard-host=0.0.0.0"])),
        (check_laws, AssertionError, put(f"{NODE}/min_workers", 1)),
        (check_laws, AssertionError, put("docker/run_options", ["--env AWS_DEFAULT_REGION=us-west-2"])),
        (
            check_laws,
            AssertionError,
            put("file_mounts", {"/home/ray/ray-auth-token": "~/.ray/auth_token", "/src": "."}),
        ),
    ],
)
def test_a_mistake_in_it_does_not_pass(
    cluster: Cluster, check: Callable[[Cluster], Any], error: type[Exception], edit: Callable[[Cluster], None]
) -> None:
    edit(cluster)
    with pytest.raises((error, KeyError) if check is check_laws else error):
        check(cluster)


def test_the_autoscaler_meets_what_sd15_asks_for_with_spot_machines(cluster: Cluster) -> None:
    from ray.autoscaler._private.resource_demand_scheduler import _default_utilization_scorer, get_nodes_for

    workers = load_config(CorpusConfig, ROOT / "configs/sd15.yaml").workers
    demand = [{"CPU": workers.finetune_cpus, "GPU": workers.finetune_gpus}] * workers.finetune_max
    demand += [{"CPU": workers.embed_cpus}] * workers.embed_max

    def launch(max_spot: int, max_on_demand: int) -> tuple[dict[str, int], list[Any]]:
        nodes = check_schema(cluster)["available_node_types"]
        nodes["gpu_spot"]["max_workers"], nodes["gpu_on_demand"]["max_workers"] = max_spot, max_on_demand

        def score(node: Any, resources: Any, name: str) -> Any:
            return _default_utilization_scorer(node, resources, name, node_availability_summary=None)

        added, left = get_nodes_for(nodes, {"head": 1}, "head", cluster["max_workers"], copy.deepcopy(demand), score)
        return dict(added), left

    assert launch(32, 0) == ({"gpu_spot": 32}, [])
    assert launch(32, 32) == ({"gpu_spot": 32}, [])  # with both open, spot comes first
    assert launch(0, 32) == ({"gpu_on_demand": 32}, [])
    assert len(launch(31, 0)[1]) == 1


def test_the_commands_are_shell_and_install_the_extras_that_exist(cluster: Cluster) -> None:
    for key in ("setup_commands", "head_start_ray_commands", "worker_start_ray_commands"):
        for line in cluster[key]:
            subprocess.run(["bash", "-n", "-c", line], check=True)
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    (install,) = (line for line in cluster["setup_commands"] if line.startswith("pip install"))
    assert set(install.partition("[")[2].partition("]")[0].split(",")) <= set(extras)
    assert "--constraint" in install


def test_the_documented_submission_reaches_the_job_word_for_word() -> None:
    from ray.dashboard.modules.job.cli import submit

    text = (ROOT / "docs/guides/cluster.md").read_text()
    line = next(line for line in text.splitlines() if line.startswith("ray job submit --working-dir"))
    context = submit.make_context("submit", shlex.split(line)[3:])
    assert context.params["working_dir"] == "."
    script, option, config, *overrides = context.params["entrypoint"]
    assert os.access(ROOT / script, os.X_OK)
    assert option == "--config"
    loaded = load_config(CorpusConfig, ROOT / config, overrides)
    assert loaded.people == "s3://your-bucket/people"
    assert loaded.limit == 64
    with pytest.raises(click.NoSuchOption):  # and this is why the double dash is there
        submit.make_context("submit", [word for word in shlex.split(line)[3:] if word != "--"])
