"""Whether workers fit the nodes of a cluster, and what is said where they do not."""

from distill.training.room import fits, too_large, waiting

WORKERS = [{"CPU": 2}] * 2


def test_a_worker_has_to_fit_on_one_node():
    assert fits(WORKERS, {"a": {"CPU": 4}})
    assert fits(WORKERS, {"a": {"CPU": 2}, "b": {"CPU": 3}})
    assert not fits(WORKERS, {"a": {"CPU": 3}, "b": {"CPU": 1}})
    assert not fits([{"CPU": 1, "GPU": 1}], {"a": {"CPU": 8}})


def test_a_job_too_large_for_the_cluster_says_what_it_has():
    said = too_large([{"CPU": 1, "GPU": 1}] * 8, {"a": {"CPU": 8, "GPU": 2}, "b": {"CPU": 4}})
    assert "train.num_workers=8 needs 1 CPU and 1 GPU each" in said
    assert "8 CPU and 2 GPU on 1 node; 4 CPU and 0 GPU on 1 node" in said
    assert "Lower train.num_workers" in said


def test_a_waiting_job_says_what_is_free_of_how_much_and_who_has_the_rest():
    nodes = {"a": {"CPU": 4}, "b": {"CPU": 4}}
    free = {"a": {"CPU": 1}, "b": {"CPU": 1}}
    said = waiting(WORKERS, free, nodes, ["another job (6 CPU)"], may_grow=False)
    assert said == (
        "Training waits for room: 2 workers need 2 CPU each; free are 1 of 4 CPU on 2 nodes each."
        " Taken by another job (6 CPU). It starts as soon as that is free."
    )
    assert "asked to grow" in waiting(WORKERS, {}, nodes, [], may_grow=True)
    assert "more nodes" in waiting(WORKERS, {}, {"a": {"CPU": 2}}, [], may_grow=False)
