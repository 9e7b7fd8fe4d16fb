from typing import Any

import pytest

from m2f_video.ops import cpu_kernels


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels that have been called."""
    names: list[str] = []
    call = cpu_kernels.call

    def recorded(name: str, *args: Any) -> None:
        names.append(name)
        call(name, *args)

    monkeypatch.setattr(cpu_kernels, "call", recorded)
    return names
