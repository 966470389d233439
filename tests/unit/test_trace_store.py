"""The trace store: what was appended is found again, whatever befell the writer."""

import errno
import json
import os
import resource
import tempfile
from pathlib import Path

import fsspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.tracing.store import TraceStore
from distill.tracing.trace import (
    Failure,
    FailureKind,
    PredictorCall,
    Score,
    Trace,
    Usage,
    passes,
    total_usage,
)
from serve.errors import TraceStoreError

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=5,
)
fields = st.dictionaries(st.text(), values, max_size=3)
usages = st.builds(Usage, st.integers(), st.none() | st.integers(), st.none() | st.integers())
traces = st.builds(
    Trace,
    key=st.text(),
    example_id=st.text(),
    calls=st.lists(st.builds(PredictorCall, st.none() | st.text(), fields, fields)).map(tuple),
    prediction=st.none() | fields,
    usage=usages,
    usages=st.dictionaries(st.text(), usages, max_size=2),
    sample=st.integers(0, 9),
    hinted=st.booleans(),
    latency_s=st.floats(0, 10),
    score=st.none() | st.builds(Score, st.text(), st.none() | st.floats(0, 1), st.none()),
    failure=st.none()
    | st.builds(Failure, st.sampled_from(list(FailureKind)), st.text(), st.text()),
)


def trace(key, **changes):
    given = {"example_id": key, "calls": (), "prediction": {}, "usage": Usage(), "latency_s": 0.0}
    return Trace(key=key, **{**given, **changes})


@settings(max_examples=50)
@given(st.lists(st.lists(traces, max_size=3), max_size=3))
def test_what_is_appended_is_found(batches):
    with tempfile.TemporaryDirectory() as folder:
        store = TraceStore(folder)
        for batch in batches:
            store.writer().append([trace.to_json() for trace in batch])
        found = sorted(json.dumps(t.to_json()) for t in store.scan())
        assert found == sorted(json.dumps(t.to_json()) for batch in batches for t in batch)


@pytest.mark.parametrize("uri", ["memory://store-test", "local"])
def test_any_filesystem_holds_a_store(uri, tmp_path):
    store = TraceStore(str(tmp_path) if uri == "local" else f"{uri}/{tmp_path.name}")
    writer = store.writer()
    writer.append([trace("a").to_json()])
    writer.append([trace("b").to_json()])
    assert set(store.latest(["a", "b", "c"])) == {"a", "b"}


def test_a_torn_last_record_is_dropped(tmp_path):
    store = TraceStore(str(tmp_path))
    store.writer().append([trace("a").to_json(), trace("b").to_json()])
    (segment,) = tmp_path.glob("*.jsonl")
    os.truncate(segment, segment.stat().st_size - 5)
    assert [t.key for t in store.scan()] == ["a"]


def test_damage_in_the_middle_is_an_error_that_names_the_line(tmp_path):
    store = TraceStore(str(tmp_path))
    store.writer().append([trace("a").to_json(), trace("b").to_json()])
    (segment,) = tmp_path.glob("*.jsonl")
    content = segment.read_bytes()
    segment.write_bytes(b"\x00" + content[1:])
    with pytest.raises(TraceStoreError, match="line 1"):
        list(store.scan())


@pytest.fixture
def remote(tmp_path):
    """A store of one segment that is not on this machine's disk, and the segment."""
    store = TraceStore(f"memory://{tmp_path.name}/traces")
    store.writer().append([trace("a").to_json(), trace("b").to_json()])
    memory = fsspec.filesystem("memory")
    (segment,) = memory.ls(f"/{tmp_path.name}/traces", detail=False)
    return store, memory, segment


def test_damage_of_a_remote_store_is_named_where_it_lies(remote):
    store, memory, segment = remote
    memory.pipe_file(segment, b"\x00" + memory.cat_file(segment)[1:])
    with pytest.raises(TraceStoreError) as damaged:
        list(store.scan())
    assert str(damaged.value).startswith(f"memory:/{segment}, line 1:")


def test_a_remote_store_that_cannot_be_fetched_is_named(remote, monkeypatch):
    store, memory, _ = remote

    def get(*args, **kwargs):
        raise PermissionError(errno.EACCES, "Access Denied")

    monkeypatch.setattr(type(memory), "get", get)
    with pytest.raises(TraceStoreError, match=r"^memory://.*Access Denied"):
        list(store.scan())


@pytest.mark.parametrize("old", [b"a", b'"key": "a"', b"latency_s", b"crc32"])
def test_a_changed_byte_is_never_used(tmp_path, old):
    store = TraceStore(str(tmp_path))
    store.writer().append([trace("b").to_json(), trace("a", prediction={"x": "a"}).to_json()])
    (segment,) = tmp_path.glob("*.jsonl")
    first, second = segment.read_bytes().splitlines(keepends=True)
    at = second.rindex(old)
    damaged = second[:at] + bytes([second[at] ^ 1]) + second[at + 1 :]
    segment.write_bytes(first + damaged)
    with pytest.raises(TraceStoreError, match=rf"{segment.name}, line 2: is damaged"):
        list(store.scan())


def test_a_record_without_a_checksum_is_not_taken_for_a_trace(tmp_path):
    (tmp_path / "other.jsonl").write_text(json.dumps(trace("a").to_json()) + "\n")
    with pytest.raises(TraceStoreError, match=r"other.jsonl, line 1: is damaged .*checksum"):
        list(TraceStore(str(tmp_path)).scan())


def test_of_two_failures_the_one_that_is_final_counts_in_whatever_order_they_lie(tmp_path):
    final = Failure(FailureKind.PARSE, "AdapterParseError", "no")
    passing = Failure(FailureKind.TEACHER, "LMTimeoutError", "too slow")
    for folder, failures in (("a", (final, passing)), ("b", (passing, final))):
        store = TraceStore(str(tmp_path / folder))
        store.writer().append([trace("x", failure=each).to_json() for each in failures])
        assert [found.failure for found in store.read(["x"])] == [final]


def test_traces_are_read_in_the_order_of_the_keys(tmp_path):
    store = TraceStore(str(tmp_path))
    for keys in ("db", "ca"):
        store.writer().append([trace(key).to_json() for key in keys])
    assert [found.key for found in store.read(["a", "b", "x", "c", "d"])] == ["a", "b", "c", "d"]


def fill(writer, acknowledged):
    for number in range(100):
        writer.append([trace(f"{number}").to_json()])
        acknowledged.append(f"{number}")


def test_a_disk_that_fills_up_costs_no_trace_that_was_acknowledged(tmp_path):
    store = TraceStore(str(tmp_path))
    writer, acknowledged = store.writer(), []
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, limits[1]))
    try:
        with pytest.raises(TraceStoreError, match="cannot be written"):
            fill(writer, acknowledged)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    writer.append([trace("later").to_json()])
    assert 0 < len(acknowledged) < 100
    assert [found.key for found in store.read([*acknowledged, "later"])] == [*acknowledged, "later"]


def test_only_who_has_the_same_store_sees_its_beacon(tmp_path):
    store = TraceStore(str(tmp_path / "a"))
    with store.beacon() as beacon:
        assert TraceStore(str(tmp_path / "a")).sees(beacon)
        assert not TraceStore(str(tmp_path / "b")).sees(beacon)
    assert not list((tmp_path / "a").iterdir())


def test_of_two_traces_of_one_key_the_finished_one_counts(tmp_path):
    store = TraceStore(str(tmp_path))
    failed = trace("a", failure=Failure(FailureKind.TEACHER, "LMTimeoutError", "slow"))
    writer = store.writer()
    writer.append([trace("a", latency_s=1.0).to_json()])
    store.writer().append([failed.to_json()])
    assert store.latest(["a"])["a"].failure is None


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 0, 2), (2, 1, 0)])
def test_of_two_scores_of_one_key_the_metrics_own_counts(tmp_path, order):
    store = TraceStore(str(tmp_path))
    failed = trace("a", failure=Failure(FailureKind.TEACHER, "LMTimeoutError", "slow"))
    records = [trace("a", score=Score("m1", 1.0)), trace("a", score=Score("m2", 2.0)), failed]
    for number in order:
        store.writer().append([records[number].to_json()])
    for metric, value in (("m1", 1.0), ("m2", 2.0)):
        assert [found.score.value for found in store.read(["a"], metric)] == [value]


def test_every_record_of_the_keys_is_seen_before_the_first_trace_is_there(tmp_path):
    store = TraceStore(str(tmp_path))
    for key in ("a", "b", "a", "c"):
        store.writer().append([trace(key).to_json()])
    seen = []
    next(store.read(["a", "b"], seen=lambda found: seen.append(found.key)))
    assert sorted(seen) == ["a", "a", "b"]


@pytest.mark.parametrize("what", ["segment.jsonl", ""])
def test_what_cannot_be_read_is_never_taken_for_empty(tmp_path, monkeypatch, what):
    store = TraceStore(str(tmp_path))
    store.writer().append([trace("a").to_json()])
    if what:
        (tmp_path / what).mkdir()
    else:
        monkeypatch.setattr(os, "scandir", lambda _: (_ for _ in ()).throw(OSError(5, "I/O error")))
    with pytest.raises(TraceStoreError, match=rf"{what or tmp_path.name}: .*cannot be read"):
        list(store.scan())


def test_after_a_failed_write_the_next_goes_to_another_segment(tmp_path, monkeypatch):
    store = TraceStore(str(tmp_path))
    writer = store.writer()
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "disk full")))
    with pytest.raises(TraceStoreError, match="disk full"):
        writer.append([trace("a").to_json()])
    monkeypatch.setattr(os, "fsync", real)
    writer.append([trace("b").to_json()])
    assert len(list(Path(tmp_path).glob("*.jsonl"))) == 2
    assert "b" in store.latest(["b"])


@pytest.mark.parametrize(
    ("value", "threshold", "expected"),
    [
        (1.0, None, True),
        (0.0, None, False),
        (-1.0, None, False),
        (0.4, 0.5, False),
        (0.5, 0.5, True),
        (None, None, False),
    ],
)
def test_a_score_passes_above_zero_or_from_the_threshold_on(value, threshold, expected):
    assert passes(Score("m", value), threshold) is expected


def test_half_of_a_surrogate_pair_is_kept(tmp_path):
    store = TraceStore(str(tmp_path))
    store.writer().append([trace("a", prediction={"text": "\ud83d"}).to_json()])
    assert store.latest(["a"])["a"].prediction == {"text": "\ud83d"}


def test_a_sum_with_an_unknown_part_is_unknown_but_no_call_is_no_part():
    known, unknown = Usage(1, 10, 5, 0.1), Usage(1, 10, 5, None)
    assert total_usage([known, known, Usage()]) == Usage(2, 20, 10, 0.2)
    assert total_usage([known, unknown]).cost_usd is None
