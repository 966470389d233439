"""How much of the cluster each training worker takes. Pure: numbers of CPUs in and out."""

from collections.abc import Sequence


def cpus_per_worker(node_cpus: Sequence[float], num_workers: int) -> int:
    """The most whole CPUs that every worker can have at the same time, at least 1.

    Args:
        node_cpus: CPUs of each node; a worker's are all on one node.
        num_workers: World size.
    """
    most = int(max(node_cpus, default=1))
    for cpus in range(most, 1, -1):
        if sum(int(node // cpus) for node in node_cpus) >= num_workers:
            return cpus
    return 1
