"""What a model costs, as providers quote it: by token, or by the hour of a machine of our own.

    TokenPrice(usd_per_1m_prompt_tokens=0.88, usd_per_1m_completion_tokens=0.88).usd(1_000_000, 0)    # 0.88

US dollars throughout. A price that nobody configured is None, never 0.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from flywheel_ray.values import Value


class TokenPrice(Value):
    """A price by token, as providers quote it, in US dollars per million tokens."""

    type: Literal["per_token"] = "per_token"
    usd_per_1m_prompt_tokens: float = Field(ge=0)
    usd_per_1m_completion_tokens: float = Field(ge=0)

    def usd(self, prompt_tokens: float, completion_tokens: float) -> float:
        """US dollars for so many tokens."""
        return (
            prompt_tokens * self.usd_per_1m_prompt_tokens + completion_tokens * self.usd_per_1m_completion_tokens
        ) / 1e6


class HourPrice(Value):
    """A price by machine hour, for a model we host: what an hour costs, spread over what it answers in one."""

    type: Literal["per_hour"] = "per_hour"
    usd_per_hour: float = Field(ge=0)
    requests_per_hour: float | None = Field(default=None, gt=0)
    """None: take the throughput that the evaluation reached."""


Price = Annotated[TokenPrice | HourPrice, Field(discriminator="type")]
