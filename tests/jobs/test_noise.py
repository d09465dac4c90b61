"""What a job's terminal shows, and what not: tried on the file descriptor, where Ray's C++ writes."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from lora_diffusion.jobs.noise import _END, NOISE, without_noise


def test_only_the_noise_is_kept_out(capfd: pytest.CaptureFixture[str]) -> None:
    with without_noise():
        os.write(2, b"[2026 E 1 1] core_worker.cc:2465: Actor X " + NOISE[0] + b". If ...\nshard 3 is dam")
        os.write(2, b"aged\n")
        os.write(2, b"no newline at the end")
    os.write(2, b", and after it\n")
    assert capfd.readouterr().err == "shard 3 is damaged\nno newline at the end, and after it\n"


def test_an_error_comes_out_whole_and_the_descriptor_is_as_before(capfd: pytest.CaptureFixture[str]) -> None:
    def work() -> None:
        with without_noise():
            os.write(2, b"a line\r")
            raise ValueError("wrong")

    before = os.fstat(2).st_ino
    with pytest.raises(ValueError, match="wrong"):
        work()
    assert os.fstat(2).st_ino == before
    assert capfd.readouterr().err == "a line\r"


def test_what_a_child_says_comes_too_and_one_that_stays_holds_nobody_up(capfd: pytest.CaptureFixture[str]) -> None:
    with without_noise():
        subprocess.run(["sh", "-c", "echo hello >&2"], check=True)
        child = subprocess.Popen(["sleep", "60"])
    child.kill()
    child.wait()
    assert capfd.readouterr().err == "hello\n"
    assert len(_END) == 32


def test_a_job_goes_on_when_nobody_reads_its_errors_any_more() -> None:
    code = (
        "import os; from lora_diffusion.jobs.noise import without_noise\n"
        "with without_noise():\n"
        "    for _ in range(4000): os.write(2, b'x' * 99 + b'\\n')\n"
        "print('done')"
    )
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=writer, text=True, timeout=60)
    os.close(writer)
    assert done.stdout == "done\n"
