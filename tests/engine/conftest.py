"""What the tests of the connection and of the engine on top of it share."""

import pytest

FAST = {"FIRST_WAIT": 0.01, "LONGEST_WAIT": 0.02, "ATTEMPTS": 3, "READ_SECONDS": 20.0, "REPLY_SECONDS": 60.0}


@pytest.fixture
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bounds that fit a test, and no proxy between it and its server."""
    for name, value in FAST.items():
        monkeypatch.setattr(f"character.engine.connection.{name}", value)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
