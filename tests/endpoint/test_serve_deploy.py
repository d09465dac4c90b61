"""What the entry point and the deployment files promise, without starting anything."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray import serve
from ray.serve.schema import ServeDeploySchema
from s3_server import free_port

from lora_diffusion.config import load_config, to_dict
from lora_diffusion.endpoint import APP
from lora_diffusion.endpoint.access import refuse_open_door
from lora_diffusion.endpoint.graph import DEPLOYMENTS, build
from lora_diffusion.extras import MissingExtra
from lora_diffusion.jobs.serve import arguments
from lora_diffusion.serving.config import ServeConfig

ROOT = Path(__file__).parents[2]
CONFIGS = ("configs/serve_tiny.yaml", "configs/serve_sd15.yaml")


def options_of(application: Any) -> dict[str, Any]:
    """Deployment name -> deployment, of all that hang together in an application."""
    found: dict[str, Any] = {}

    def visit(node: Any) -> None:
        deployment = node._bound_deployment
        found[deployment.name] = deployment
        for argument in (*deployment.init_args, *deployment.init_kwargs.values()):
            for one in argument if isinstance(argument, list) else [argument]:
                if hasattr(one, "_bound_deployment"):
                    visit(one)

    visit(application)
    return found


def test_entry_point_is_a_serve_config_and_python_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """`serve run serve/app.py` parses an existing file as YAML; `serve run serve.app:app` imports it."""
    text = (ROOT / "serve/app.py").read_text()
    config = ServeDeploySchema.model_validate(yaml.safe_load(text))
    (application,) = config.applications
    assert config.http_options.host == "127.0.0.1"
    module, _, name = application.import_path.partition(":")
    assert getattr(importlib.import_module(module), name) is build
    assert (ROOT / application.args["config"]).is_file()
    assert importlib.import_module("serve.app").app is build
    both = yaml.safe_load(APP.read_text())  # what `lora-diffusion serve` starts
    assert {key: value for key, value in yaml.safe_load(text).items() if key != "app"} == both


@pytest.mark.parametrize("path", CONFIGS)
def test_every_deployment_scales_by_itself_and_has_bounded_queues(path: str) -> None:
    deployments = options_of(build({"config": path, "graph": "stages"}))
    assert set(deployments) == DEPLOYMENTS == set(load_config(ServeConfig, ROOT / path).deployments)
    for name in ("Embedder", "Denoiser", "Decoder", "Renderer"):
        config = deployments[name]._deployment_config
        assert config.autoscaling_config is not None, name
        assert 0 < config.max_queued_requests < 1000, name
    assert deployments["Library"]._deployment_config.num_replicas == 1  # it holds state


def test_a_replica_that_stops_may_finish_what_it_has() -> None:
    """A request in hand may have to wait for new replicas of the other stages: as long as a request may take."""
    deployments = options_of(
        build({"graph": "stages", "limits.max_seconds": 77, "deployments.Library.graceful_shutdown_timeout_s": 5})
    )
    patience = {
        name: deployment._deployment_config.graceful_shutdown_timeout_s for name, deployment in deployments.items()
    }
    assert patience.pop("Library") == 5
    assert set(patience.values()) == {77}


def test_small_models_are_fused_into_the_gateway_and_large_ones_scale_alone() -> None:
    assert set(options_of(build({"config": CONFIGS[0]}))) == {"Gateway", "Renderer"}
    assert set(options_of(build({"config": CONFIGS[1]}))) == DEPLOYMENTS
    with pytest.raises(ValueError, match="num_replicas=1, or graph=stages"):
        build({"config": CONFIGS[0], "deployments.Gateway": "{num_replicas: 2}"})


def test_a_library_in_memory_scales_by_shards_and_a_store_needs_none() -> None:
    stages = DEPLOYMENTS - {"Library"}
    sharded = options_of(build({"graph": "stages", "library.shards": 3}))
    assert set(sharded) == stages | {"Library-0", "Library-1", "Library-2"}
    assert sharded["Library-2"]._deployment_config.max_ongoing_requests == 256  # `deployments.Library` is of each
    with pytest.raises(ValueError, match=r"library\.shards=2, or library\.store"):
        build({"graph": "stages", "deployments.Library": "{num_replicas: 2}"})
    with pytest.raises(ValueError, match=r"library\.shards are for graph=stages"):
        build({"library.shards": 2})
    for store in ("redis://store.example:6379/1", "/var/lib/loras"):
        assert set(options_of(build({"graph": "stages", "library.store": store}))) == stages
        fused = build({"library.store": store, "deployments.Gateway": "{num_replicas: 3}"})
        assert set(options_of(fused)) == {"Gateway", "Renderer"}
        with pytest.raises(ValueError, match="without a store"):
            build({"library.store": store, "library.shards": 2})


def test_a_store_whose_client_is_not_installed_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "redis"]:
        monkeypatch.delitem(sys.modules, name)
    finder: Any = type("NoRedis", (), {"find_spec": staticmethod(_no_redis)})
    monkeypatch.setattr(sys, "meta_path", [finder, *sys.meta_path])
    with pytest.raises(MissingExtra, match=r"this needs redis.*lora-diffusion\[redis\]"):
        build({"library.store": "redis://store.example"})


def _no_redis(name: str, *_: Any) -> None:
    if name.partition(".")[0] == "redis":
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)


@pytest.mark.parametrize("graph", ["fused", "stages"])
def test_two_cores_hold_the_tiny_world(graph: str) -> None:
    actors = [deployment.ray_actor_options for deployment in options_of(build({"graph": graph})).values()]
    assert sum(options["num_cpus"] for options in actors) <= 2
    assert not any(options.get("num_gpus") for options in actors)


@pytest.mark.parametrize("path", CONFIGS)
def test_a_queue_holds_at_least_a_batch(path: str) -> None:
    config = load_config(ServeConfig, ROOT / path)
    for name in ("embedder", "denoiser", "decoder", "renderer"):
        options = config.deployments[name.capitalize()]
        assert options["max_ongoing_requests"] >= getattr(config.batch, name)


def test_arguments_and_environment_override_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_DIFFUSION_SERVE", "synthesizer=/some/where limits.max_images=3")
    config = build({"config": CONFIGS[0], "limits.max_samples": 2})._bound_deployment.init_args[0]
    assert (config.synthesizer, config.limits.max_images, config.limits.max_samples) == ("/some/where", 3, 2)
    with pytest.raises(ValueError, match="max_images"):
        build({"limits.max_image": 3})
    with pytest.raises(ValueError, match="Painter"):
        build({"deployments.Painter": "{num_replicas: 1}"})


@pytest.mark.parametrize("path", CONFIGS)
def test_every_setting_reaches_a_ray_that_runs_already(path: str) -> None:
    """By the application's arguments: neither environment nor files of whoever starts it are there."""
    words = [
        "access.api_keys_file=none",
        "licence=on",
        "embedder.min_score=0.5",
        "deployments.Renderer.max_ongoing_requests=3",
    ]
    config = load_config(ServeConfig, ROOT / path, words)
    handed = load_config(ServeConfig, None, [f"{key}={word}" for key, word in arguments(to_dict(config)).items()])
    assert handed == config
    assert build(arguments(to_dict(config)))._bound_deployment.init_args[0].licence == "on"


def serve_configs() -> dict[str, dict[str, Any]]:
    service = yaml.safe_load((ROOT / "deploy/rayservice.yaml").read_text())
    assert (service["apiVersion"], service["kind"]) == ("ray.io/v1", "RayService")
    return {
        "serve.yaml": yaml.safe_load((ROOT / "deploy/serve.yaml").read_text()),
        "rayservice.yaml": yaml.safe_load(service["spec"]["serveConfigV2"]),
    }


@pytest.mark.parametrize("name", ["serve.yaml", "rayservice.yaml"])
def test_production_files_fit_serves_schema_and_our_graph(name: str) -> None:
    values = yaml.safe_load(
        yaml.safe_dump(serve_configs()[name]).replace("your-bucket", "acme")
    )  # as its reader edits it
    (application,) = ServeDeploySchema.model_validate(values).applications
    assert {deployment.name for deployment in application.deployments} <= DEPLOYMENTS
    config = build(application.args)._bound_deployment.init_args[0]
    assert values["http_options"]["request_timeout_s"] > config.limits.max_seconds
    reloaded = [deployment.user_config["synthesizer"] for deployment in application.deployments]
    assert reloaded == [config.synthesizer] * 2  # a fresh start and a reload serve the same
    assert config.synthesizer.startswith("s3://acme/")


@pytest.mark.parametrize("name", ["serve.yaml", "rayservice.yaml"])
def test_production_files_start_only_with_keys(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    values = serve_configs()[name]
    config = build(values["applications"][0]["args"])._bound_deployment.init_args[0]
    monkeypatch.delenv(config.access.api_keys_env, raising=False)
    with pytest.raises(ValueError, match="let everybody in"):
        refuse_open_door(config.access, values["http_options"]["host"])
    monkeypatch.setenv(config.access.api_keys_env, "first")
    refuse_open_door(config.access, values["http_options"]["host"])


@pytest.mark.ray
def test_a_serve_that_listens_to_strangers_gets_no_application_without_keys(
    ray_local: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LORA_DIFFUSION_API_KEYS", raising=False)
    serve.start(proxy_location="Disabled", http_options={"host": "0.0.0.0", "port": free_port()})
    try:
        with pytest.raises(ValueError, match=r"listen on 0\.0\.0\.0"):
            build({})
        build({"access.open": True})
    finally:
        serve.shutdown()


def test_gateway_embedder_and_library_start_without_torch() -> None:
    code = (
        "import sys; import lora_diffusion.endpoint.graph, lora_diffusion.serving.faces, lora_diffusion.serving.library; "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=120).returncode == 0
