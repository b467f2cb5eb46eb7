"""`fastseg profile`: where the time of a training step goes.

`session` records steps of a real run, `timeline` reads what Nsight Systems or torch's profiler wrote, `summary` makes
figures of it, `layout` watches a step for changes of memory layout.
"""
