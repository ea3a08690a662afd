"""The comparison as one page that needs nothing but itself: pictures and styles are in it, scripts there are none."""
import base64
from html import escape
from typing import List

from .comparison import Comparison
from .plot import COLUMNS, draw, shown_panels
from .table import Table, config_table, measures_table, runs_table
from .wording import runs_text

STYLE = """
:root { color-scheme: light dark; --paper: #ffffff; --ink: #1f2328; --quiet: #59636e; --rule: #d7dce1;
  --stripe: #f6f8fa; --note: #fff5e0; --note-rule: #d4820f; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #15181c; --ink: #dde2e8; --quiet: #9aa4af; --rule: #343a41; --stripe: #1b1f24;
    --note: #2b2312; --note-rule: #d29922; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem clamp(1rem, 4vw, 2.5rem) 3rem; max-width: 80rem; background: var(--paper);
  color: var(--ink); font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .25rem; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; }
p { margin: .25rem 0; }
.quiet { color: var(--quiet); }
.notes { margin: 1.25rem 0; padding: .6rem 1rem; border-left: 4px solid var(--note-rule); background: var(--note); }
.notes ul { margin: .25rem 0; padding-left: 1.1rem; }
.scroll { overflow-x: auto; }
.scroll:focus-visible { outline: 2px solid var(--note-rule); }
table { position: relative; border-collapse: collapse; font-variant-numeric: tabular-nums; }
caption { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); white-space: nowrap; }
th, td { padding: .35rem .8rem; border-bottom: 1px solid var(--rule); text-align: left; vertical-align: top; }
thead th { border-bottom: 2px solid var(--rule); }
tbody tr:nth-child(odd) { background: var(--stripe); }
tbody th { font-weight: 500; }
.numbers th:not(:first-child), .numbers td { text-align: right; white-space: nowrap; }
.keys td { min-width: 6rem; }
code { font: .92em ui-monospace, SFMono-Regular, Menlo, monospace; overflow-wrap: anywhere; }
figure { margin: 0; }
img { display: block; width: 100%; height: auto; }
figcaption { color: var(--quiet); padding-top: .4rem; }
@media (max-width: 40rem) { th, td { padding: .3rem .45rem; font-size: .9rem; } }
"""
NARROW, DARK = '(max-width: 40rem)', '(prefers-color-scheme: dark)'
# The browser itself refuses whatever would have to be fetched.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
CURVES = 'Thick: the mean of all runs of a side; band: one standard deviation; thin: each run.'
MEASURES = 'A ratio is that of the means; a dash stands where there is no number, or where a ratio would say nothing.'


def report_of(comparison: Comparison) -> str:
    """
    Overview:
        Write the page.
    Arguments:
        - comparison (:obj:`Comparison`): What to show.
    Returns:
        - page (:obj:`str`): HTML.
    """
    title = f'KV cache: {escape(comparison.title)}'
    measures, runs, differences = measures_table(comparison), runs_table(comparison), config_table(comparison)
    baseline, *others = (side.name for side in comparison.sides)
    lead = runs_text(sum(len(side.runs) for side in comparison.sides))
    lead += f'; {_listed(others)} against {baseline}' if others else ' of one side'
    parts = [
        f'<h1>{title}</h1>', f'<p class="quiet">{escape(lead)}</p>',
        _notes(comparison),
        '<h2 id="measures">Measures</h2>', f'<p class="quiet">{MEASURES}</p>',
        _table(measures, 'numbers', 'measures'),
        '<h2 id="curves">Curves</h2>', _figure(comparison),
        '<h2 id="configs">Configs</h2>',
        _table(differences, 'keys', 'configs') if differences.rows else f'<p>{_no_differences(comparison)}</p>',
        '<h2 id="runs">Runs</h2>', _table(runs, 'numbers', 'runs'),
    ]
    return '\n'.join([
        '<!DOCTYPE html>', '<html lang="en">', '<head>', '<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f'<title>{title}</title>', f'<style>{STYLE}</style>', '</head>', '<body>', '<main>',
        *parts, '</main>', '</body>', '</html>', '',
    ])


def _notes(comparison: Comparison) -> str:
    lines = comparison.warnings + [f'{name} is left out: {why}' for name, why in comparison.left_out.items()]
    if not lines:
        return ''
    items = ''.join(f'<li>{escape(line)}</li>' for line in lines)
    return f'<section class="notes" aria-label="Warnings"><strong>Before you compare</strong><ul>{items}</ul></section>'


def _table(table: Table, kind: str, label: str) -> str:
    head = ''.join(f'<th scope="col">{escape(heading)}</th>' for heading in table.headings)
    body = ''.join(
        f'<tr><th scope="row">{_cell(row[0], kind)}</th>'
        + ''.join(f'<td>{_cell(cell, kind)}</td>' for cell in row[1:]) + '</tr>\n' for row in table.rows
    )
    return (f'<div class="scroll" role="region" tabindex="0" aria-labelledby="{label}"><table class="{kind}">'
            f'<caption>{escape(table.caption)}</caption>\n<thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></div>')


def _cell(text: str, kind: str) -> str:
    return f'<code>{escape(text)}</code>' if kind == 'keys' else escape(text)


def _figure(comparison: Comparison) -> str:
    panels = shown_panels(comparison)
    if not panels:
        return '<p>No run wrote a curve that is shown here.</p>'
    shown = '; '.join(f'{panel.title} against {panel.against}' for panel in panels)
    alt = f'Curves of {_listed([side.name for side in comparison.sides])}: {shown}.'
    sources = ''.join(
        f'<source media="{" and ".join(media)}" srcset="{_data(draw(comparison, dark, columns))}">\n'
        for media, dark, columns in (((NARROW, DARK), True, 1), ((NARROW,), False, 1), ((DARK,), True, COLUMNS))
    )
    return (f'<figure><picture>{sources}<img src="{_data(draw(comparison))}" alt="{escape(alt)}"></picture>'
            f'<figcaption>{CURVES}</figcaption></figure>')


def _data(png: bytes) -> str:
    return 'data:image/png;base64,' + base64.b64encode(png).decode('ascii')


def _no_differences(comparison: Comparison) -> str:
    known = sum(any(run.config for run in side.runs) for side in comparison.sides)
    return 'The configs are the same.' if known > 1 else 'Unknown: fewer than two sides have a total_config.py.'


def _listed(names: List[str]) -> str:
    return ' and '.join(', '.join(names).rsplit(', ', 1))
