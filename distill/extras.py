"""Packages that only some settings need: missing ones are said early, with what installs them."""

import importlib.util

from serve.errors import ConfigurationError


def require(package: str, setting: str, extra: str) -> None:
    """See that a package is there, without importing it.

    Args:
        package: Its name for ``import``.
        setting: What needs it, as a user writes it.
        extra: What of raydistill's optional dependencies brings it.

    Raises:
        ConfigurationError: It is not.
    """
    spec = importlib.util.find_spec(package)
    # A mere folder of the name, as W&B makes one of its own, can be imported but is nothing.
    if spec is None or spec.origin is None:
        raise ConfigurationError(
            f"{setting} needs the package {package}, which is not installed. Install it on every "
            f"node with pip install 'raydistill[{extra}]', or leave {setting} out."
        )
