"""The host's memory, as far as this process may have it.

Containers and schedulers limit it by control groups, of which psutil knows nothing: what passes
their limit is killed, however much the machine has.
"""

from collections.abc import Iterator
from pathlib import Path

import psutil

OWN, ROOT = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")

_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_V2 = ("memory.max", "memory.current", "inactive_file")


def total_memory() -> int:
    """Bytes that this process may have together with those that share its limits."""
    return min([psutil.virtual_memory().total, *(limit for limit, _ in _limits())])


def free_memory() -> int:
    """Bytes that are not in use now; what is only kept of files counts as free."""
    free = [max(limit - used, 0) for limit, used in _limits()]
    return min([psutil.virtual_memory().available, *free])


def _limits() -> Iterator[tuple[int, int]]:
    """Limit and use of the control groups that this process is in and that have one."""
    for line in OWN.read_text().splitlines() if OWN.is_file() else ():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        root, names = (ROOT / "memory", _V1) if controllers else (ROOT, _V2)
        # Every group is limited by those above it, too. In a container the path may be the host's,
        # of which nothing is there, and the root is the container's own group.
        group = root / path.strip("/")
        for place in [group, *group.parents]:
            if place.is_relative_to(root) and (found := _limit(place, *names)):
                yield found


def _limit(group: Path, limit: str, use: str, dropped: str) -> tuple[int, int] | None:
    try:
        most, used = ((group / name).read_text().strip() for name in (limit, use))
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except OSError:
        return None
    return None if most == "max" else (int(most), int(used) - int(stat.get(dropped, 0)))
