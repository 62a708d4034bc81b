"""The facts of `inspect` as one HTML file: no script, no network, pictures inline.

All that a stranger wrote (keys, captions, names of columns, paths) passes `escape`; the page's own policy
(Content-Security-Policy) forbids scripts besides.
"""

from __future__ import annotations

import string
from collections.abc import Iterable, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path

from ldm.data.inspect import Bucket, Histogram, Inspection, Thumbnail, reasons

WIDTH, HEIGHT = 320, 110  # of a histogram, in the units of its picture
LISTED = 100  # bad samples that are listed
CAPTION = 280  # characters of a caption under a picture
MEANING = {  # of a reason, for who does not know the code
    "bad_caption": "the caption is not UTF-8",
    "bad_header": "a tar header is damaged; what follows was searched for",
    "bad_json": "the metadata is no JSON object",
    "bad_label": "the class is no whole number",
    "bad_name": "a key with other signs than letters, digits, _, - and /, or longer than 128",
    "changed": "the shard is not the file that was indexed",
    "corrupt": "the bytes are not those that were indexed",
    "corrupt_image": "the picture begins well and does not decode to its end",
    "count_mismatch": "more or fewer samples than the shard's _stats.json says",
    "denied": "the shard may not be read",
    "duplicate": "the same key came before in this shard",
    "empty": "a file of no bytes",
    "gzip": "compressed, which leaves no byte offsets: unpack it with gunzip",
    "missing": "the shard is gone",
    "no_caption": "a picture without a caption",
    "no_image": "a caption without a picture",
    "not_image": "no JPEG, PNG or WebP, whatever its name says",
    "not_tar": "no tar file",
    "other": "a reason that is not in this list",
    "timeout": "the shard could not be read in time",
    "too_large": "more bytes or pixels than a training sample may have",
    "truncated": "the file ends too early: a download that broke off",
    "unreadable": "the shard could not be read",
    "unordered": "the members of a sample do not lie side by side",
}


def page(inspection: Inspection) -> str:
    """The whole HTML document."""
    name = dataset_name(inspection.shards)
    sections = (_head(inspection, name), _filters(inspection), _histograms(inspection), _buckets(inspection))
    body = "\n".join([*sections, _sheet(inspection), _bad(inspection), _duplicates(inspection)])
    template = string.Template((files("ldm.data") / "inspect.html").read_text(encoding="utf-8"))
    return template.substitute(title=escape(f"{name}: ldm data inspect"), body=body)


def dataset_name(shards: Sequence[str]) -> str:
    """The folder that holds all shards, or the name of the only one."""
    folders = list(dict.fromkeys(shard.rpartition("/")[0] for shard in shards))
    if len(shards) == 1:
        return shards[0].rpartition("/")[2]
    return (folders[0].rpartition("/")[2] if len(folders) == 1 else "") or f"{len(shards):,} shards"


def bytes_text(size: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:,.0f} TB" if size >= 100 else f"{size:.3g} TB"


def number(value: float) -> str:
    """A short number for an axis."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def share(part: int, whole: int) -> str:
    """Per cent that never rounds to none or all."""
    if part in (0, whole):
        return "0 %" if not part else "100 %"
    percent = 100 * part / whole
    return "< 0.1 %" if percent < 0.1 else "> 99.9 %" if percent > 99.9 else f"{percent:.1f} %"


# ---- sections --------------------------------------------------------------------------------------------


def _head(x: Inspection, name: str) -> str:
    bad = reasons(x).total()
    several = len({shard.rpartition("/")[0] for shard in x.shards}) > 1
    where = x.shards[0] if len(x.shards) == 1 else x.shards[0].rpartition("/")[0]
    where += " and other folders" if several else ""
    stats = [(f"{x.samples:,}", "good samples")]
    if x.verdicts:
        stats.append((f"{x.kept:,}", f"kept by the filters, {share(x.kept, x.samples)}"))
    stats += [
        (f"{len(x.shards):,}", "shards" if len(x.shards) > 1 else "shard"),
        (bytes_text(x.bytes), "on disk"),
    ]
    stats.append((f"{bad:,}", "left out as bad" if bad else "bad samples"))
    cells = "".join(f"<div><b>{value}</b><span>{text}</span></div>" for value, text in stats)
    return (
        f'<p class="over">Data set</p>\n<h1>{escape(name)}</h1>\n<p><code>{escape(where)}</code></p>\n'
        f'<div class="stats">{cells}</div>'
    )


def _filters(x: Inspection) -> str:
    if not x.verdicts:
        return ""
    rows = [
        (
            f"<code>{escape(v.filter)}</code>",
            _bar(v.rejects, x.samples, "out"),
            f"{v.rejects:,}",
            share(v.rejects, x.samples),
            f"{v.first:,}",
            f"{v.missing:,}" if v.missing else "-",
        )
        for v in x.verdicts
    ]
    rows.append(("kept by all", _bar(x.kept, x.samples), f"{x.kept:,}", share(x.kept, x.samples), "", ""))
    table = _table(
        ("Filter", "", "*samples", "*share", "*dropped in this order", "*for want of a value"), rows
    )
    return _section("What the filters would drop", "Each by itself, and in the order given.", table)


def _histograms(x: Inspection) -> str:
    legend = '<span><i style="background: var(--kept)"></i>samples</span>'
    if x.verdicts:
        legend = (
            '<span><i style="background: var(--kept)"></i>kept</span>'
            '<span><i style="background: var(--all)"></i>dropped by a filter</span>'
        )
    same = [f"{escape(h.name)} {number(h.least)}" for h in x.histograms if h.least == h.most]
    cards = "".join(_card(h, x.samples) for h in x.histograms if h.least != h.most)
    below = f'<p class="below">The same in all that have it: {", ".join(same)}.</p>' if same else ""
    text = (
        "One bar is a range of values; point at it for its numbers. The end bars hold what lies beyond them."
    )
    return _section(
        "Sizes, captions and scores",
        text,
        f'<div class="legend">{legend}</div><div class="charts">{cards}</div>{below}',
    )


def _buckets(x: Inspection) -> str:
    if not x.buckets:
        return ""
    whole, most = max(x.kept, 1), max(bucket.samples for bucket in x.buckets)
    shapes = "".join(_shape(bucket, whole, most) for bucket in x.buckets)
    lost = sum(bucket.cut * bucket.samples for bucket in x.buckets) / whole
    text = (
        f"Where the samples would go at {x.resolution} pixels: the shape that is nearest to theirs. "
        f"The crop then removes {100 * lost:.1f} % of a picture on average; {share(x.enlarged, x.kept)} are "
        "smaller than their shape and would be enlarged."
    )
    return _section("Aspect-ratio buckets", text, f'<div class="shapes">{shapes}</div>')


def _sheet(x: Inspection) -> str:
    if not x.thumbnails:
        return ""
    which = "of those kept" if x.verdicts else "of the set"
    figures = "".join(map(_figure, x.thumbnails))
    text = f"{len(x.thumbnails)} samples, evenly spaced over all {which}."
    return _section("Samples", text, f'<div class="sheet">{figures}</div>')


def _bad(x: Inspection) -> str:
    counts = reasons(x)
    if not counts:
        return _section(
            "Bad samples", "None: every sample has a picture and a caption, and every tar is whole.", ""
        )
    most = counts.most_common(1)[0][1]
    rows = [
        (
            f"<code>{escape(reason)}</code>",
            escape(MEANING.get(reason, "")),
            _bar(count, most, "out"),
            f"{count:,}",
        )
        for reason, count in counts.most_common()
    ]
    listed = [
        (
            f"<code>{escape(Path(p['shard']).name)}</code>",
            f"<code>{escape(p['key']) or '-'}</code>",
            f"<code>{escape(p['reason'])}</code>",
            f"{p['offset']:,}",
        )
        for p in x.problems[:LISTED]
    ]
    which = f"The first {len(listed):,}" if counts.total() > len(listed) else "All"
    return _section(
        "Bad samples",
        "They are left out of training, one by one; nothing else is.",
        _table(("Reason", "What it means", "", "*samples"), rows)
        + f"<details><summary>{which}, with shard, key and place</summary>"
        + _table(("Shard", "Key", "Reason", "*at byte"), listed)
        + "</details>",
    )


def _duplicates(x: Inspection) -> str:
    if not x.duplicates:
        return ""
    rows = [(f"<code>{escape(k)}</code>", escape(", ".join(v))) for k, v in x.duplicate_keys.items()]
    text = (
        f"{x.duplicates:,} samples have a key that another shard has, too. They are all used: a key is "
        "unique only in its shard. Shards that were copied or downloaded twice look like this."
    )
    return _section("Keys in several shards", text, _table(("Key", "Shards"), rows))


# ---- pieces ----------------------------------------------------------------------------------------------


def _section(title: str, text: str, content: str) -> str:
    return f"<section><h2>{title}</h2>\n<p>{text}</p>\n{content}</section>"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Cells are HTML; a heading that begins with * is over numbers."""
    kinds = ["n" if name.startswith("*") else "" for name in head]
    top = "".join(f'<th class="{k}">{name.lstrip("*")}</th>' for k, name in zip(kinds, head, strict=True))
    lines = "".join(f"<tr>{''.join(map(_cell, kinds, row))}</tr>" for row in rows)
    return f'<div class="table"><table><thead><tr>{top}</tr></thead><tbody>{lines}</tbody></table></div>'


def _cell(kind: str, content: str) -> str:
    kind = "bar" if content.startswith("<div><i") else kind
    return f'<td class="{kind}">{content}</td>'


def _bar(part: int, whole: int, kind: str = "") -> str:
    return f'<div><i class="{kind}" style="width: {100 * part / max(whole, 1):.2f}%"></i></div>'


def _card(h: Histogram, samples: int) -> str:
    middle = f"median {number(h.median)}, {number(h.least)} to {number(h.most)}"
    absent = f"; {share(samples - h.present, samples)} have none" if h.present < samples else ""
    return (
        f'<div class="card"><h3>{escape(h.name)}</h3><small>{escape(h.unit)}: {middle}{absent}</small>'
        f"{_svg(h)}</div>"
    )


def _svg(h: Histogram) -> str:
    top, step = max(h.counts), WIDTH / len(h.counts)
    gap = min(1.5, step / 5)
    bars = []
    for i, (count, kept) in enumerate(zip(h.counts, h.kept, strict=True)):
        x, low, high = i * step, h.edges[i], h.edges[i + 1]
        for kind, value in (("all", count), ("kept", kept)):
            if value:
                tall = max(HEIGHT * value / top, 1.0)
                bars.append(
                    f'<rect class="{kind}" x="{x:.2f}" y="{HEIGHT - tall:.2f}" '
                    f'width="{step - gap:.2f}" height="{tall:.2f}" rx="1"/>'
                )
        words = f"{number(low)} to {number(high)}: {count:,}" + (f", {kept:,} kept" if kept != count else "")
        bars.append(
            f'<rect class="hit" x="{x:.2f}" y="0" width="{step:.2f}" height="{HEIGHT}">'
            f"<title>{words}</title></rect>"
        )
    marks = "".join(_mark(h, value) for value in h.marks)
    centre = h.edges[len(h.edges) // 2]
    labels = "".join(
        f'<text x="{x}" y="{HEIGHT + 15}" text-anchor="{anchor}">{number(value)}</text>'
        for x, anchor, value in (
            (0, "start", h.edges[0]),
            (len(h.edges) // 2 * step, "middle", centre),
            (WIDTH, "end", h.edges[-1]),
        )
    )
    axis = f'<line class="axis" x1="0" y1="{HEIGHT}.5" x2="{WIDTH}" y2="{HEIGHT}.5"/>'
    size = f'viewBox="0 -16 {WIDTH} {HEIGHT + 36}"'
    return f'<svg {size} role="img" aria-label="{escape(h.name)}">{axis}{"".join(bars)}{marks}{labels}</svg>'


def _mark(h: Histogram, value: float) -> str:
    x = WIDTH * (value - h.edges[0]) / (h.edges[-1] - h.edges[0])
    return (
        f'<line class="mark" x1="{x:.2f}" y1="-4" x2="{x:.2f}" y2="{HEIGHT}"/>'
        f'<text class="cut" x="{x:.2f}" y="-8" text-anchor="middle">{number(value)}</text>'
    )


def _shape(b: Bucket, whole: int, most: int) -> str:
    scale = 64 / (b.height * b.width) ** 0.5
    shade = 8 + 72 * b.samples / max(most, 1)
    size = f"width: {b.width * scale:.0f}px; height: {b.height * scale:.0f}px"
    return (
        f'<div title="{b.samples:,} samples; the crop removes {100 * b.cut:.1f} %">'
        f'<i style="{size}; --share: {shade:.0f}%"></i>'
        f"<b>{share(b.samples, whole)}</b>{b.width} x {b.height}</div>"
    )


def _figure(t: Thumbnail) -> str:
    picture = f'<div class="none">{escape(t.reason)}</div>'
    if t.jpeg:
        picture = f'<img alt="" src="data:image/jpeg;base64,{t.jpeg}">'
    caption = t.caption if len(t.caption) <= CAPTION else f"{t.caption[:CAPTION]}..."
    facts = [f"{t.width} x {t.height}", *(f"{name} {number(value)}" for name, value in t.scores.items())]
    ratio = min(max(t.ratio, 0.6), 3.0)
    return (
        f'<figure style="--ratio: {ratio:.3f}">{picture}'
        f'<figcaption dir="auto" title="{escape(t.caption[:1000])}">{escape(caption) or "(no caption)"}'
        f'</figcaption><div class="soft" title="{escape(t.key)}">{escape(t.key)}</div>'
        f'<div class="soft" title="{escape(", ".join(facts))}">{escape(", ".join(facts[:2]))}</div></figure>'
    )
