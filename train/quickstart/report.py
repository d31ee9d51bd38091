"""report.html: the run on one page that needs nothing else, on a phone or a wide screen, light or dark."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from hub.io.files import atomic_write
from train.quickstart import plots
from train.quickstart.findings import claims, hindsight, means, table, worst_regret
from train.quickstart.measure import DomainResult
from train.quickstart.story import Story, peak_rss_mb

_CSS = """
:root { color-scheme: light dark; --ink: #1d2330; --dim: #5b6475; --line: #dde1e8; --page: #ffffff; --card: #f6f7f9;
        --good: #1e7d45; --bad: #b3322c; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e5e8ee; --dim: #9aa3b2; --line: #323947; --page: #14171d; --card: #1c2028; --good: #58c28a;
          --bad: #f0837c; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); line-height: 1.5;
       font-family: system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
main { max-width: 1000px; margin: 0 auto; padding: 1.2rem 1rem 3rem; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: 0.6rem 0 0.4rem; text-wrap: balance; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 0.3rem; }
p, li { max-width: 68ch; }
p.dim, figcaption, .facts, footer { color: var(--dim); font-size: 0.9rem; }
ul.claims { list-style: none; padding: 0; margin: 0.8rem 0; }
ul.claims li { padding-left: 1.6rem; text-indent: -1.6rem; margin: 0.25rem 0; max-width: none; }
.mark { display: inline-block; width: 1.6rem; text-indent: 0; font-weight: 700; }
.yes { color: var(--good); } .no { color: var(--bad); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: 0.7rem; margin: 1rem 0; }
.tile { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 0.7rem 0.9rem; }
.tile b { display: block; font-size: 1.45rem; font-variant-numeric: tabular-nums; }
.tile span { color: var(--dim); font-size: 0.85rem; }
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 26rem), 1fr)); gap: 0.9rem; }
figure { margin: 0; background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 0.8rem; }
figure svg { display: block; width: 100%; height: auto; overflow: visible; }
figure svg text { font-family: inherit; }
figcaption { margin-bottom: 0.4rem; } figcaption b { color: var(--ink); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 0.92rem; min-width: 100%; }
th, td { padding: 0.35rem 0.6rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: var(--page); }
thead th { color: var(--dim); font-weight: 600; }
td.low { font-weight: 700; }
tr.demix td { background: var(--card); }
code { font-family: ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; font-size: 0.88em; }
pre { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 0.8rem; overflow-x: auto; }
"""


def write_report(story: Story, path: Path) -> Path:
    """Write the page, whole or not at all; returns its path."""
    atomic_write(path, page(story).encode())
    return path


def page(story: Story) -> str:
    """The whole page as HTML."""
    sections = [_head(story), _table(story), _domains(story), _stream(story), _making(story), _foot(story)]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>moduloom quickstart</title>\n<style>{_CSS}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(sections)
        + "\n</main>\n</body>\n</html>\n"
    )


def _head(story: Story) -> str:
    mean, stream, options = means(story), story.stream, story.options
    names = [expert.domain for expert in story.experts]
    base = f"{escape(options.base)} ({story.parameters / 1e6:.1f} million parameters, held as {options.quantize})"
    tiles = [
        (f"{mean['base']:.1f} → {mean['demix']:.1f}", "mean perplexity, base → DEMix"),
        (f"{mean['demix'] / mean['best_expert'] - 1:+.1%}", "DEMix against the best expert in hindsight"),
        (f"{min(stream.experts.values()):.1f} → {stream.demix:.1f}", "changing streams, best expert → DEMix"),
        (f"{story.seconds:.0f} s", f"for everything; {peak_rss_mb() or 0:.0f} MB at most"),
    ]
    shown = "".join(f'<div class="tile"><b>{value}</b><span>{label}</span></div>' for value, label in tiles)
    marks = {True: '<span class="mark yes">✓</span>', False: '<span class="mark no">✗</span>'}
    lines = "".join(f"<li>{marks[claim.holds]}{escape(claim.text)}</li>" for claim in claims(story))
    return f"""<h1>{len(names)} experts on one shared base, weighted token by token</h1>
<p>One frozen model, {base}. One small {escape(options.kind)} adapter for each kind of text: {escape(_listed(names))}.
Each was trained, published with a manifest, pulled into a second store with every byte checked, and composed with the
others on the same base. Nobody tells the model which text it reads: the posterior over the experts follows from how
well each predicted the text so far.</p>
<div class="tiles">{shown}</div>
<ul class="claims">{lines}</ul>"""


def _table(story: Story) -> str:
    results = story.results
    body = "".join(
        f'<tr class="{"demix" if row.label.startswith("DEMix") else ""}"><td>{escape(row.label)}</td>'
        + "".join(
            f'<td class="{"low" if low else ""}">{value:.2f}</td>'
            for value, low in zip(row.values, row.lowest, strict=True)
        )
        + "</tr>"
        for row in table(story)
    )
    best = "".join(f"<td>{value:.2f}</td>" for value in hindsight(story))
    body += f"<tr><td>best expert in hindsight</td>{best}</tr>"
    head = "".join(f"<th>{escape(name)}</th>" for name in [*(r.name for r in results), "mean"])
    documents, tokens = sum(len(r.documents) for r in results), sum(r.tokens for r in results)
    return f"""<h2>Perplexity per token on held-out documents</h2>
<p class="dim">{documents} documents, {tokens:,} tokens, none of them a near-duplicate of a training document. Lower is
better; the best of each column is bold.</p>
<div class="scroll"><table><thead><tr><th></th>{head}</tr></thead><tbody>{body}</tbody></table></div>"""


def _domains(story: Story) -> str:
    figures = [_figure(f"<b>{escape(r.name)}</b> {_about(r)}", plots.bars(r)) for r in story.results]
    return f"""<h2>Domain by domain</h2>
<p class="dim">The dotted line is the best expert in hindsight.</p>
<div class="figures">{"".join(figures)}</div>"""


def _about(result: DomainResult) -> str:
    return f"{len(result.documents)} documents, {result.tokens:,} tokens"


def _stream(story: Story) -> str:
    stream = story.stream
    figures = [
        _figure(f"<b>gamma {gamma:g}</b> {text}", plots.posterior_path(stream, gamma))
        for gamma, text in ((stream.gamma, "old evidence fades"), (1.0, "nothing is forgotten"))
    ]
    figures.append(_figure("<b>How much to forget</b>", plots.gammas(stream)))
    figures.append(_figure("<b>How soon a document finds its expert</b> (gamma 1)", plots.certainty(story.results)))
    return f"""<h2>When the domain changes midway</h2>
<p>Pieces of held-out documents of all domains, joined to streams of {stream.tokens:,} tokens in all. With gamma below 1
the weights let go of the past and follow the text; Bayes' rule over everything (gamma 1) holds on to what it saw
first.</p>
<div class="figures">{"".join(figures)}</div>"""


def _making(story: Story) -> str:
    rows = "".join(
        f"<tr><td><code>{escape(str(expert.artifact.ref))}</code></td>"
        f"<td>{len(domain.train)}</td><td>{len(domain.heldout)}</td>"
        f"<td>{f'{expert.seconds:.0f} s' if expert.trained else 'found in the store'}</td>"
        f"<td><code>{expert.artifact.digest[7:19]}</code></td></tr>"
        for expert, domain in zip(story.experts, story.domains, strict=True)
    )
    columns = ("artifact", "training documents", "held out", "training", "manifest digest")
    head = "".join(f"<th>{name}</th>" for name in columns)
    curves = _figure("<b>Training</b> thin: each step; thick: mean of 8", plots.training_curves(story.experts))
    return f"""<h2>How the experts were made</h2>
<div class="figures">{curves}</div>
<div class="scroll" style="margin-top: 1rem"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"""


def _foot(story: Story) -> str:
    options, machine = story.options, story.machine
    names = [expert.domain for expert in story.experts]
    refs = [str(expert.artifact.ref) for expert in story.experts]
    example = f"""import compose
from router import Ensemble

model = compose.load("{options.base}", quantize="{options.quantize}", adapters={{
{_lines(f'    "{name}": "{ref}",' for name, ref in zip(names, refs, strict=True))}
}})
ensemble = Ensemble(model, {names!r}, gamma={story.stream.gamma:g})
score = ensemble.score(input_ids)       # log-probabilities and the posterior for each token
text = ensemble.generate(input_ids)     # one token a step from the mixture of all experts"""
    facts = [
        f"seed {options.seed}, {options.steps} steps an expert",
        f"worst regret {worst_regret(story):.2g} nats against a bound of 0",
        f"{machine['processor']}, {machine['threads']} threads" + (f", {machine['cuda']}" if machine["cuda"] else ""),
        f"Python {machine['python']}, torch {machine['torch']}",
    ]
    return f"""<h2>Use them</h2>
<pre><code>{escape(example)}</code></pre>
<footer><p class="facts">{escape("; ".join(facts))}.<br>Stores: <code>{escape(story.stores[0])}</code>,
<code>{escape(story.stores[1])}</code>. DEMix: arXiv 2108.05036.</p></footer>"""


def _figure(caption: str, drawing: str) -> str:
    return f"<figure><figcaption>{caption}</figcaption>{drawing}</figure>"


def _lines(lines: Iterable[str]) -> str:
    return "\n".join(lines)


def _listed(names: Sequence[str]) -> str:
    return f"{', '.join(names[:-1])} and {names[-1]}"
