"""Networks F(x, time, conditioning); they are told numbers and know no diffusion."""
