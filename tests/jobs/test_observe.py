"""What an operator sees: metrics of jobs at Ray's exporter, log lines without names, dashboards that ask for what there is."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import jsonschema
import pytest

from lora_diffusion.corpus.tombstone import keyed_hash
from lora_diffusion.endpoint.metrics import Metrics
from lora_diffusion.jobs.observe import CorpusObserver, TrainingObserver

FOLDER = Path(__file__).parents[2] / "deploy/grafana"
REPORT = {"stage": "vae", "step": 3, "of": 9, "loss": 0.5, "validation_loss": 0.4, "rows_per_second": 10.0}
REPORT |= {"waiting_for_data": 0.1, "seconds_left": 3.0}


def asked_for(name: str) -> set[str]:
    """Metrics in the expressions of a dashboard, a histogram without its endings."""
    panels = json.loads((FOLDER / f"{name}.json").read_text())["panels"]
    text = " ".join(target["expr"] for panel in panels for target in panel["targets"])
    return {re.sub("_(bucket|sum|count)$", "", found) for found in re.findall(r"(?:ray_)?lora_diffusion_\w+", text)}


def test_the_dashboards_are_what_their_script_writes(tmp_path: Path) -> None:
    script = tmp_path / "dashboards.py"
    script.write_bytes((FOLDER / "dashboards.py").read_bytes())
    subprocess.run([sys.executable, str(script)], check=True)
    for name in ("serving", "corpus", "training"):
        assert (tmp_path / f"{name}.json").read_text() == (FOLDER / f"{name}.json").read_text()


@pytest.mark.parametrize("name", ["serving", "corpus", "training"])
def test_the_dashboards_are_of_grafanas_own_schema(name: str) -> None:
    schema = json.loads((FOLDER.parents[1] / "tests/data/grafana/dashboard.schema.json").read_text())
    dashboard = json.loads((FOLDER / f"{name}.json").read_text())
    assert not list(jsonschema.Draft7Validator(schema).iter_errors(dashboard))
    dashboard["panels"][0]["type"] = 5
    assert list(jsonschema.Draft7Validator(schema).iter_errors(dashboard))


def test_the_serving_dashboard_asks_for_what_the_endpoint_exports() -> None:
    exported = set(re.findall(r"# TYPE (\w+)", Metrics().exposition()[0].decode()))
    assert asked_for("serving") <= exported
    assert len(asked_for("serving")) == 10


def test_the_runbook_watches_what_the_dashboards_show() -> None:
    text = (FOLDER.parents[1] / "docs/RUNBOOK.md").read_text()
    named = set(re.findall(r"`((?:ray_)?lora_diffusion_\w+[a-z])`", text))
    assert len(named) == 4
    assert named <= asked_for("serving") | asked_for("corpus") | asked_for("training")


@pytest.mark.ray
def test_the_dashboards_of_jobs_ask_for_what_rays_exporter_gives_and_nobody_is_named(
    ray_local: None, capsys: pytest.CaptureFixture[str]
) -> None:
    import ray

    key = bytes(32)
    observer = CorpusObserver("s3://bucket/corpus", key)
    observer.stage("embed", 0.5)
    observer.shard("00003", 14, {"Ada Lovelace": "no_face"}, 2.0)
    TrainingObserver("s3://bucket/run").report(REPORT)
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines() if line.startswith("{")]
    assert [line["event"] for line in lines] == ["failure", "shard", "training"]
    assert lines[0]["identity"] == keyed_hash(key, "Ada Lovelace").hex()
    assert "Ada" not in json.dumps(lines)

    node = ray.nodes()[0]
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    wanted, text = asked_for("corpus") | asked_for("training"), ""
    for _ in range(120):  # Ray's processes report every 10 s
        text = urllib.request.urlopen(url, timeout=10).read().decode()
        if wanted <= set(re.findall(r"# TYPE (\w+)", text)):
            break
        time.sleep(0.5)
    assert wanted <= set(re.findall(r"# TYPE (\w+)", text))
    assert re.search(r'ray_lora_diffusion_corpus_people_total{.*outcome="done".*} 14.0', text)
    assert "Ada" not in text
