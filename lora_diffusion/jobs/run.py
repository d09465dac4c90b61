"""One way to run a job: its options, what it refuses, Ctrl-C and exit codes.

    lora-diffusion corpus people=photos output=s3://bucket/corpus finetune.steps=60
    jobs/build_corpus.py configs/sd15.yaml --dry-run people=s3://bucket/people

Settings are words `key=value`, a YAML file is named with or without --config, and all stand in any order.

Exit code 0: everybody who was planned is done, or has a reason of their own in failures/. 1: refused, or stopped by a
fault that is nobody's own; one sentence on stderr says what came, what was expected and the way out. 3: a machine or a
process ended under the job. 130: Ctrl-C. After each the same command goes on (docs/reference/exit-codes.md).

Light: whatever a job needs is imported after its options are read.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import importlib.util
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, Protocol, cast

from lora_diffusion.extras import needs
from lora_diffusion.jobs.guard import guarded
from lora_diffusion.jobs.noise import without_noise
from lora_diffusion.jobs.watch import PATIENCE, said_after, watching_ray

STOPPED = "Stopped. The same command goes on."


@dataclass(frozen=True)
class Job:
    """module: a `JobModule`, whose docstring is the help. config: the YAML file of configs/ if none is named. extra: of this
    package, which brings what the job imports. claims: the setting of what it writes to, for which it must be the only driver.
    first: the key of a word that is neither a setting nor a YAML file."""

    name: str
    module: str
    config: str | None = None
    extra: str = "ray"
    claims: str = "output"
    first: str = ""


class JobModule(Protocol):
    """What a job consists of. Both functions raise ValueError or OSError, or one of the module's USER_ERRORS, for what a user can
    mend; LESS_MEMORY says what the job could be asked to hold less of. Paths in `config` are addresses."""

    Config: type[Any]

    def dry_run(self, config: Any) -> str:
        """What `run` would do, in words. Writes, fetches and starts nothing."""
        ...

    def run(self, config: Any, ray_address: str) -> None: ...


JOBS = {
    job.name: job
    for job in (
        Job("corpus", "lora_diffusion.jobs.corpus", "tiny.yaml"),
        Job("train", "lora_diffusion.jobs.train", "train_tiny.yaml"),
        Job("evaluate", "lora_diffusion.jobs.evaluate", "evaluate.yaml"),
        Job("ablate", "lora_diffusion.jobs.ablate", "ablate.yaml", claims="evaluation.output"),
        Job("publish", "lora_diffusion.jobs.publish"),
        Job("import-weights2weights", "lora_diffusion.jobs.import_weights2weights", first="weights"),
        Job("export", "lora_diffusion.jobs.export", extra="torch", first="corpus"),
        Job("serve", "lora_diffusion.jobs.serve", "serve_tiny.yaml", "serve"),
    )
}


def main(name: str, words: Sequence[str] | None = None) -> int:
    """A job in this process; returns the exit code."""
    return run_job(JOBS[name], words)


def command(name: str, words: Sequence[str] | None = None) -> int:
    """A job as a command of its own: one that uses Ray runs in a child, since Ray may end it without a word."""
    work = partial(main, name, words)
    return guarded(name, work) if JOBS[name].extra == "ray" else work()


def run_job(job: Job, words: Sequence[str] | None = None) -> int:
    """Run it with the words of a command line; returns the exit code."""
    module = None
    try:
        options = read_options(job, sys.argv[1:] if words is None else words)
        from lora_diffusion.config import load_config, placed, to_yaml

        with needs(job.extra):
            module = cast(JobModule, importlib.import_module(job.module))
            given = load_config(module.Config, options.config, options.overrides)
            config = placed(given)
            check_places(config)
            if options.dry_run:
                print(to_yaml(given))
                print(module.dry_run(config))
            elif job.extra == "ray":
                with without_noise(), claims(job, config), watching_ray(job.name):
                    module.run(config, options.ray_address)
            else:
                with without_noise():
                    module.run(config, options.ray_address)
        return 0
    except KeyboardInterrupt:
        return stopped(job.name)
    except Exception as error:
        from lora_diffusion.jobs.causes import explain, gone

        mend = explain(error, getattr(module, "USER_ERRORS", ()), getattr(module, "LESS_MEMORY", ""))
        sentence = mend or gone(error)
        if sentence is None:
            raise
        print(f"{job.name}: {sentence}", file=sys.stderr)
        return 1 if mend else 3


def stopped(name: str) -> int:
    """The exit code of Ctrl-C, which is said in a line below the terminal's ^C."""
    print(f"{chr(10) * sys.stderr.isatty()}{name}: {STOPPED}", file=sys.stderr)
    return 130


def check_places(config: Any) -> None:
    """Every bucket answers and every output can be written, before anything begins. Raises StoreError."""
    from lora_diffusion.config import places
    from lora_diffusion.storage import open_store

    stores = {
        (store.root.partition("/")[0] if not store.local else store.root): store
        for _, address, output in places(config)
        if not (store := open_store(address, attempts=2, read_seconds=PATIENCE)).local or output
    }
    for store in stores.values():
        endpoint = os.environ.get("AWS_ENDPOINT_URL")
        with said_after(PATIENCE, f"waiting for {store.uri}{f' at {endpoint}' if endpoint else ''}: no answer yet"):
            store.check()


@contextmanager
def claims(job: Job, config: Any) -> Iterator[None]:
    """Be the only driver of the job's output inside of the block."""
    from lora_diffusion.config import places
    from lora_diffusion.jobs.claim import claimed

    with ExitStack() as stack:
        for key, address, _ in places(config):
            if key == job.claims:
                stack.enter_context(claimed(address, job.name))
        yield


@dataclass(frozen=True)
class Options:
    config: Path | None
    overrides: list[str]
    dry_run: bool
    ray_address: str


def read_options(job: Job, words: Sequence[str]) -> Options:
    """Raises ValueError for words that are no settings; ends the process for --help."""
    parser = _Parser(
        prog=f"lora-diffusion {job.name}",
        description=help_of(job),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    default = f" (default: configs/{job.config})" if job.config else ""
    parser.add_argument("words", nargs="*", metavar="key=value", help="a setting, such as limit=64; or a YAML file")
    parser.add_argument("--config", action="append", default=[], metavar="FILE", help=f"a YAML file{default}")
    parser.add_argument("--dry-run", action="store_true", help="print configuration, plan and cost; touch nothing")
    parser.add_argument(
        "--ray-address",
        default=os.environ.get("RAY_ADDRESS") or "local",
        help="a running Ray: auto or HOST:PORT (default: RAY_ADDRESS, or else start one on this machine)",
    )
    args = parser.parse_intermixed_args([word for word in words if word != "--"])
    files, overrides = list(args.config), []
    for word in args.words:
        if re.match(r"[A-Za-z_][\w.-]*\s*=", word):
            overrides.append(word)
        elif word.endswith((".yaml", ".yml")):
            files.append(word)
        elif job.first and not any(setting.startswith(f"{job.first}=") for setting in overrides):
            overrides.append(f"{job.first}={word}")
        else:
            raise ValueError(f"{word!r} is neither a setting (key=value, such as finetune.steps=80) nor a YAML file")
    if len(files) > 1:
        raise ValueError(f"one configuration at a time, not {' and '.join(files)}: settings may follow it as key=value")
    if job.config:
        files.append(f"configs/{job.config}")
    return Options(Path(files[0]) if files else None, overrides, args.dry_run, args.ray_address)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        unknown = re.search(r"unrecognized arguments: --?([^\s=]+)(?:[= ](\S+))?", message)
        if unknown:
            key = unknown[1].replace("-", "_")
            message = f"there is no option --{unknown[1]}: settings are written {key}={unknown[2] or '...'}"
        raise ValueError(f"{message}; --help lists the options")


def help_of(job: Job) -> str:
    """The module's docstring, read from its source: importing it would take seconds."""
    if job.module in sys.modules:
        return sys.modules[job.module].__doc__ or ""
    spec = importlib.util.find_spec(job.module)
    source = Path(spec.origin).read_text(encoding="utf-8") if spec and spec.origin else ""
    return ast.get_docstring(ast.parse(source)) or ""
