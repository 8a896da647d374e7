"""One self-contained HTML page from the blocks of the chapters: no script, no link to anything outside."""

import base64
import html

from chapters import Block, Chapter, Code, Figure, Heading, Table, Text

STYLE = """
:root { color-scheme: light; --ink: #1c2430; --soft: #5a6675; --line: #dde2e8; --tint: #f5f7f9; --accent: #1f5fa8; }
* { box-sizing: border-box; }
body { margin: 0; background: #fff; color: var(--ink); font: 1.0625rem/1.6 Georgia, "Times New Roman", serif;
  -webkit-text-size-adjust: 100%; overflow-wrap: break-word; }
main { max-width: 46rem; margin: 0 auto; padding: 3rem 1.25rem 4rem; }
h1, h2, h3, nav, table, figcaption, .lead, footer { font-family: system-ui, -apple-system, "Segoe UI", Roboto,
  "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 2.1rem; line-height: 1.15; margin: 0 0 .75rem; letter-spacing: -.02em; }
h2 { font-size: 1.5rem; line-height: 1.25; margin: 3rem 0 .75rem; letter-spacing: -.01em; }
h3 { font-size: 1.0625rem; margin: 2.25rem 0 .5rem; }
p { margin: 0 0 1rem; }
.family { margin: 3.25rem 0 .2rem; color: var(--accent); font: .84rem/1.5 ui-monospace, "SF Mono", Menlo, Consolas,
  "DejaVu Sans Mono", monospace; }
.family + h2 { margin-top: 0; }
.lead { color: var(--soft); font-size: 1.0625rem; }
nav { margin: 1.5rem 0 0; padding: .75rem 1rem; background: var(--tint); border-radius: .4rem; font-size: .9375rem; }
nav a { color: var(--accent); text-decoration: none; margin-right: 1.25rem; white-space: nowrap; }
nav a:hover { text-decoration: underline; }
pre { background: var(--tint); border-radius: .4rem; padding: .9rem 1rem; overflow-x: auto; margin: 0 0 1.25rem;
  font: .84rem/1.5 ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
figure { margin: 1.5rem 0 1.75rem; }
.images { display: grid; grid-template-columns: repeat(auto-fit, minmax(17rem, 1fr)); gap: 1rem 1.5rem; }
img { display: block; width: 100%; max-width: 36rem; height: auto; }
figcaption { color: var(--soft); font-size: .875rem; line-height: 1.45; margin-top: .6rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .45rem .9rem .45rem 0; text-align: right; border-bottom: 1px solid var(--line); vertical-align: top; }
th:first-child, td:first-child { text-align: left; }
th { font-weight: 600; border-bottom: 2px solid var(--ink); vertical-align: bottom; }
th:last-child, td:last-child { padding-right: 0; }
td + td { white-space: nowrap; }
footer { margin-top: 3rem; padding-top: 1rem; border-top: 1px solid var(--line); color: var(--soft);
  font-size: .8125rem; }
@media (max-width: 34rem) { main { padding: 1.75rem 1rem 3rem; } h1 { font-size: 1.65rem; } h2 { font-size: 1.3rem; }
  body { font-size: 1rem; } pre { font-size: .67rem; margin: 0 -1rem 1.25rem; border-radius: 0; }
  table { font-size: .75rem; } th, td { padding-right: .4rem; } }
"""


def render(chapters: dict[str, tuple[Chapter, list[Block]]], footer: str) -> str:
    """The page."""
    nav = "".join(f'<a href="#{name}">{html.escape(c.title)}</a>' for name, (c, _) in chapters.items())
    body = "".join(
        f'<section id="{name}"><p class="family">difflayers.{name}</p><h2>{html.escape(c.title)}</h2>'
        f"{''.join(map(_block, blocks))}</section>"
        for name, (c, blocks) in chapters.items()
    )
    contents = f'<nav aria-label="Chapters">{nav}</nav>' if len(chapters) > 1 else ""
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>difflayers: quickstart</title><style>{STYLE}</style></head>
<body><main><h1>Inner problems as layers</h1>
<p class="lead">What this run of <code>examples/quickstart.py</code> did and measured. Every number on this page was
computed on this machine just now.</p>{contents}{body}<footer>{html.escape(footer)}</footer></main></body></html>
"""


def _block(block: Block) -> str:
    match block:
        case Text(text):
            return f"<p>{html.escape(text)}</p>"
        case Heading(text):
            return f"<h3>{html.escape(text)}</h3>"
        case Code(code):
            return f"<pre><code>{html.escape(code.strip())}</code></pre>"
        case Figure(paths, caption, alt):
            images = "".join(
                f'<img src="data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}" '
                f'alt="{html.escape(alt if i == 0 else "")}">'
                for i, path in enumerate(paths)
            )
            return f'<figure><div class="images">{images}</div><figcaption>{html.escape(caption)}</figcaption></figure>'
        case Table(header, rows, caption):
            head = "".join(f"<th>{html.escape(c)}</th>" for c in header)
            lines = "".join("<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in row) + "</tr>" for row in rows)
            table = f"<table><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table>"
            # outside of what scrolls, so that a wide table does not take its caption off the screen
            note = f"<figcaption>{html.escape(caption)}</figcaption>" if caption else ""
            return f'<figure><div class="scroll">{table}</div>{note}</figure>'
