"""Fixtures of the export room's tests."""

from __future__ import annotations

import pytest
from golden_cases import GoldenCase, load_case


@pytest.fixture(scope="session", params=["caseA", "caseB", "caseB2", "caseB3"])
def golden_case(request: pytest.FixtureRequest) -> GoldenCase:
    """Each golden ranking case."""
    return load_case(request.param)


@pytest.fixture(scope="session")
def case_a() -> GoldenCase:
    return load_case("caseA")
