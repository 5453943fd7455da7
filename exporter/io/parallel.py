"""Computes blocks of tensor rows in several threads, and yields the blocks in the order of the rows."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

from exporter.tensors import Array

#: Rows are converted and merged in blocks of about this many stored bytes. The temporaries of such a block (float32
#: copies, a product) stay in the processor's cache, which is several times faster than memory.
TOUCHED_BYTES: Final = 512 << 10
#: Peak memory of computing one block, in multiples of its stored size.
_COPIES: Final = 8
_DEFAULT_MEMORY_BYTES: Final = 256 << 20


@dataclass(frozen=True, slots=True)
class Budget:
    """Limits for the number of worker threads and for the memory that the workers' tensor data may need."""

    memory_bytes: int = _DEFAULT_MEMORY_BYTES
    workers: int = min(4, os.cpu_count() or 1)

    @property
    def ahead(self) -> int:
        """Maximum number of blocks, at least 1, that are being computed or are waiting to be written."""
        return max(1, min(2 * self.workers, self.memory_bytes // (_COPIES * TOUCHED_BYTES)))

    @property
    def block_nbytes(self) -> int:
        """Peak memory in bytes of all blocks that are being computed or are waiting to be written."""
        return self.ahead * _COPIES * TOUCHED_BYTES


def in_order(jobs: Iterable[Callable[[], Array]], budget: Budget) -> Iterator[Array]:
    """Run ``jobs`` with at most ``budget.ahead`` pending jobs, and yield the results in the order of the jobs.

    If several jobs raise exceptions, the exception of the first failed job is raised.
    """
    waiting: deque[Future[Array]] = deque()
    with ThreadPoolExecutor(min(budget.workers, budget.ahead)) as pool, _one_blas_thread():
        try:
            for job in jobs:
                waiting.append(pool.submit(job))
                if len(waiting) >= budget.ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


@contextmanager
def _one_blas_thread() -> Iterator[None]:
    """Limit the BLAS library to one thread during the ``with`` block.

    Additional BLAS threads would compete with ttexport's worker threads. The products of low-rank factors would not be
    faster, because the products are memory-bound.
    """
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1, user_api="blas"):
        yield
