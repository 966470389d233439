"""Settings of all tests."""

from hypothesis import HealthCheck, settings

# Time says something about the machine, not about the code.
settings.register_profile("raydistill", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("raydistill")
