"""What memory is left: the machine's, or the container's where that is less."""

import pytest

from hstu_trt.tables.memory import available_memory

GIB = 1 << 30
# group of the process, files of the groups -> GiB left of the machine's 64
CASES = {
    "no groups": ("", {}, 64),
    "no limit": ("0::/", {"memory.max": "max", "memory.current": 5 * GIB}, 64),
    "a container": ("0::/", {"memory.max": 8 * GIB, "memory.current": 5 * GIB}, 3),
    "cached files give way": (
        "0::/",
        {"memory.max": 8 * GIB, "memory.current": 5 * GIB, "memory.stat": f"anon 1\ninactive_file {2 * GIB}"},
        5,
    ),
    "more than the machine has": ("0::/", {"memory.max": 900 * GIB, "memory.current": 0}, 64),
    "the limit of a group above": (
        "0::/a/b",
        {"a/b/memory.max": "max", "a/memory.max": 9 * GIB, "a/memory.current": 8 * GIB, "a/b/memory.current": 1},
        1,
    ),
    "beyond its limit": ("0::/", {"memory.max": GIB, "memory.current": 2 * GIB}, 0),
    "version 1": (
        "7:cpu,memory:/docker/x\n3:pids:/",
        {"memory/memory.limit_in_bytes": 4 * GIB, "memory/memory.usage_in_bytes": GIB},
        3,
    ),
}


@pytest.mark.parametrize(("group", "files", "left"), CASES.values(), ids=CASES)
def test_the_smaller_of_machine_and_container_counts(tmp_path, group, files, left):
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text(f"MemTotal: 99 kB\nMemAvailable:  {64 << 20} kB\n")
    (tmp_path / "proc/self/cgroup").write_text(group)
    for name, content in files.items():
        path = tmp_path / "groups" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{content}\n")
    assert available_memory(tmp_path / "proc", tmp_path / "groups") == left * GIB


def test_this_machine_has_some():
    assert available_memory() > 1 << 20
