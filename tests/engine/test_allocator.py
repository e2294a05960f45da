"""Thresholds of glibc's malloc."""

import platform

import pytest

from rescom_timm.engine import allocator


def test_thresholds_are_set_once_and_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in allocator.OWN:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(allocator, "thresholds", {})
    allocator.keep_freed_memory()
    expected = {"trim": 2**31 - 1, "mmap": 2**25} if platform.libc_ver()[0] == "glibc" else {}
    assert allocator.thresholds == expected


def test_an_allocator_of_the_environment_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allocator, "thresholds", {})
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "131072")
    allocator.keep_freed_memory()
    assert allocator.thresholds == {}
