"""Settings of all tests."""

import os

from hypothesis import HealthCheck, settings

settings.register_profile(
    "raydistill",
    # Time says something about the machine, not about the code.
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    # New examples are looked for where somebody sees what they break.
    derandomize="CI" in os.environ,
)
settings.load_profile("raydistill")
