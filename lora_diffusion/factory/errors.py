"""What goes wrong for reasons that are no person's own."""

from __future__ import annotations


class DeviceError(RuntimeError):
    """The accelerator's memory is too small for the configuration: no fault of one person."""


class BrokenDeviceError(RuntimeError):
    """The accelerator's context is broken (CUDA error): only a new process heals it."""


class CommonFault(ValueError):
    """What fails whoever it is done for: base model, recogniser, configuration, memory. No fault of one person."""


def out_of_memory(error: BaseException) -> bool:
    """Python's, numpy's, torch's on a GPU, and torch's on a CPU, which is a plain RuntimeError."""
    names = ("OutOfMemoryError", "_ArrayMemoryError")
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ in names
        or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error))
    )
