"""One Slurm for all tests of this folder."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from .cluster import Slurm, lacking

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.slurm)


@pytest.fixture(scope="session")
def slurm() -> Iterator[Slurm]:
    reason = lacking()
    if reason is not None:
        fail = pytest.fail if "REQUIRE_SLURM" in os.environ else pytest.skip
        fail(f"a Slurm of the tests' own needs {reason}")
    with tempfile.TemporaryDirectory(prefix="slurm-", dir="/tmp") as base, Slurm(Path(base)) as slurm:
        yield slurm
