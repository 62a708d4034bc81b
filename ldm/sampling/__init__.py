"""Around a pipeline: what is asked for, prompt files, grids, recipes, files. Nothing here draws."""
