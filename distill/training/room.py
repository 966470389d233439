"""Waiting until the cluster has room for the workers, in a way that can be cancelled.

Ray Train asks for room as well, but its request cannot be taken back, and would start the
workers of a cancelled job whenever there is room at last. Owns who is next, and the words for
what is waited for.
"""

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import ray
import ray._private.state
from ray.util.placement_group import (
    placement_group,
    placement_group_table,
    remove_placement_group,
)

from serve.errors import ConfigurationError, TrainingCancelled

_POLL_S = 0.5
_SAY_AFTER_S = 10.0

_turn = threading.Lock()
_counting = threading.Lock()
_num_jobs = 0

Amounts = Mapping[str, float]


@contextmanager
def among_jobs() -> Iterator[None]:
    """Be counted among the jobs of this process that want to train now."""
    global _num_jobs
    with _counting:
        _num_jobs += 1
    try:
        yield
    finally:
        with _counting:
            _num_jobs -= 1


def num_jobs() -> int:
    """How many jobs of this process train or want to, at least 1."""
    return max(1, _num_jobs)


@contextmanager
def my_turn(cancelled: Callable[[], bool]) -> Iterator[None]:
    """Be the only job of this process that takes room.

    Between seeing that there is room and having it, another could take it.

    Raises:
        TrainingCancelled: ``cancelled`` said so first.
    """
    while not _turn.acquire(timeout=_POLL_S):
        _stop_if(cancelled)
    try:
        yield
    finally:
        _turn.release()


def wait_for_room(
    bundles: Sequence[Amounts],
    cancelled: Callable[[], bool],
    on_wait: Callable[[str], None],
    had_room: bool = False,
) -> None:
    """Return when the cluster has this much to spare; scaling it up is asked for.

    Args:
        bundles: What each worker needs, such as ``{"CPU": 1}``.
        cancelled: Asked meanwhile.
        on_wait: Told once what is waited for, after ten seconds.
        had_room: The cluster has held them before. Where it is too small by now, it has lost
            a node, and another is waited for.

    Raises:
        ConfigurationError: All of the cluster is too little, and always was, and nothing could
            make it grow.
        TrainingCancelled: ``cancelled`` said so first.
    """
    if not had_room and not _may_grow() and not fits(bundles, _totals()):
        raise ConfigurationError(too_large(bundles, _totals()))
    asked = placement_group([dict(bundle) for bundle in bundles], strategy="PACK")
    start, said = time.monotonic(), False
    try:
        _stop_if(cancelled)
        while not asked.wait(_POLL_S):
            _stop_if(cancelled)
            if not said and time.monotonic() - start > _SAY_AFTER_S:
                said = True
                on_wait(waiting(bundles, _free(), _totals(), _others(asked), _may_grow()))
    finally:
        remove_placement_group(asked)


def fits(bundles: Sequence[Amounts], nodes: Mapping[str, Amounts]) -> bool:
    """Whether nodes with these amounts hold all workers, each on one node.

    Args:
        bundles: What each worker needs; the same for all.
        nodes: What each node has.
    """
    one = bundles[0]
    room = sum(
        int(min(node.get(name, 0.0) / amount for name, amount in one.items()))
        for node in nodes.values()
    )
    return room >= len(bundles)


def too_large(bundles: Sequence[Amounts], nodes: Mapping[str, Amounts]) -> str:
    """The message of a job that the whole cluster could not hold."""
    return (
        f"train.num_workers={len(bundles)} needs {_each(bundles)}, each on one node; the cluster "
        f"has {_describe_nodes(nodes, nodes, bundles[0])}. Lower train.num_workers or add nodes to "
        "the cluster."
    )


def waiting(
    bundles: Sequence[Amounts],
    free: Mapping[str, Amounts],
    totals: Mapping[str, Amounts],
    others: Sequence[str],
    may_grow: bool,
) -> str:
    """What a job that has no room waits for.

    Args:
        bundles: What each worker needs.
        free, totals: What each node has to spare, and in all.
        others: What takes the rest, as far as it is known.
        may_grow: Whether nodes may be added to the cluster by itself.
    """
    words = (
        f"Training waits for room: {len(bundles)} workers need {_each(bundles)}; free are "
        f"{_describe_nodes(free, totals, bundles[0])}."
    )
    if others:
        words += f" Taken by {', '.join(others)}."
    if may_grow:
        return f"{words} The cluster was asked to grow."
    if not fits(bundles, totals):
        return f"{words} It has to have more nodes for that."
    return f"{words} It starts as soon as that is free."


def _each(bundles: Sequence[Amounts]) -> str:
    return " and ".join(f"{amount:g} {name}" for name, amount in bundles[0].items()) + " each"


def _describe_nodes(
    free: Mapping[str, Amounts], totals: Mapping[str, Amounts], wanted: Amounts
) -> str:
    """What nodes have of what is wanted, most first; like ones are counted."""
    parts: dict[str, int] = {}
    for node, total in sorted(totals.items(), key=lambda item: -sum(item[1].values())):
        amounts = (
            f"{free.get(node, {}).get(name, 0.0):g} of {total.get(name, 0.0):g} {name}"
            if free is not totals
            else f"{total.get(name, 0.0):g} {name}"
            for name in wanted
        )
        text = " and ".join(amounts)
        parts[text] = parts.get(text, 0) + 1
    return "; ".join(f"{text} on {_nodes(number)}" for text, number in parts.items()) or "no nodes"


def _nodes(number: int) -> str:
    return "1 node" if number == 1 else f"{number} nodes each"


def _totals() -> dict[str, Amounts]:
    return {node["NodeID"]: node["Resources"] for node in ray.nodes() if node["Alive"]}


def _free() -> dict[str, Amounts]:
    return dict(ray._private.state.available_resources_per_node())


def _others(asked: object) -> list[str]:
    """The placement groups that hold part of the cluster; Ray names no others."""
    mine = asked.id.hex()  # type: ignore[attr-defined]
    found = []
    for number, group in placement_group_table().items():
        if number == mine or group["state"] != "CREATED":
            continue
        held: dict[str, float] = {}
        for bundle in group["bundles"].values():
            for name, amount in bundle.items():
                held[name] = held.get(name, 0.0) + amount
        amounts = " and ".join(f"{amount:g} {name}" for name, amount in held.items())
        found.append(f"{group['name'] or 'another job'} ({amounts})")
    return found


def _may_grow() -> bool:
    return bool(ray._private.state.state.get_max_resources_from_cluster_config())


def _stop_if(cancelled: Callable[[], bool]) -> None:
    if cancelled():
        raise TrainingCancelled("Training was cancelled while its workers waited for room.")
