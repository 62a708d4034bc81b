"""What a run's config says of its training, in words: for model cards, and for `ldm info`.

Of data sets and checkpoints the last part of a path is shown.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from ldm.checkpoints.foreign.towers import kind

UNKNOWN = "not known"
TWEMOJI = "Twemoji graphics (Copyright Twitter, Inc and other contributors, CC-BY 4.0) on plain backgrounds"
DATA = {"EmojiDataModule": TWEMOJI, "SvgEmojiDataModule": TWEMOJI}  # what these are besides their settings
PLACES = ("shards", "folder", "cache_dir")  # settings of data modules that say where the data is


def training(config: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(what, how) of the training, the data first; how is empty where the config does not say."""
    data, optimizer = config.get("data") or {}, config.get("optimizer") or {}
    drop, start = (config.get("module") or {}).get("drop"), config.get("init_from")
    rate, batch = optimizer.get("lr"), data.get("global_batch_size")
    return [
        ("trained on", _data(data)),
        ("captions dropped in training", "" if drop is None else f"{float(drop):.0%}"),
        ("optimizer", kind(optimizer) if "_target_" in optimizer else ""),
        ("learning rate", "" if rate is None else f"{float(rate):g}"),
        ("global batch", count(int(batch)) if batch else ""),
        ("started from", PurePath(str(start)).name if start else ""),
    ]


def _data(section: Mapping[str, Any] | None) -> str:
    """What the config says of the data: its kind, the name of its place, its filters."""
    if not section or "_target_" not in section:
        return ""
    found = [DATA.get(kind(section), kind(section))]
    for key in PLACES:
        if (value := section.get(key)) and kind(section) not in DATA:
            names = [value] if isinstance(value, str) else [str(part) for part in value]
            found.append(f"{key} {', '.join(PurePath(name).name for name in names[:4])}")
    for condition in section.get("filters") or []:
        settings = " ".join(str(value) for key, value in condition.items() if key != "_target_")
        found.append(f"{kind(condition)} {settings}")
    return "; ".join(found)


def count(value: Any) -> str:
    return f"{value:,}" if value else UNKNOWN
