"""Why a sample is masked: the one list of codes, which readers, makers, counters and logs share."""

from __future__ import annotations

REASONS = (  # sorted; ranks add up their counts in this order
    "bad_caption",
    "bad_json",
    "changed",  # the shard is not the file that was indexed
    "corrupt",  # other bytes than those that were indexed
    "corrupt_image",
    "denied",  # no permission to read the shard
    "missing",  # the shard is not there
    "no_caption",
    "not_image",
    "other",  # a code that is not in this list
    "timeout",
    "too_large",  # more pixels than ldm.data.image.MAX_PIXELS
    "truncated",
    "unreadable",  # any other failure to read
)
NUMBERS = dict(zip(REASONS, range(len(REASONS)), strict=True))


def number_of(reason: str) -> int:
    """Place of a code in `REASONS`."""
    return NUMBERS.get(reason, NUMBERS["other"])
