"""The parts of a self-contained HTML page: no script, no request to anywhere, every text escaped."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence

from nautilus.eval.charts import DARK, LIGHT

# Control characters would end the text or do nothing visible; their pictures (U+2400 on) show what was there.
CONTROLS = {code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n"} | {0x7F: 0x2421}

CSS = """
:root { color-scheme: light dark; --font: system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif;
  --mono: ui-monospace, "SF Mono", "Cascadia Code", Menlo, Consolas, "DejaVu Sans Mono", monospace; LIGHT }
@media (prefers-color-scheme: dark) { :root { DARK } }
* { box-sizing: border-box }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.55 var(--font); }
main, header, footer { max-width: 74rem; margin: 0 auto; padding: 0 clamp(1rem, 3vw, 2rem) }
header { padding-top: clamp(1.5rem, 5vw, 3.5rem) }
footer { padding-block: 1rem 3rem; color: var(--muted); font-size: .875rem }
h1 { font-size: clamp(1.7rem, 5vw, 2.5rem); line-height: 1.15; letter-spacing: -.02em; margin: 0 0 .4rem;
  overflow-wrap: anywhere }
h2 { font-size: 1.35rem; letter-spacing: -.01em; margin: 3rem 0 .25rem; scroll-margin-top: 1rem }
h3 { font-size: 1rem; margin: 0 }
p { margin: .25rem 0 1rem; max-width: 46rem }
.lead { font-size: 1.1rem; color: var(--muted) }
.quiet { color: var(--muted) }
a { color: var(--one) }
:focus-visible { outline: 3px solid var(--two); outline-offset: 2px; border-radius: 4px }
nav { display: flex; flex-wrap: wrap; gap: .25rem 1.2rem; margin-top: 1rem; font-size: .95rem }
.grid { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 27rem), 1fr)) }
.narrow { grid-template-columns: repeat(auto-fit, minmax(min(100%, 21rem), 1fr)) }
.wide { grid-column: 1 / -1 }
.wide > details { margin: 0 }
.card { background: var(--card); border: 1px solid var(--grid); border-radius: 12px; padding: 1rem 1.15rem; margin: 0;
  min-width: 0 }
.tiles { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 10.5rem), 1fr));
  margin: 1.5rem 0 1rem }
.tiles dt { color: var(--muted); font-size: .875rem }
.tiles dd { margin: 0; font-size: 1.65rem; font-weight: 650; line-height: 1.25; letter-spacing: -.015em;
  font-variant-numeric: tabular-nums }
.tiles dd + dd { font-size: .84rem; font-weight: 400; letter-spacing: 0; color: var(--muted); line-height: 1.4 }
.best { border-color: var(--one); box-shadow: inset 0 3px 0 var(--one) }
figure > p { color: var(--muted); font-size: .9rem; margin: .1rem 0 .6rem }
svg { display: block; width: 100%; max-width: 31rem; height: auto; margin: 0 auto; overflow: visible }
svg * { stroke-linejoin: round; stroke-linecap: butt }
svg image { image-rendering: pixelated }
details { font-size: .875rem; margin-top: .5rem }
summary { cursor: pointer; color: var(--muted); width: fit-content }
.scroll { overflow-x: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: .5rem 0; min-width: 50% }
caption { text-align: left; color: var(--muted); padding-bottom: .3rem }
th, td { text-align: right; padding: .28rem .9rem .28rem 0; border-bottom: 1px solid var(--grid); white-space: nowrap }
th:first-child, td:first-child { text-align: left }
td:first-child { white-space: normal; overflow-wrap: anywhere; min-width: 6rem }
th:first-child, td:first-child { padding-right: 1.2rem }
thead th { color: var(--muted); font-weight: 500 }
.words th { text-align: left }
.words td { text-align: left; white-space: pre-wrap; overflow-wrap: anywhere }
tr.strong td { font-weight: 650 }
.strip { display: flex; flex-wrap: wrap; gap: 3px; padding: 0; margin: .75rem 0; list-style: none }
.strip li { flex: 0 1 auto; min-width: 1.7rem; padding: .3rem .35rem; border-radius: 5px; text-align: center;
  font: 600 .9rem/1.2 var(--mono); color: var(--card); background: var(--pale) }
.strip .gap { background: none; color: var(--muted); font: .8rem/1.5 var(--font); padding-inline: .6rem }
.legend { display: grid; grid-template-columns: auto 1fr; gap: .35rem .75rem; align-items: baseline; margin: 0;
  font-size: .9rem }
.legend dt { margin: 0 } .legend dd { margin: 0; overflow-wrap: anywhere }
.legend .strip { margin: 0 }
.strip .Mamba-2 { background: var(--one) } .strip .attention { background: var(--two) }
.strip .experts { background: var(--three) } .strip .MLP { background: var(--four) }
.strip .linear { background: var(--muted) }
pre, code { font-family: var(--mono); font-size: .875rem }
pre { margin: .5rem 0; white-space: pre-wrap; overflow-wrap: anywhere }
.sample pre { font-size: .9rem; line-height: 1.5; max-height: 32rem; overflow-y: auto; unicode-bidi: isolate }
.sample p { font-size: .875rem; margin: .5rem 0 0 }
.sample b { font-weight: 700; background: color-mix(in srgb, var(--one) 14%, transparent); border-radius: 3px }
.notes { border-left: 4px solid var(--two); padding: .6rem 1rem; background: var(--card); border-radius: 0 8px 8px 0;
  margin: 1rem 0 }
.notes ul { margin: 0; padding-left: 1.2rem }
@media print { body { background: none } .card { break-inside: avoid } nav { display: none } }
"""


def plain(value: object) -> str:
    """Any value as characters that may stand in a UTF-8 page: half a surrogate pair becomes a question mark."""
    return str(value).encode(errors="replace").decode().translate(CONTROLS)


def text(value: object) -> str:
    """Any value as the text of a page, safe between tags and inside quotes."""
    return html.escape(plain(value))


def page(title: str, body: str) -> str:
    """The whole document. Its policy forbids it to load anything, should some text slip through unescaped."""
    css = CSS.replace("LIGHT", variables(LIGHT)).replace("DARK", variables(DARK))
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<title>{text(title)}</title>
<style>{css}</style>
</head>
<body>
{body}
</body>
</html>
"""


def variables(colours: dict[str, str]) -> str:
    return " ".join(f"--{name}: {colour};" for name, colour in colours.items())


def section(name: str, title: str, *parts: str) -> str:
    return f'<section aria-labelledby="{name}">\n<h2 id="{name}">{text(title)}</h2>\n{"".join(parts)}\n</section>\n'


def grid(*parts: str, kind: str = "") -> str:
    return f'<div class="grid {kind}">{"".join(parts)}</div>'


def paragraph(words: str, kind: str = "") -> str:
    return f'<p class="{kind}">{text(words)}</p>' if kind else f"<p>{text(words)}</p>"


def table(head: Sequence[str], rows: Sequence[Sequence[object]], *, kind: str = "", strong: int | None = None) -> str:
    """A table that scrolls sideways on a narrow screen. Numbers are shortened; row `strong` is set in bold."""
    top = "".join(f'<th scope="col">{text(name)}</th>' for name in head)
    lines = [
        f"<tr{' class=strong' if i == strong else ''}>{''.join(f'<td>{text(number(c))}</td>' for c in row)}</tr>"
        for i, row in enumerate(rows)
    ]
    style = f' class="{kind}"' if kind else ""
    heading = f"<thead><tr>{top}</tr></thead>" if head else ""
    return f'<div class="scroll" tabindex="0"><table{style}>{heading}<tbody>{"".join(lines)}</tbody></table></div>'


def folded(title: str, inside: str, *, shown: bool = False) -> str:
    return f"<details{' open' if shown else ''}><summary>{text(title)}</summary>{inside}</details>"


def chart(title: str, says: str, picture: str | None, data: str) -> str:
    """A figure: what it shows in words, the picture, and its numbers, folded away unless the picture is missing."""
    image = f'<div role="img" aria-label="{text(f"{title}. {says}")}">{picture}</div>' if picture else ""
    numbers = folded("Numbers", data, shown=not picture)
    return f'<figure class="card"><h3>{text(title)}</h3><p>{text(says)}</p>{image}{numbers}</figure>'


def card(*parts: str, kind: str = "") -> str:
    return f'<div class="card {kind}">{"".join(parts)}</div>'


def absent(title: str, why: str) -> str:
    return card(f"<h3>{text(title)}</h3>", paragraph(why, "quiet"))


def tiles(entries: Sequence[tuple[str, str, str]], best: str = "") -> str:
    """Headline numbers: (what, number, remark)."""
    cells = [
        f'<div class="card{" best" if what == best else ""}"><dt>{text(what)}</dt><dd>{text(value)}</dd>'
        f"<dd>{text(remark)}</dd></div>"
        for what, value, remark in entries
    ]
    return f'<dl class="tiles">{"".join(cells)}</dl>'


def number(value: object) -> object:
    """A float to four figures, a large whole number with its thousands apart, anything else as it is."""
    if isinstance(value, float):
        if math.isfinite(value) and value.is_integer() and abs(value) < 1e15:
            return f"{int(value):,}"
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else value


def amount(value: float) -> str:
    """12.3 M and the like, to three figures."""
    for size, unit in ((1e12, " T"), (1e9, " B"), (1e6, " M"), (1e3, " k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def duration(seconds: float) -> str:
    """4.2 s, 11.5 min, 3.1 h, 2.4 d."""
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.3g} s"
