"""What an LM's error says: whether to ask again, and when.

Read off names and statuses: DSPy 3.4 wraps errors as its own, DSPy 3.1 lets litellm's through,
and an LM of another class may raise its client's.
"""

import math
from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from enum import StrEnum
from typing import Any

HOPELESS = frozenset(
    {
        # DSPy 3.4's names, and those of litellm, which DSPy 3.1 lets through.
        "LMAuthError",
        "LMBillingError",
        "LMConfigurationError",
        "LMNotConfiguredError",
        "LMUnsupportedModelError",
        "AuthenticationError",
        "PermissionDeniedError",
        "NotFoundError",
    }
)
"""Types of LM errors that neither a retry nor another example mends."""

_HOPELESS_STATUS = frozenset({401, 402, 403, 404})
_REFUSED = frozenset({"LMRateLimitError", "RateLimitError"})
_TIMED_OUT = frozenset({"LMTimeoutError", "APITimeoutError", "Timeout", "TimeoutError"})
_DOWN = frozenset(
    {
        "LMTransportError",
        "LMLockTimeoutError",
        "APIConnectionError",
        "ServiceUnavailableError",
        "BadGatewayError",
        "ConnectionError",
        "ConnectError",
        "TransportError",
    }
)
_BROKEN = frozenset({"LMServerError", "InternalServerError"})


class LmFailure(StrEnum):
    """What failed about an LM call."""

    REFUSED = "refused"
    """Too many requests: later."""
    TIMED_OUT = "timed_out"
    DOWN = "down"
    """No connection, or nobody behind it."""
    BROKEN = "broken"
    """The server's own error; perhaps of this call alone."""
    HOPELESS = "hopeless"
    """The key, the bill or the model."""
    ABANDONED = "abandoned"
    """Nobody waits for it any more."""
    OTHER = "other"
    """The server replied that it will not answer this one, or it was no server's failure."""


def lm_failure(error: BaseException) -> LmFailure:
    """What an LM's error says."""
    if not isinstance(error, Exception):
        return LmFailure.ABANDONED
    names = {kind.__name__ for kind in type(error).__mro__}
    status = getattr(error, "status", None) or getattr(error, "status_code", None)
    # OpenAI says that the account is empty with the status of too many requests.
    if names & HOPELESS or status in _HOPELESS_STATUS or "insufficient_quota" in str(error):
        return LmFailure.HOPELESS
    if names & _REFUSED or status == 429:
        return LmFailure.REFUSED
    if names & _TIMED_OUT or status in (408, 504):
        return LmFailure.TIMED_OUT
    if names & _DOWN or status in (502, 503):
        return LmFailure.DOWN
    if names & _BROKEN or (isinstance(status, int) and status >= 500):
        return LmFailure.BROKEN
    return LmFailure.OTHER


def retry_after_s(error: BaseException) -> float | None:
    """Seconds after which the server wants to be asked again; None where it did not say."""
    said = getattr(error, "retry_after", None)
    if said is None:
        headers = getattr(error, "litellm_response_headers", None)
        headers = headers or getattr(getattr(error, "response", None), "headers", None)
        said = headers.get("retry-after") if isinstance(headers, Mapping) else None
    return _seconds(said)


def _seconds(said: Any) -> float | None:
    try:
        seconds = float(said)
    except (TypeError, ValueError):
        try:
            seconds = (parsedate_to_datetime(said) - datetime.now(UTC)).total_seconds()
        except (TypeError, ValueError):
            return None
    return max(seconds, 0.0) if math.isfinite(seconds) else None
