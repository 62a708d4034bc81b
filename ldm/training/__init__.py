"""Everything that imports lightning: the modules that are trained, their EMA, optimizers and callbacks."""
