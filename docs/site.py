"""What `mkdocs` needs to know of this repository (hooks of mkdocs.yml).

Pages lie where their files lie in the repository, so that a link between documents is the same on GitHub and on the site.
Besides the Markdown files these become pages: notebooks, and each other file that a document links to, as highlighted text.
After the build every link, picture and script is looked up: none may lead nowhere, or to another machine.
"""

from __future__ import annotations

import base64
import html
import json
import posixpath
import re
import subprocess
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

from lora_diffusion import _PUBLIC

ROOT = Path(__file__).resolve().parents[1]
API = "docs/reference/api.md"
KEYS = "docs/reference/configuration.md"
SHIM = "docs/iframe-worker.js"
LINK = re.compile(r"(?<!\\)\]\(([^)#\s:]+)((?:#[^)\s]*)?)\)")
PICTURE = re.compile(r"<picture>.*?srcset=\"([^\"]+)\".*?<img src=\"([^\"]+)\" alt=\"([^\"]*)\".*?</picture>", re.S)
SOURCES = {"examples/04_everywhere.py"}  # pages although no document needs to link to them
PAGES = (".md", ".jpg", ".png", ".svg", ".html")  # what mkdocs takes as it is
LANGUAGES = {".py": "python", ".json": "json", ".yaml": "yaml", ".yml": "yaml", ".toml": "toml", ".sh": "bash"}


def tracked() -> list[str]:
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    return [name for name in names if name and (ROOT / name).exists()]


def on_files(files: Files, config: Any) -> Files:
    """All pages, pictures and styles, at their places in the repository; and mkdocs' own files."""
    kept = Files([file for file in files if not (ROOT / "docs" / file.src_uri).exists()])
    names = tracked()
    documents = [name for name in names if name.endswith(".md")]
    pictures = [
        name for name in names if name.endswith((".jpg", ".png", ".svg")) and name.startswith(("docs/", "examples/"))
    ]
    for name in [*documents, *pictures, "docs/site.css", SHIM]:
        kept.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    for name in names:
        if name.endswith(".ipynb"):
            text, made = notebook(name)
            kept.append(File.generated(config, f"{name}.md", content=text))
            for picture, data in made.items():
                kept.append(File.generated(config, picture, content=data))
    linked = {target for name in documents for target in targets(name)}
    for name in sorted(linked | SOURCES):
        if (ROOT / name).is_file() and not name.endswith((*PAGES, ".ipynb")):
            kept.append(File.generated(config, f"{name}.md", content=as_page(name)))
    return kept


def targets(name: str) -> set[str]:
    """Files that a document links to, from the root of the repository."""
    found = LINK.findall((ROOT / name).read_text())
    return {posixpath.normpath(posixpath.join(posixpath.dirname(name), place)) for place, _ in found}


def as_page(name: str) -> str:
    text = (ROOT / name).read_text()
    return f"# {name}\n\n````{LANGUAGES.get(Path(name).suffix, 'text')}\n{text.rstrip()}\n````\n"


def notebook(name: str) -> tuple[str, dict[str, bytes]]:
    """A notebook as Markdown, and its pictures by their places."""
    parts, pictures = [], {}
    for i, cell in enumerate(json.loads((ROOT / name).read_text())["cells"]):
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        for k, output in enumerate(cell["outputs"]):
            data = output.get("data", {})
            picture = next((kind for kind in data if kind.startswith("image/")), None)
            if picture:
                place = f"{name}.files/{i}-{k}.{picture.split('/')[1]}"
                pictures[place] = base64.b64decode(data[picture])
                parts.append(f"![what the cell above shows]({posixpath.relpath(place, posixpath.dirname(name))})")
            elif "text/html" in data:
                parts.append(
                    re.sub(r"\n\s*", "", re.sub(r"<style.*?</style>", "", "".join(data["text/html"]), flags=re.S))
                )
            else:
                text = "".join(output.get("text") or data.get("text/plain", ""))
                parts.append(f"```text\n{text.rstrip()}\n```")
    return "\n\n".join(parts) + "\n", pictures


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Links to files that became pages; pictures that differ in the dark; the reference from docstrings."""
    name = page.file.src_uri
    if name == API:
        for public, (module, attribute) in _PUBLIC.items():
            place = f"lora_diffusion.{module}.{attribute}"
            markdown = re.sub(rf"^(## {public}\n)", rf"\1\n::: {place}\n", markdown, flags=re.M)
        for client in ("Client", "AsyncClient"):
            markdown = re.sub(rf"^(## {client}\n)", rf"\1\n::: lora_diffusion.client.{client}\n", markdown, flags=re.M)

    if name == KEYS:
        markdown = re.sub(r"(?m)(?:^\|.*\n)+", r'<div class="keys" markdown>\n\n\g<0>\n</div>\n', markdown)
    # In a table GitHub wants \| in code, too; here the backslash would be seen.
    markdown = re.sub(
        r"(?m)^\|.*$", lambda row: re.sub(r"`[^`]*`", lambda m: m[0].replace("\\|", "|"), row[0]), markdown
    )

    def there(match: re.Match[str]) -> str:
        place = posixpath.normpath(posixpath.join(posixpath.dirname(name), match[1]))
        become = ".md" if not match[1].endswith(PAGES) and files.get_file_from_path(f"{place}.md") else ""
        return f"]({match[1]}{become}{match[2]})"

    both = r"![\3](\2#only-light)\n![\3](\1#only-dark)"
    return PICTURE.sub(both, LINK.sub(there, markdown))


def on_post_page(output: str, page: Any, config: Any) -> str:
    """The theme would fetch what lets its search work from files."""
    shim = posixpath.relpath(SHIM, posixpath.dirname(page.url) or ".")
    return output.replace("https://unpkg.com/iframe-worker/shim", shim)


def on_post_build(config: Any) -> None:
    """Raises PluginError for links that lead nowhere and for what would be loaded from elsewhere."""
    site, wrong = Path(config.site_dir), []
    pages = {path: path.read_text() for path in site.rglob("*.html") if path.name != "404.html"}
    ids = {path: set(re.findall(r"\bid=\"?([^\s\">]+)", text)) for path, text in pages.items()}
    for path, text in pages.items():
        without = re.sub(r"<(script|style|code|pre)\b[^>]*>.*?</\1>", "", text, flags=re.S)
        for kind, _, quoted, bare in re.findall(r"<(\w+)\b[^>]*?\b(href|src)=(?:\"([^\"]*)\"|([^\s>\"]+))", without):
            target = html.unescape(quoted or bare)
            if re.match(r"(https?:)?//", target):
                if kind != "a" and not re.search(r"rel=\"?canonical", text):
                    wrong.append(f"{path.relative_to(site)} loads {target}")
                continue
            if re.match(r"(data|mailto|javascript):", target):
                continue
            place, _, anchor = unquote(target).partition("#")
            there = (path.parent / place).resolve() if place else path
            there = there / "index.html" if there.is_dir() else there
            known = anchor in ("", "only-light", "only-dark", "__comments") or anchor in ids.get(there, {anchor})
            if not there.exists() or not known:
                wrong.append(f"{path.relative_to(site)} leads to {target}")
        wrong += [
            f"{path.relative_to(site)} loads {found}"
            for found in re.findall(r"<script[^>]*src=\"?(https?:[^\s\">]+)", text)
        ]
    if wrong:
        raise PluginError("\n".join(sorted(set(wrong))))
