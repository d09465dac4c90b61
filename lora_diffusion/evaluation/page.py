"""A plain, readable HTML page from parts: cards, tables, figures. No scripts, nothing loaded from elsewhere."""

from __future__ import annotations

import base64
import html
from collections.abc import Collection, Mapping, Sequence

STYLE = """
:root { --ink: #1f2933; --muted: #616e7c; --line: #e4e7eb; --accent: #e8590c; }
* { box-sizing: border-box; }
body { margin: 0; color: var(--ink); background: #f7f8fa; font: 15px/1.55 system-ui, -apple-system, "Segoe UI", sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 40px 24px 80px; }
h1 { font-size: 30px; line-height: 1.2; margin: 0 0 6px; letter-spacing: -0.01em; }
h2 { font-size: 19px; margin: 0 0 14px; }
.subtitle { color: var(--muted); margin: 0 0 28px; }
section { background: #fff; border: 1px solid var(--line); border-radius: 12px; padding: 22px 24px; margin: 0 0 22px; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(210px, 1fr)); gap: 14px; }
.card { border: 1px solid var(--line); border-radius: 10px; padding: 14px 16px; }
.card b { display: block; font-size: 30px; line-height: 1.15; color: var(--accent); font-variant-numeric: tabular-nums; }
.card small { display: block; color: var(--muted); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: 13.5px; }
th { color: var(--muted); font-weight: 600; text-align: right; vertical-align: bottom; font-size: 12px; }
th, td { padding: 7px 10px; border-bottom: 1px solid var(--line); white-space: nowrap; text-align: right; }
th { white-space: normal; }
th:first-child, td:first-child { text-align: left; }
td small { display: block; color: var(--muted); font-size: 11.5px; }
tr.strong td { background: #fff4ec; font-weight: 600; }
figure { margin: 18px 0 4px; }
figure img { max-width: 100%; height: auto; display: block; margin: 0 auto; }
figcaption, .note { color: var(--muted); font-size: 13px; margin-top: 8px; }
pre { overflow-x: auto; font-size: 12px; line-height: 1.45; background: #f7f8fa; padding: 14px; border-radius: 8px; }
summary { cursor: pointer; color: var(--muted); }
"""


def page(title: str, subtitle: str, sections: Sequence[str]) -> str:
    return (
        f"<!doctype html><html lang='en'><head><meta charset='utf-8'><meta name='viewport' content='width=device-width'>"
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head><body><main><h1>{html.escape(title)}</h1>"
        f"<p class='subtitle'>{html.escape(subtitle)}</p>{''.join(sections)}</main></body></html>\n"
    )


def embedded(pictures: Mapping[str, bytes]) -> dict[str, str]:
    """PNGs as data URLs."""
    return {name: f"data:image/png;base64,{base64.b64encode(data).decode()}" for name, data in pictures.items()}


def section(title: str, content: str) -> str:
    """`content` is HTML."""
    return f"<section><h2>{html.escape(title)}</h2>{content}</section>"


def card(value: str, note: str, spread: str) -> str:
    return (
        f"<div class='card'><b>{html.escape(value)}</b><small>{html.escape(spread)}</small>"
        f"<div>{html.escape(note)}</div></div>"
    )


def figure(source: str, caption: str) -> str:
    return f"<figure><img alt='' src='{source}'><figcaption>{html.escape(caption)}</figcaption></figure>"


def table(head: Sequence[str], rows: Sequence[Sequence[str]], strong: Collection[int] = ()) -> str:
    """Cells are HTML; rows whose number is in `strong` stand out."""
    header = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
    body = "".join(
        f"<tr{' class=strong' if i in strong else ''}>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>"
        for i, row in enumerate(rows)
    )
    return f"<div class='scroll'><table><thead><tr>{header}</tr></thead><tbody>{body}</tbody></table></div>"
