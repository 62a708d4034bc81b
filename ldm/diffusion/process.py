"""What every noise scheduler shares: x_t = alpha_t * latents + sigma_t * noise, and a network's prediction F.

Not a process itself (noise_scheduler.py), not a solver, not a loss. b batch; t is the process's own time, [b]
float; a level is a pair (alpha, sigma): floats of a grid row, or tensors that broadcast with the latents.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor

from ldm.types import Grid, GridRow

Level = TypeVar("Level", float, Tensor)


# A prediction type is a pair (a, b): the network is asked for F = a * latents + b * noise.


def _epsilon(alpha: Level, sigma: Level, sd: float) -> tuple[Level, Level]:
    return 0.0 * alpha, 0.0 * alpha + 1.0


def _sample(alpha: Level, sigma: Level, sd: float) -> tuple[Level, Level]:
    return 0.0 * alpha + 1.0, 0.0 * alpha


def _v_prediction(alpha: Level, sigma: Level, sd: float) -> tuple[Level, Level]:
    """Salimans and Ho (2202.00512)."""
    norm = (alpha**2 + sigma**2) ** 0.5
    return -sigma / norm, alpha / norm


def _flow(alpha: Level, sigma: Level, sd: float) -> tuple[Level, Level]:
    """The velocity of a straight path from latents to noise (2209.03003, 2210.02747)."""
    return 0.0 * alpha - 1.0, 0.0 * alpha + 1.0


def _edm(alpha: Level, sigma: Level, sd: float) -> tuple[Level, Level]:
    """Karras et al. (2206.00364), where alpha = 1; elsewhere, as there, the part uncorrelated with x_t."""
    norm = (sigma**2 + (sd * alpha) ** 2) ** 0.5
    return sigma / (sd * norm), -sd * alpha / norm


PREDICTIONS: dict[str, Callable[[Any, Any, float], tuple[Any, Any]]] = {
    "epsilon": _epsilon,
    "v_prediction": _v_prediction,
    "sample": _sample,
    "flow": _flow,
    "edm": _edm,
}


Curve = Callable[[float], float]


def spread(num_steps: int, most: float, least: float, curve: Curve, inverse: Curve) -> list[float]:
    """Numbers from most to least that `curve` makes even; both ends exact, a single one is `most`."""
    first, last = curve(most), curve(least)
    inner = [inverse(first + (last - first) * i / (num_steps - 1)) for i in range(1, num_steps - 1)]
    return [most, *inner, least][:num_steps]


# What each spacing by level makes even, of sigma / alpha; karras is equation 5 of 2206.00364 with rho = 7.
LEVEL_SPACINGS: dict[str, tuple[Curve, Curve]] = {
    "karras": (lambda ratio: ratio ** (1 / 7), lambda root: root**7),
    "log_snr": (math.log, math.exp),
}


class Process(ABC):
    """A noise process: the prediction pair and its algebra, and the shape of a grid.

    A subclass sets `first` (the noisiest row of any grid), `most` and `least` (the ends of sigma / alpha that
    grids by level use, finite) and `clean_time` (told at the clean last row, where no solver asks).
    """

    first: GridRow
    most: float
    least: float
    clean_time: float
    time_spacings: tuple[str, ...]

    def __init__(self, prediction_type: str, sigma_data: float = 1.0) -> None:
        if prediction_type not in PREDICTIONS:
            raise ValueError(f"prediction_type={prediction_type} is none of {', '.join(PREDICTIONS)}")
        self.prediction_type, self.sigma_data = prediction_type, sigma_data

    def _refuse_silent_prediction(self) -> None:
        """Raise where F at the first level is a multiple of x_t, so that it tells nothing of the latents."""
        if self.determinant(self.first.alpha, self.first.sigma) == 0:
            raise ValueError(
                f"prediction_type={self.prediction_type} is mute at alpha={self.first.alpha}, "
                f"where {type(self).__name__} begins; choose v_prediction, sample, flow or edm"
            )

    # The process, for tensors of times: float32 at least, float64 in float64.

    @abstractmethod
    def alpha(self, t: Tensor) -> Tensor: ...

    @abstractmethod
    def sigma(self, t: Tensor) -> Tensor: ...

    @abstractmethod
    def time_at(self, u: Tensor) -> Tensor:
        """Position u in (0, 1), clean to noisy, to time."""

    @abstractmethod
    def position_of(self, t: Tensor) -> Tensor:
        """Inverse of time_at, to the nearest index where times are whole."""

    @abstractmethod
    def time_of(self, log_snr: Tensor) -> Tensor:
        """Inverse of log_snr(t)."""

    @abstractmethod
    def model_time(self, t: Tensor) -> Tensor:
        """What the network is told of t."""

    def log_snr(self, t: Tensor) -> Tensor:
        """log(alpha^2 / sigma^2); -inf where alpha = 0."""
        return 2 * (self.alpha(t).log() - self.sigma(t).log())

    def input_scale(self, t: Tensor) -> Tensor:
        """Factor on x_t where it enters the network."""
        return self.input_scale_of(self.sigma(t))

    def input_scale_of(self, sigma: Level) -> Level:
        """`input_scale` of a level, float or tensor."""
        return 0.0 * sigma + 1.0

    # The prediction, for levels: floats (of a grid row), or tensors that broadcast with the latents.

    def pair(self, alpha: Level, sigma: Level) -> tuple[Level, Level]:
        """(a, b) of F = a * latents + b * noise."""
        return PREDICTIONS[self.prediction_type](alpha, sigma, self.sigma_data)

    def determinant(self, alpha: Level, sigma: Level) -> Level:
        """m = b * alpha - a * sigma of the system (F, x_t) -> (latents, noise)."""
        a, b = self.pair(alpha, sigma)
        return b * alpha - a * sigma

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(a, b) at time t."""
        return self.pair(self.alpha(t), self.sigma(t))

    def clean_from_output(self, x: Tensor, output: Tensor, alpha: Level, sigma: Level) -> Tensor:
        """(b * x - sigma * F) / m."""
        _, b = self.pair(alpha, sigma)
        m = self.determinant(alpha, sigma)
        return mixed(b / m, x, -sigma / m, output)

    def noise_from_output(self, x: Tensor, output: Tensor, alpha: Level, sigma: Level) -> Tensor:
        """(alpha * F - a * x) / m."""
        a, _ = self.pair(alpha, sigma)
        m = self.determinant(alpha, sigma)
        return mixed(alpha / m, output, -a / m, x)

    def output_from_clean(self, x: Tensor, clean: Tensor, alpha: Level, sigma: Level) -> Tensor:
        """(b * x - m * clean) / sigma, the F that says `clean`."""
        _, b = self.pair(alpha, sigma)
        m = self.determinant(alpha, sigma)
        return mixed(b / sigma, x, -m / sigma, clean)

    def weight_of_clean(self, t: Tensor) -> Tensor:
        """sigma^2 / m^2: weight in output space of a squared error of the clean estimate."""
        alpha, sigma = self.alpha(t), self.sigma(t)
        return (sigma / self.determinant(alpha, sigma)) ** 2

    def weight_of_noise(self, t: Tensor) -> Tensor:
        """alpha^2 / m^2: weight in output space of a squared error of the noise estimate."""
        alpha, sigma = self.alpha(t), self.sigma(t)
        return (alpha / self.determinant(alpha, sigma)) ** 2

    # Grids.

    @abstractmethod
    def _row_of(self, ratio: float) -> GridRow:
        """The row at sigma / alpha = ratio."""

    @abstractmethod
    def _time_rows(self, num_steps: int, spacing: str) -> Iterable[GridRow]:
        """`num_steps` noisy rows of a spacing in `time_spacings`."""

    def grid(self, num_steps: int, spacing: str) -> Grid:
        """`num_steps` rows from most to least noise, then the clean row alpha = 1, sigma = 0.

        uniform, leading, trailing are even in time (see the class); karras (rho = 7) and log_snr are even in
        a function of sigma / alpha between `most` and `least`. Where the process begins at alpha = 0 those
        two begin there as well, the only start whose prior is exact, and spread the other rows from `most`.
        """
        if num_steps < 1:
            raise ValueError(f"num_steps={num_steps} is below 1")
        if spacing in LEVEL_SPACINGS:
            head = [self.first] if self.first.alpha == 0 else []
            ratios = spread(num_steps - len(head), self.most, self.least, *LEVEL_SPACINGS[spacing])
            rows: Iterable[GridRow] = [*head, *map(self._row_of, ratios)]
        elif spacing in self.time_spacings:
            rows = self._time_rows(num_steps, spacing)
        else:
            known = ", ".join([*self.time_spacings, *LEVEL_SPACINGS])
            raise ValueError(f"spacing={spacing} is not for {type(self).__name__}; choose one of {known}")
        return Grid([*rows, GridRow(self.clean_time, 1.0, 0.0)], self._row_of)


def mixed(a: Level, x: Tensor, b: Level, y: Tensor) -> Tensor:
    """a x + b y; of floats by two operations."""
    return torch.add(a * x, y, alpha=b) if isinstance(b, float) else a * x + b * y


def at_least_float32(t: Tensor) -> Tensor:
    """Times are computed in float32, or in float64 where they come so."""
    return t.to(torch.promote_types(t.dtype, torch.float32))
