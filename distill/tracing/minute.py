"""A sum that must stay under its limit over every sliding minute. Pure, and told the time."""

import heapq
import itertools
from dataclasses import dataclass

WINDOW_S = 60.0
POLL_S = 0.05


@dataclass
class Charge:
    """A part of the sum; free again a minute after it arrived."""

    amount: int
    freed: bool = False


class Minute:
    """The charges of a sliding minute.

    What was charged and has not arrived yet counts until it does: it may arrive at any time.
    All amounts are whole, since sums and differences of others drift.

    Args:
        limit: Of their sum; None is no limit.
    """

    def __init__(self, limit: int | None) -> None:
        self.limit = limit
        self.used = 0
        self._freeing: list[tuple[float, int, Charge]] = []
        self._order = itertools.count()

    def wait(self, now: float, amount: int) -> float | None:
        """Seconds until there may be room; None where there is room now.

        More than the limit has room when nothing else is there.
        """
        if self.limit is None or self.used + min(amount, self.limit) <= self.limit:
            return None
        if not self._freeing:
            return POLL_S
        return max(self._freeing[0][0] - now, POLL_S)

    def charge(self, amount: int) -> Charge:
        """Add to the sum; it is free again only after ``arrived`` or ``cancel``."""
        self.used += amount
        return Charge(amount)

    def arrived(self, charge: Charge, when: float) -> None:
        """Say when a charge arrived."""
        heapq.heappush(self._freeing, (when + WINDOW_S, next(self._order), charge))

    def cancel(self, charge: Charge) -> None:
        """Take back a charge that will not arrive."""
        self.used -= charge.amount

    def correct(self, charge: Charge, amount: int, now: float) -> None:
        """Say what an arrived charge has really been."""
        if not charge.freed:
            self.used += amount - charge.amount
            charge.amount = amount
        elif amount > charge.amount:
            self.arrived(self.charge(amount - charge.amount), now)

    def expire(self, now: float) -> None:
        """Free what arrived more than a minute ago."""
        while self._freeing and self._freeing[0][0] <= now:
            _, _, charge = heapq.heappop(self._freeing)
            charge.freed = True
            self.used -= charge.amount
