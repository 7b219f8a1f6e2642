"""Token buckets: so many at once, then so many a second. They know no clock: the time comes in."""

from __future__ import annotations

import math
from collections import OrderedDict


class Bucket:
    """A token bucket: `burst` at once, then `rate` a second."""

    def __init__(self, rate: float, burst: float) -> None:
        self._rate, self._burst, self._left, self._at = rate, burst, burst, 0.0

    def _fill(self, now: float) -> None:
        self._left, self._at = min(self._burst, self._left + (now - self._at) * self._rate), now

    def take(self, now: float, longest: float = math.inf) -> float:
        """Count one; returns how many seconds it has to wait. One that had to wait longer than `longest` is not counted."""
        self._fill(now)
        wait = max(0.0, (1 - self._left) / self._rate)
        if wait <= longest:
            self._left -= 1
        return wait

    def allow(self, now: float) -> bool:
        """Count one if there is room for it now; whether there was."""
        return self.take(now, 0.0) == 0.0


class Buckets:
    """A bucket for each of many keys that strangers choose; at most `most` are remembered, the least recently used go first."""

    def __init__(self, rate: float, burst: float, most: int = 4096) -> None:
        self._rate, self._burst, self._most = rate, burst, most
        self._buckets: OrderedDict[str, Bucket] = OrderedDict()

    def __len__(self) -> int:
        return len(self._buckets)

    def _of(self, key: str) -> Bucket:
        bucket = self._buckets.get(key)
        if bucket is None:
            bucket = self._buckets[key] = Bucket(self._rate, self._burst)
            if len(self._buckets) > self._most:
                self._buckets.popitem(last=False)
        self._buckets.move_to_end(key)
        return bucket

    def take(self, key: str, now: float, longest: float = math.inf) -> float:
        """`Bucket.take` of this key's bucket."""
        return self._of(key).take(now, longest)

    def allow(self, key: str, now: float) -> bool:
        """`Bucket.allow` of this key's bucket."""
        return self._of(key).allow(now)
