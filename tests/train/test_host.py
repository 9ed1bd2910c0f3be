"""What memory a process may have: the machine's, or less where a control group says so."""

from types import SimpleNamespace

import psutil
import pytest

from train import host

GIB = 2**30


@pytest.fixture
def groups(tmp_path, monkeypatch):
    """A machine of 64 GiB with 48 free; writes its control groups, and which this process is in."""
    memory = SimpleNamespace(total=64 * GIB, available=48 * GIB)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    monkeypatch.setattr(host, "OWN", tmp_path / "own")
    monkeypatch.setattr(host, "ROOT", tmp_path / "root")

    def write(own, groups):
        (tmp_path / "own").write_text(own)
        for place, files in groups.items():
            (tmp_path / "root" / place).mkdir(parents=True, exist_ok=True)
            for name, text in files.items():
                (tmp_path / "root" / place / name).write_text(f"{text}\n")

    return write


def v2(limit, used, files=0):
    return {
        "memory.max": limit, "memory.current": used, "memory.stat": f"anon 7\ninactive_file {files}"
    }  # fmt: skip


def v1(limit, used, files=0):
    return {
        "memory.limit_in_bytes": limit, "memory.usage_in_bytes": used,
        "memory.stat": f"inactive_file 1\ntotal_inactive_file {files}",
    }  # fmt: skip


def found():
    return host.total_memory() / GIB, host.free_memory() / GIB


def test_a_machine_without_groups(groups):
    assert found() == (64, 48)
    groups("0::/\n", {".": {"cgroup.procs": "1"}})
    assert found() == (64, 48)
    groups("0::/job\n", {"job": v2("max", 5 * GIB)})
    assert found() == (64, 48)


def test_a_container(groups):
    groups("0::/\n", {".": v2(8 * GIB, 6 * GIB, files=GIB)})
    assert found() == (8, 3)


def test_every_group_above_is_a_limit(groups):
    groups("0::/user/job\n", {"user": v2(16 * GIB, 15 * GIB), "user/job": v2(12 * GIB, GIB)})
    assert found() == (12, 1)


def test_a_group_over_its_limit_has_nothing_free(groups):
    groups("0::/\n", {".": v2(8 * GIB, 9 * GIB)})
    assert found() == (8, 0)


def test_the_older_version(groups):
    own = "9:name=systemd:/\n4:memory:/job\n1:cpu,cpuacct:/job\n0::/\n"
    groups(own, {"memory/job": v1(8 * GIB, 6 * GIB, files=GIB), "cpu,cpuacct/job": v1(1, 1)})
    assert found() == (8, 3)
    groups(own, {"memory/job": v1(0x7FFFFFFFFFFFF000, 6 * GIB)})  # what it says of no limit
    assert found() == (64, 48)


def test_a_container_of_the_older_version_is_told_the_host_s_path(groups):
    groups("4:memory,hugetlb:/kubepods/pod7\n", {"memory": v1(4 * GIB, GIB)})
    assert found() == (4, 3)
