"""Which requests are generated together. Pure: sizes and settings in, indices out."""

from collections import defaultdict
from collections.abc import Hashable, Sequence


def plan_batches(lengths: Sequence[int], settings: Sequence[Hashable]) -> list[list[int]]:
    """Group requests into batches of one setting and of similar prompt length.

    Args:
        lengths: Prompt length of each request, in tokens.
        settings: What must be equal within a batch, such as the temperature.

    Returns:
        Indices of the requests, each exactly once. At most half of a batch is padding.
    """
    groups: dict[Hashable, list[int]] = defaultdict(list)
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        groups[settings[index]].append(index)
    return [batch for group in groups.values() for batch in _split(group, lengths)]


def _split(group: Sequence[int], lengths: Sequence[int]) -> list[list[int]]:
    batches: list[list[int]] = []
    tokens = 0
    for index in group:
        length = lengths[index]
        if batches and length * (len(batches[-1]) + 1) <= 2 * (tokens + length):
            batches[-1].append(index)
            tokens += length
        else:
            batches.append([index])
            tokens = length
    return batches
