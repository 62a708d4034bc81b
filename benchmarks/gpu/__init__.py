"""One GPU against the limits of the hardware and against peers: `python -m benchmarks.gpu`.

Needs torch and einops alone; diffusers is a peer where it can be imported. Without a GPU the same code runs
at toy size on the CPU, to see that it runs.
"""
