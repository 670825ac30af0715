"""The errors of vattn, named for what the caller does next.

``ValueError`` and ``TypeError`` mean: fix the call. The three below are the others. Whatever is
raised, no active row has changed.
"""


class OutOfPagesError(MemoryError):
    """The physical memory of the budget cannot back the request: preempt one and call again.

    Parameters
    ----------
    message : str
        Names the pages needed, the pages free, and the remedy.
    needed : int
        Pages that the call needed in addition to those mapped.
    free : int
        Pages that it could have had, idle rows included.
    """

    def __init__(self, message: str, needed: int, free: int) -> None:
        super().__init__(message, needed, free)
        self.needed = needed
        self.free = free

    def __str__(self) -> str:
        return str(self.args[0])


class OutOfRowsError(MemoryError):
    """Every row holds a request: wait until one ends, or raise ``max_batch_size``."""


class DriverError(RuntimeError):
    """A call of the driver (CUDA's, or the kernel's on the host) failed: stop using this cache.

    The last 64 driver calls are in the log (stderr), and in :meth:`vattn.KVCache.recent_calls`.

    Parameters
    ----------
    message : str
        Names the call, its status and what it means.
    call : str
        The driver's own name of the function, such as ``"cuMemMap"``.
    code : int
        Its status: a ``CUresult``, or an ``errno`` on the host.
    """

    def __init__(self, message: str, call: str, code: int) -> None:
        super().__init__(message, call, code)
        self.call = call
        self.code = code

    def __str__(self) -> str:
        return str(self.args[0])
