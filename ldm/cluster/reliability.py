"""How often to save, and what failures cost: an exponential model of a job that any one node can stop.

M mean seconds between failures of the whole job, C seconds that a save holds the training up, R seconds from
a failure to the first new step, t seconds of training between saves.

Young, "A first order approximation to the optimum checkpoint interval", 1974; Daly, "A higher order estimate
of the optimum checkpoint interval for restart dumps", 2006, equations 13 and 37.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

# GPU-hours for each failure that stops a job. 29,500: Meta's RSC-1, 6.5 failures in 1,000 node-days of eight
# A100. Llama 3 405B: 50,700 (419 unexpected interruptions of 16,384 H100 in 54 days). A job of 1,024 GPUs on
# RSC failed every 7.9 h in fact, 8,100 GPU-hours.
GPU_HOURS = 29_500.0


@dataclass(frozen=True)
class Reliability:
    """How a job fails and comes back; seconds."""

    between: float  # M
    save: float  # C
    restart: float  # R

    def interval(self) -> float:
        """The best t: Daly's equation 37, which is Young's sqrt(2 C M) for saves that are short beside M."""
        if math.isinf(self.between):
            return math.inf
        if self.save >= 2 * self.between:
            return self.between
        x = math.sqrt(self.save / (2 * self.between))
        found = math.sqrt(2 * self.save * self.between) * (1 + x / 3 + x * x / 9) - self.save
        return max(found, 0.0)

    def goodput(self, interval: float) -> float:
        """Share of the time that trains, for good: t over the mean time that t of training takes.

        Daly's equation 13: M exp(R/M) (exp((t + C)/M) - 1). A failure loses what was trained since the last
        save; the restart can fail too.
        """
        if math.isinf(self.between):
            return interval / (interval + self.save) if not math.isinf(interval) else 1.0
        exponent = (self.restart + interval + self.save) / self.between
        if exponent > 700:
            return 0.0
        spent = self.between * math.exp(self.restart / self.between)
        return interval / (spent * math.expm1((interval + self.save) / self.between))

    def failures(self, trained: float, interval: float) -> float:
        """How many to expect until so many seconds are trained for good."""
        share = self.goodput(interval)
        return trained / share / self.between if share else math.inf


def between_failures(gpus: int, gpu_hours: float = GPU_HOURS) -> float:
    """Mean seconds between failures of a job of so many GPUs."""
    return gpu_hours * 3600 / gpus
