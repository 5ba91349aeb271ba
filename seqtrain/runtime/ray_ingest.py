"""Text becomes tokens on a Ray cluster: a task a group of shards."""

from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

from seqtrain.data.pool import Pool, Pools, attempt
from seqtrain.errors import DataError
from seqtrain.runtime.ray_launcher import start_ray
from seqtrain.runtime.settings import PretrainConfig
from seqtrain.validation import AUTO

T = TypeVar("T")

# How often a task is begun again whose worker was lost.
RETRIES = 3


def ray_pools(config: PretrainConfig) -> Pools | None:
    """Tasks of the cluster at `runtime.address`, as many at once as it has cores or `data.workers` says; else None."""
    if not config.runtime.cluster:
        return None

    @contextmanager
    def pools(most: int) -> Iterator[Pool]:
        start_ray(config)
        pool = RayTasks(config.data.workers, most)
        try:
            yield pool
        finally:
            pool.end()

    return pools


class RayTasks:
    """A pool of tasks, each with a core, on whichever nodes; all of them see the folder of the corpus, and the text."""

    def __init__(self, wanted: int | str, most: int):
        import ray

        there = int(ray.cluster_resources().get("CPU", 1))
        self.workers = max(1, min(there if wanted == AUTO else int(wanted), most))
        self._attempt: Any = ray.remote(num_cpus=1, max_retries=RETRIES)(attempt)
        self._running: dict[Future[Any], Any] = {}

    def submit(self, function: Callable[[Any], T], argument: Any, /) -> "Future[T]":
        """As `Pool.submit`."""
        reference = self._attempt.remote(function, argument)
        result: Future[T] = Future()
        self._running[result] = reference
        reference.future().add_done_callback(partial(self._pass_on, result))
        return result

    def _pass_on(self, result: Future[Any], told: Future[tuple[bool, Any]]) -> None:
        self._running.pop(result, None)
        if error := told.exception():
            line = " ".join(str(error).split())[:300]
            result.set_exception(
                DataError(f"a Ray task that tokenized text was lost; finished shards are kept; rerun to resume: {line}")
            )
            return
        failed, value = told.result()
        if failed:
            result.set_exception(value)
        else:
            result.set_result(value)

    def end(self) -> None:
        """Ends the tasks that are running."""
        import ray

        for reference in list(self._running.values()):
            ray.cancel(reference, force=True)
