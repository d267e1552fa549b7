"""docs/hmm-5.1.md: every name of the series is there, and every name of ours that it mentions exists."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import pymirror as pm

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "hmm-5.1.md").read_text()
SERIES = re.findall(
    r"\w+",
    """
    hmm hmm_mirror hmm_mirror_ops hmm_update hmm_range hmm_pfn_flag_e hmm_pfn_value_e HMM_UPDATE_INVALIDATE
    HMM_PFN_VALID HMM_PFN_WRITE HMM_PFN_DEVICE_PRIVATE HMM_PFN_ERROR HMM_PFN_NONE HMM_PFN_SPECIAL
    pfns flags values default_flags pfn_flags_mask page_shift pfn_shift valid
    hmm_mirror_register hmm_mirror_unregister sync_cpu_device_pagetables release
    hmm_mirror_mm_is_alive hmm_mirror_mm_down_read hmm_mirror_mm_up_read
    hmm_range_register hmm_range_unregister hmm_range_wait_until_valid HMM_RANGE_DEFAULT_TIMEOUT
    hmm_range_valid hmm_range_snapshot hmm_range_fault hmm_range_dma_map hmm_range_dma_unmap
    hmm_vma_fault hmm_vma_range_done
    hmm_device_entry_to_page hmm_device_entry_to_pfn hmm_device_entry_from_page hmm_device_entry_from_pfn
    hmm_pfn_to_pfn hmm_devmem_add
    """,
)


@pytest.mark.parametrize("name", SERIES)
def test_each_name_of_the_series_is_told(name: str) -> None:
    assert re.search(rf"`[^`]*\b{name}\b[^`]*`", PAGE), name


def test_each_name_of_ours_exists() -> None:
    named = {match[1] for match in re.finditer(r"\bpm\.(\w+)", PAGE)}
    assert named
    assert [name for name in named if not hasattr(pm, name)] == []


def test_each_method_of_ours_exists() -> None:
    for owner in ("Mirror", "Range"):
        named = {match[1] for match in re.finditer(rf"`{owner}\.(\w+)", PAGE)}
        assert named
        assert [name for name in named if not hasattr(getattr(pm, owner), name)] == []


def test_the_example_shows_what_the_valid_flag_does_not_see() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "valid_flag_aba.py")],
        capture_output=True,
        text=True,
        timeout=50,
        check=True,
    )
    said = dict(re.findall(r"^  (.+?): +(True|False)$", done.stdout, re.MULTILINE))
    assert said == {
        "5.1's flag says valid": "True",
        "the sequence says valid": "False",
        "programming is refused": "True",
        "looked at again, it maps": "True",
    }
