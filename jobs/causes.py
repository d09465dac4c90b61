"""The error that a person can act on, inside the wrapping that a framework puts around it."""

from __future__ import annotations

# where exceptions, and those of Ray, keep what they were made from
_ATTRIBUTES = ("cause", "_base_exc", "controller_failure", "__cause__", "__context__")


def find_cause(
    error: BaseException, wanted: tuple[type[BaseException], ...], wrappers: tuple[type[BaseException], ...] = ()
) -> BaseException | None:
    """The first error of a type in ``wanted`` in or behind ``error``, breadth first; None if there is none.

    ``wrappers``: types that never count themselves. Ray's errors need it: they also inherit from the class that they wrap.
    """
    seen: set[int] = set()
    queue: list[BaseException | None] = [error]
    while queue:
        item = queue.pop(0)
        if item is None or id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, wanted) and not isinstance(item, wrappers):
            return item
        queue += [getattr(item, name, None) for name in _ATTRIBUTES]
        queue += getattr(item, "worker_failures", {}).values()
    return None
