"""Fixtures of the training tests."""

from pathlib import Path

import pytest

from tests.training.tiny_run import train


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that was never stopped."""
    output = tmp_path_factory.mktemp("whole")
    train(output)
    return output
