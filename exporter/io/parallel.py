"""Computes blocks of rows in parallel and returns the blocks in order, whatever the number of threads."""

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
    """Limits the number of bytes of tensor data in memory at a time, and the number of threads."""

    memory_bytes: int = _DEFAULT_MEMORY_BYTES
    workers: int = min(4, os.cpu_count() or 1)

    @property
    def ahead(self) -> int:
        """Maximum number of blocks that are being computed or are waiting to be written at a time; at least 1."""
        return max(1, min(2 * self.workers, self.memory_bytes // (_COPIES * TOUCHED_BYTES)))

    @property
    def block_nbytes(self) -> int:
        """Peak memory of the blocks that are being computed or are waiting to be written."""
        return self.ahead * _COPIES * TOUCHED_BYTES


def in_order(jobs: Iterable[Callable[[], Array]], budget: Budget) -> Iterator[Array]:
    """Yield the results of ``jobs`` in order, while at most ``budget.ahead`` jobs are pending.

    Raises the first exception that a job raises.
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
    """Limit the BLAS library to one thread.

    Products of low-rank factors are memory-bound, and BLAS threads would compete with the worker threads of ttexport.
    """
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1, user_api="blas"):
        yield
