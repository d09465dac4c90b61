"""What the hub answers is said in a sentence with the way out, against an HTTP server that answers as it does."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from s3_server import free_port

ANSWERS = {"/gated/": (403, "GatedRepo"), "/gone/": (401, "RepoNotFound")}
SCRIPT = """
from lora_diffusion.models.loading import load_parts
for name in ("gated/model", "gone/model"):
    try: load_parts(name)
    except ValueError as error: print(error)
"""


class Hub(BaseHTTPRequestHandler):
    def do_HEAD(self) -> None:
        status, code = next(answer for path, answer in ANSWERS.items() if path in self.path)
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_HEAD

    def log_message(self, *_: object) -> None:
        pass


def ask(endpoint: str, folder: Path, script: str = SCRIPT, **more: str) -> str:
    env = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(folder), **more}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script], env=env, capture_output=True, text=True, timeout=250
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_gated_private_and_unreachable_models_are_refused_with_the_way_out(tmp_path: Path) -> None:
    server = HTTPServer(("127.0.0.1", free_port()), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    gated, gone = ask(f"http://127.0.0.1:{server.server_port}", tmp_path).splitlines()
    server.shutdown()
    assert "the hub gives it to those who accepted its terms: do so at https://huggingface.co/gated/model" in gated
    assert "the hub has no model of this name, or a private one" in gone
    offline = ask("http://127.0.0.1:9", tmp_path, HF_HUB_OFFLINE="1")
    assert "the hub cannot be reached: where it can, `hf download gated/model --local-dir FOLDER`" in offline
