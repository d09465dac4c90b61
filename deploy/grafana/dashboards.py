#!/usr/bin/env python
"""Write the Grafana dashboards beside this file: serving.json, corpus.json, training.json. Import them, or let Grafana provision the folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
P, R = (
    "lora_diffusion",
    "ray_lora_diffusion",
)  # the endpoint's own names; Ray's exporter puts `ray_` before those of jobs
BY_RUN = '{run=~"$run"}'


def quantile(q: float, name: str, by: str, only: str = "") -> str:
    return f"histogram_quantile({q}, sum by (le, {by}) (rate({name}_bucket{only}[5m])))"


def mean(name: str, by: str) -> str:
    return f"sum by ({by}) (rate({name}_sum[5m])) / sum by ({by}) (rate({name}_count[5m]))"


# dashboard -> (title, expression, legend, unit) of each panel
PANELS: dict[str, list[tuple[str, str, str, str]]] = {
    "serving": [
        ("Answers", f"sum by (route, status) (rate({P}_requests_total[5m]))", "{{route}} {{status}}", "reqps"),
        ("Share of 5xx", f'(sum(rate({P}_requests_total{{status=~"5.."}}[5m])) or vector(0)) / sum(rate({P}_requests_total[5m]))', "", "percentunit"),
        ("Time to answer, 95 %", quantile(0.95, f"{P}_request_seconds", "route"), "{{route}}", "s"),
        ("Wait in a stage's queue, 95 %", quantile(0.95, f"{P}_stage_wait_seconds", "stage"), "{{stage}}", "s"),
        ("Work of a stage, 95 %", quantile(0.95, f"{P}_stage_work_seconds", "stage"), "{{stage}}", "s"),
        ("Requests in a batch, mean", mean(f"{P}_stage_batch_size", "stage"), "{{stage}}", "short"),
        ("Requests in flight", f"sum({P}_requests_in_flight)", "", "short"),
        ("LoRAs in memory", f"sum({P}_library_loras)", "", "short"),
        ("Their bytes", f"sum({P}_library_bytes)", "", "bytes"),
        ("Until a LoRA is kept, 95 %", quantile(0.95, f"{P}_library_put_seconds", "instance"), "{{instance}}", "s"),
        ("Refusals and failures", f"sum by (reason) (rate({P}_problems_total[5m]))", "{{reason}}", "reqps"),
    ],
    "corpus": [
        ("People a second", f"sum by (run, outcome) (rate({R}_corpus_people_total{BY_RUN}[10m]))", "{{run}} {{outcome}}", "short"),
        ("People answered", f"sum by (run, outcome) ({R}_corpus_people_total{BY_RUN})", "{{run}} {{outcome}}", "short"),
        ("Without a LoRA, by reason", f"sum by (reason) ({R}_corpus_failures_total{BY_RUN})", "{{reason}}", "short"),
        ("Time of a shard, median", quantile(0.5, f"{R}_corpus_shard_seconds", "stage", BY_RUN), "{{stage}}", "s"),
        ("Time of a shard, 95 %", quantile(0.95, f"{R}_corpus_shard_seconds", "stage", BY_RUN), "{{stage}}", "s"),
    ],
    "training": [
        ("Step", f"max by (run, stage) ({R}_training_step{BY_RUN})", "{{run}} {{stage}}", "short"),
        ("Loss", f"max by (run, stage) ({R}_training_loss{BY_RUN})", "{{run}} {{stage}}", "short"),
        ("Validation loss", f"max by (run, stage) ({R}_training_validation_loss{BY_RUN})", "{{run}} {{stage}}", "short"),
        ("Rows a second", f"max by (run, stage) ({R}_training_rows_per_second{BY_RUN})", "{{run}} {{stage}}", "short"),
        ("Waiting for data", f"max by (run, stage) ({R}_training_waiting_for_data{BY_RUN})", "{{run}} {{stage}}", "percentunit"),
        ("Time left", f"max by (run, stage) ({R}_training_seconds_left{BY_RUN})", "{{run}} {{stage}}", "s"),
    ],
}  # fmt: skip


def dashboard(name: str) -> dict[str, Any]:
    source = {"type": "prometheus", "uid": "${source}"}
    variables: list[dict[str, Any]] = [
        {"name": "source", "type": "datasource", "query": "prometheus", "label": "Prometheus"}
    ]
    if name != "serving":
        metric = {"corpus": f"{R}_corpus_people_total", "training": f"{R}_training_step"}[name]
        query = f"label_values({metric}, run)"
        run = {"name": "run", "type": "query", "query": query, "datasource": source, "refresh": 2}
        variables.append({**run, "multi": True, "includeAll": True, "allValue": ".*"})
    panels = [
        {
            "id": i + 1,
            "type": "timeseries",
            "title": title,
            "datasource": source,
            "gridPos": {"x": i % 3 * 8, "y": i // 3 * 8, "w": 8, "h": 8},
            "fieldConfig": {"defaults": {"unit": unit, "min": 0}, "overrides": []},
            "targets": [{"refId": "A", "expr": expression, "legendFormat": legend or title, "datasource": source}],
        }
        for i, (title, expression, legend, unit) in enumerate(PANELS[name])
    ]
    about = {"uid": f"lora-diffusion-{name}", "title": f"LoRA Diffusion: {name}", "tags": ["lora-diffusion"]}
    times = {"time": {"from": "now-3h", "to": "now"}, "refresh": "30s", "schemaVersion": 39, "editable": True}
    return {**about, **times, "templating": {"list": variables}, "panels": panels}


if __name__ == "__main__":
    for name in PANELS:
        (HERE / f"{name}.json").write_text(json.dumps(dashboard(name), indent=1) + "\n")
