"""Who calls, and how much more each may ask for; refusals are 429s that say when to come again.

A caller is the name of a key; where no keys are set everybody is one caller.  Knows nothing about requests.
"""

from helix_gateway.gateway.errors import ApiError, duration, no_room
from helix_gateway.gateway.limits.bucket import Bucket
from helix_gateway.gateway.settings import GatewaySettings

BUSY_RETRY_S = 1.0
"""What a caller with too many requests at once is told to wait: nobody knows when one of them ends."""


class Caller:
    """One caller's budget."""

    def __init__(self, settings: GatewaySettings) -> None:
        self._requests = None if settings.rate_limit is None else Bucket(settings.rate_limit)
        self._tokens = None if settings.token_rate_limit is None else Bucket(settings.token_rate_limit)
        self._most_at_once = settings.concurrency_limit
        self.in_flight = 0

    def enter(self) -> None:
        """Count a request, until it is told that it `leave`s.

        Raises:
            ApiError: 429; nothing was counted.
        """
        self._refuse_if_over()
        if self._requests is not None:
            self._requests.take(1)
        self.in_flight += 1

    def leave(self, tokens: int) -> None:
        """A request has ended, which cost so many tokens; see `enter`."""
        self.in_flight -= 1
        if self._tokens is not None:
            self._tokens.take(tokens)

    def headers(self) -> dict[str, str]:
        """OpenAI's ``x-ratelimit-…`` for the rates that are limited."""
        if self._requests is None and self._tokens is None:
            return {}
        rates = (("requests", self._requests), ("tokens", self._tokens))
        return {name: value for unit, bucket in rates if bucket for name, value in _rate_headers(unit, bucket).items()}

    def _refuse_if_over(self) -> None:
        if self._most_at_once is not None and self.in_flight >= self._most_at_once:
            raise self._refusal(f"at most {self._most_at_once} at once are answered", BUSY_RETRY_S)
        for unit, bucket in (("requests", self._requests), ("tokens", self._tokens)):
            if bucket is not None and (wait_s := bucket.wait_s(1.0)) > 0:
                raise self._refusal(f"the {bucket.per_minute} {unit} of a minute are used up", wait_s)

    def _refusal(self, what: str, wait_s: float) -> ApiError:
        message = f"Too many requests: {what}. Try again in {duration(wait_s)}."
        return ApiError.too_many(message, {**no_room(wait_s), **self.headers()})


def _rate_headers(unit: str, bucket: Bucket) -> dict[str, str]:
    return {
        f"x-ratelimit-limit-{unit}": str(bucket.per_minute),
        f"x-ratelimit-remaining-{unit}": str(bucket.remaining),
        f"x-ratelimit-reset-{unit}": duration(bucket.reset_s),
    }


class Callers:
    """Every caller so far; there are no more of them than keys."""

    def __init__(self, settings: GatewaySettings) -> None:
        self._settings = settings
        self._callers: dict[str | None, Caller] = {}

    def of(self, key_name: str | None) -> Caller:
        """The caller of that key; None: where no keys are set."""
        if key_name not in self._callers:
            self._callers[key_name] = Caller(self._settings)
        return self._callers[key_name]
