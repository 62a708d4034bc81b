"""Noise schedulers: the process a network is trained for; stored with it, it serves training and sampling.

Not the distribution of training times nor a loss weight, which are settings of one run (denoiser.py). b
batch; t is the process's own time, [b] float; T the length of a table, N the number of sampling steps.
"""

from __future__ import annotations

import math
from bisect import bisect
from collections.abc import Iterable

import torch
from torch import Tensor

from ldm.diffusion.process import Level, Process, at_least_float32, spread
from ldm.types import GridRow


def _betas(schedule: str, steps: int, start: float, end: float) -> Tensor:
    """Noise added at each step of the chain, float64."""
    if schedule == "linear":  # 2006.11239
        return torch.linspace(start, end, steps, dtype=torch.float64, device="cpu")
    if schedule == "scaled_linear":  # linear in the root: latent diffusion
        return torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float64, device="cpu") ** 2
    if schedule == "cosine":  # equation 17 of 2102.09672, betas at most 0.999
        edge = torch.arange(steps + 1, dtype=torch.float64, device="cpu") / steps
        alpha_bar = torch.cos((edge + 0.008) / 1.008 * math.pi / 2) ** 2
        return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=0.999)
    raise ValueError(f"schedule={schedule} is none of linear, scaled_linear, cosine")


class VariancePreserving(Process):
    """DDPM and Stable Diffusion: alpha^2 + sigma^2 = 1 from a table of betas; t is the index, 0 to T - 1.

    Between indices alpha and sigma are linear along the chord and put back on the circle: smooth, exact at
    the indices, fine where alpha = 0, and `time_of` inverts it in closed form. Networks are trained at whole
    indices, so a grid tells them the nearest one while its alpha and sigma stay exact. Tables stay in
    float64; Stable Diffusion computed them so and stored them rounded to float32, 6e-8 away.

    Grids: uniform is linspace(0, T - 1) with both ends, trailing is T, T - T/N, ... minus 1, leading is
    multiples of floor(T / N) plus `steps_offset` (1 in Stable Diffusion 1 and 2; less where it would leave
    the table). All three are diffusers' `timestep_spacing`, with whole indices, but for uniform with one
    step, which is T - 1 here and 0 there. With zero terminal SNR use trailing: the levels next to alpha = 0
    are huge in sigma / alpha.
    """

    time_spacings = ("uniform", "leading", "trailing")
    clean_time = 0.0

    def __init__(
        self,
        num_train_timesteps: int = 1000,
        schedule: str = "scaled_linear",
        beta_start: float = 0.00085,
        beta_end: float = 0.012,
        zero_terminal_snr: bool = False,
        prediction_type: str = "epsilon",
        steps_offset: int = 0,
    ) -> None:
        super().__init__(prediction_type)
        if num_train_timesteps < 3:
            raise ValueError(f"num_train_timesteps={num_train_timesteps} is below 3")
        if not 0 < beta_start <= beta_end < 1:
            raise ValueError(f"beta_start={beta_start}, beta_end={beta_end} are not 0 < start <= end < 1")
        self.num_train_timesteps, self.steps_offset = num_train_timesteps, steps_offset
        self.schedule, self.beta_start, self.beta_end = schedule, beta_start, beta_end
        self.zero_terminal_snr = zero_terminal_snr
        alpha_bar = torch.cumprod(1 - _betas(schedule, num_train_timesteps, beta_start, beta_end), 0)
        if zero_terminal_snr:  # algorithm 1 of 2305.08891: shift and stretch sqrt(alpha_bar) to end at 0
            root = alpha_bar.sqrt()
            alpha_bar = ((root - root[-1]) * (root[0] / (root[0] - root[-1]))) ** 2
        table = torch.stack([alpha_bar.sqrt(), (1 - alpha_bar).sqrt()])  # [2 T]: alpha, sigma
        self._table64, self._tables = table, dict[tuple[torch.device, torch.dtype], Tensor]()
        self._rows = [GridRow(float(i), *level) for i, level in enumerate(table.T.tolist())]
        self.first = self._rows[-1]
        finite = self._rows[-2] if self.first.alpha == 0 else self.first
        self.most, self.least = finite.sigma / finite.alpha, self._rows[0].sigma / self._rows[0].alpha
        self._refuse_silent_prediction()

    def _table(self, like: Tensor) -> Tensor:
        """The table on a device, copied there once."""
        key = (like.device, like.dtype)
        if key not in self._tables:
            self._tables[key] = self._table64.to(like.dtype).to(like.device)
        return self._tables[key]

    def _levels(self, t: Tensor) -> Tensor:
        """alpha and sigma, [2 b]; t outside the table counts as its end."""
        t = at_least_float32(t)
        table = self._table(t)
        low = t.detach().floor().clamp(0, self.num_train_timesteps - 2)
        index = low.to(torch.int64)
        levels = torch.lerp(table[:, index], table[:, index + 1], (t - low).clamp(0, 1))
        return levels / (levels**2).sum(0).sqrt()

    def alpha(self, t: Tensor) -> Tensor:
        return self._levels(t)[0]

    def sigma(self, t: Tensor) -> Tensor:
        return self._levels(t)[1]

    def time_at(self, u: Tensor) -> Tensor:
        """Whole indices, as floats."""
        return (at_least_float32(u) * self.num_train_timesteps).floor().clamp(0, self.num_train_timesteps - 1)

    def position_of(self, t: Tensor) -> Tensor:
        """The middle of the index's share of (0, 1)."""
        return (at_least_float32(t) + 0.5) / self.num_train_timesteps

    def time_of(self, log_snr: Tensor) -> Tensor:
        """A log-SNR outside the table counts as its end."""
        ratio = (at_least_float32(log_snr) / 2).exp()
        alpha, sigma = self._table(ratio)
        index = torch.searchsorted(-(alpha / sigma), -ratio) - 1
        index = index.clamp(0, self.num_train_timesteps - 2)
        low_alpha, low_sigma = alpha[index], sigma[index]
        rise, fall = sigma[index + 1] - low_sigma, low_alpha - alpha[index + 1]
        return index + ((low_alpha - ratio * low_sigma) / (ratio * rise + fall)).clamp(0, 1)

    def model_time(self, t: Tensor) -> Tensor:
        return at_least_float32(t)

    def _row_of(self, ratio: float) -> GridRow:
        """`time_of` in floats: samplers may ask for rows, and no device is to be waited for."""
        above = bisect(self._rows, ratio, 1, len(self._rows) - 1, key=lambda row: row.sigma / row.alpha)
        low, high = self._rows[above - 1], self._rows[above]
        rise, fall = high.sigma - low.sigma, low.alpha - high.alpha
        past = (ratio * low.alpha - low.sigma) / (rise + ratio * fall)
        alpha = 1 / math.hypot(1, ratio)
        return GridRow(float(above - 1 + round(min(max(past, 0.0), 1.0))), alpha, ratio * alpha)

    def _time_rows(self, num_steps: int, spacing: str) -> Iterable[GridRow]:
        total = self.num_train_timesteps
        if num_steps > total:
            raise ValueError(f"spacing={spacing}: num_steps={num_steps} exceeds num_train_timesteps={total}")
        if spacing == "uniform":
            stride = (total - 1) / max(num_steps - 1, 1)
            indices = [total - 1, *(round(stride * i) for i in reversed(range(num_steps - 1)))]
        elif spacing == "trailing":
            indices = [round(total - i * (total / num_steps)) - 1 for i in range(num_steps)]
        else:
            last = (total // num_steps) * (num_steps - 1)
            offset = min(self.steps_offset, total - 1 - last)
            indices = [i + offset for i in range(last, -1, -(total // num_steps))]
        return [self._rows[i] for i in indices]


class EDM(Process):
    """Karras et al. (2206.00364): alpha = 1; t = ln(sigma).

    Grids: uniform is even in ln(sigma), as log_snr is; leading and trailing belong to tables and are refused.
    """

    time_spacings = ("uniform",)

    def __init__(
        self,
        sigma_min: float = 0.004,
        sigma_max: float = 160.0,
        sigma_data: float = 1.0,
        prediction_type: str = "edm",
    ) -> None:
        super().__init__(prediction_type, sigma_data)
        if not 0 < sigma_min < sigma_max:
            raise ValueError(
                f"sigma_min={sigma_min}, sigma_max={sigma_max} are not 0 < sigma_min < sigma_max"
            )
        self.least, self.most = sigma_min, sigma_max
        self.first = self._row_of(sigma_max)
        self.clean_time = self._row_of(sigma_min).model_time
        self._refuse_silent_prediction()

    def alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(at_least_float32(t))

    def sigma(self, t: Tensor) -> Tensor:
        return at_least_float32(t).exp()

    def time_at(self, u: Tensor) -> Tensor:
        """Even in ln(sigma)."""
        low, high = math.log(self.least), math.log(self.most)
        return low + (high - low) * at_least_float32(u)

    def position_of(self, t: Tensor) -> Tensor:
        low, high = math.log(self.least), math.log(self.most)
        return (at_least_float32(t) - low) / (high - low)

    def time_of(self, log_snr: Tensor) -> Tensor:
        return at_least_float32(log_snr) / -2

    def model_time(self, t: Tensor) -> Tensor:
        return at_least_float32(t) / 4

    def input_scale_of(self, sigma: Level) -> Level:
        """1 / sqrt(sigma^2 + sd^2): unit variance where the latents' is sd^2."""
        return 1 / (sigma**2 + self.sigma_data**2) ** 0.5

    def _row_of(self, ratio: float) -> GridRow:
        return GridRow(math.log(ratio) / 4, 1.0, ratio)

    def _time_rows(self, num_steps: int, spacing: str) -> Iterable[GridRow]:
        return map(self._row_of, spread(num_steps, self.most, self.least, math.log, math.exp))


class RectifiedFlow(Process):
    """Straight paths (2209.03003): alpha = 1 - t, sigma = t; model_time = num_train_timesteps * t.

    `shift` s moves uniform positions towards noise, t' = s t / (1 + (s - 1) t) (2403.03206), in training and
    in grids. Grids: uniform and trailing are 1, 1 - 1/N, ..., 1/N, shifted; leading is refused, for it would
    begin off the prior and call the network at no noise. `most` and `least` are at 1/num_train_timesteps from
    the ends.
    """

    time_spacings = ("uniform", "trailing")
    clean_time = 0.0

    def __init__(
        self, shift: float = 1.0, prediction_type: str = "flow", num_train_timesteps: int = 1000
    ) -> None:
        super().__init__(prediction_type)
        if shift <= 0 or num_train_timesteps < 3:
            raise ValueError(f"shift={shift} is not above 0, or {num_train_timesteps=} is below 3")
        self.shift, self.num_train_timesteps = shift, num_train_timesteps
        self.first = self._row_at(1.0)
        self.most = shift * (num_train_timesteps - 1)  # a shift multiplies sigma / alpha
        self.least = shift / (num_train_timesteps - 1)
        self._refuse_silent_prediction()

    def _shifted(self, u: Level) -> Level:
        return self.shift * u / (self.shift * u + (1 - u))  # exactly 1 at 1

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - at_least_float32(t)

    def sigma(self, t: Tensor) -> Tensor:
        return at_least_float32(t)

    def time_at(self, u: Tensor) -> Tensor:
        return self._shifted(at_least_float32(u))

    def position_of(self, t: Tensor) -> Tensor:
        t = at_least_float32(t)
        return t / (t + self.shift * (1 - t))

    def time_of(self, log_snr: Tensor) -> Tensor:
        return torch.sigmoid(at_least_float32(log_snr) / -2)

    def model_time(self, t: Tensor) -> Tensor:
        return self.num_train_timesteps * at_least_float32(t)

    def _row_at(self, t: float) -> GridRow:
        return GridRow(self.num_train_timesteps * t, 1 - t, t)

    def _row_of(self, ratio: float) -> GridRow:
        return GridRow(self.num_train_timesteps * ratio / (1 + ratio), 1 / (1 + ratio), ratio / (1 + ratio))

    def _time_rows(self, num_steps: int, spacing: str) -> Iterable[GridRow]:
        return [self._row_at(self._shifted(1 - i / num_steps)) for i in range(num_steps)]
