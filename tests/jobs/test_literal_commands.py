"""The README's lines for one machine, as they stand, against the Ray that `ray start --head` starts.

They run in namespaces of their own: Ray's usual ports are free there, and `ray stop`, which ends every Ray that it can see, sees
this one alone. The README's configuration makes 40 people, which takes minutes; so 32 of them are in the corpus already.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from low_rank_corpus import write_corpus

from lora_diffusion.config import load_config
from lora_diffusion.corpus import CorpusReader
from lora_diffusion.factory.config import CorpusConfig
from lora_diffusion.factory.make import LoRAMaker
from lora_diffusion.jobs.noise import NOISE
from lora_diffusion.storage import open_store
from lora_diffusion.world.people import SPLITS, sample_person

ROOT = Path(__file__).parents[2]
ALONE = ["unshare", "--map-root-user", "--pid", "--fork", "--net", "--mount-proc", "--kill-child"]
LINES = [
    "export RAY_AUTH_MODE=token",
    "ray get-auth-token --generate > /dev/null",
    "ray start --head",
    "ray job submit jobs/build_corpus.py",
    "ray job submit jobs/train.py",
    "serve run serve/app.py",
]
ASK = """
import httpx, time
while True:
    time.sleep(1)
    try:
        if httpx.get("http://127.0.0.1:8000/readyz").status_code == 200: break
    except httpx.TransportError: pass
file = httpx.post("http://127.0.0.1:8000/v1/loras", files={"photo": open("tests/data/faces/80000-0.png", "rb")}, timeout=60)
print("answered", file.status_code, len(file.content))
"""
SCRIPT = """
set -m  # or Ctrl-C would not reach what is in the background
ip link set lo up
{first}
for line in "ray job submit jobs/build_corpus.py" "ray job submit jobs/train.py"; do
  echo "== $line"; $line 2>&1; echo "code $?"
done
echo "== serve run serve/app.py"
serve run serve/app.py 2>&1 & SERVE=$!
timeout 120 python -c '{ask}'
kill -INT $SERVE; wait $SERVE
echo "== ray stop"
ray stop > /dev/null
for second in $(seq 30); do [ "$(ps -e -o comm= | grep -vxc -e bash -e ps -e grep)" = 0 ] && break; sleep 1; done
ps -e -o pid=,comm=
"""


def can_be_alone() -> bool:
    return (
        bool(shutil.which("unshare") and shutil.which("ip"))
        and not subprocess.run([*ALONE, "true"], capture_output=True).returncode
    )


@pytest.fixture
def home() -> Iterator[Path]:
    """Short: Ray's socket paths end at 107 characters."""
    folder = Path(tempfile.mkdtemp(prefix="ray"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def checkout(home: Path) -> Path:
    """A copy of what git tracks, with a corpus of 32 people of the 40."""
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    subprocess.run(["xargs", "-0", "cp", "-P", "--parents", "-t", home], cwd=ROOT, input=names, check=True)
    config = load_config(CorpusConfig, "configs/tiny.yaml")
    maker = LoRAMaker(config)
    made = maker.manifest()
    write_corpus(
        open_store(home / config.output),
        32,
        maker.layout,
        names=[sample_person(number).name for number in SPLITS["corpus"][:32]],
        base=made.base,
        recogniser=made.recogniser,
        recipe=made.recipe,
        consent=True,
    )
    return home


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.skipif(not can_be_alone(), reason="no namespaces here, and `ray stop` would end other people's Ray")
def test_the_readmes_lines_run_as_they_stand_without_noise_and_leave_no_process(checkout: Path) -> None:
    block = next(
        text for text in re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.S) if LINES[2] in text
    )
    assert [line.partition("  #")[0].strip() for line in block.splitlines()] == LINES
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    env |= {
        "HOME": str(checkout),
        "RAY_TMPDIR": str(checkout),
        "PYTHONPATH": str(checkout),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_worker_niceness": "0",
        "RAY_memory_monitor_refresh_ms": "0",  # what else runs on this machine is no matter here
    }
    env |= {"PATH": f"{Path(sys.executable).parent}:{env['PATH']}", "COLUMNS": "200"}
    script = SCRIPT.format(first="\n".join(LINES[:3]), ask=ASK)
    done = subprocess.run(
        [*ALONE, "bash", "-c", script], cwd=checkout, env=env, capture_output=True, text=True, timeout=850
    )
    said = dict(zip(*[iter(re.split(r"^== (.*)\n", done.stdout, flags=re.M)[1:])] * 2, strict=True))
    for line, last in ((LINES[3], "40 people done, 0 failed"), (LINES[4], "synthesiser: ")):
        assert said[line].endswith("code 0\n"), said[line]
        job = said[line].partition("Running entrypoint")[2]
        assert last in job, job
        noise = [
            text for text in job.splitlines() if re.search(r"core_worker\.cc|WARNING|\b[WE] \d+ \d+\]|\(pid=", text)
        ]
        assert not noise
        assert not any(text.decode() in job for text in NOISE)
    assert "32 people" not in said[LINES[3]]
    assert "answered 201" in said[LINES[5]], said[LINES[5]] + done.stderr
    assert len(CorpusReader(checkout / "runs/tiny/corpus")) == 40
    left = {line.split()[1] for line in said["ray stop"].splitlines()}
    assert left <= {"bash", "ps"}, "`ray stop` leaves no process"
