"""Snapshots and weights in, outputs out: the plan, the engine with its sinks, and conversion.

`api` uses the modules `plan`, `outputs`, `memory`, `engine`, `recipe`, `paths` and `verification`;
`cli` uses `conversion` and `conversion_jobs`. They compile kernels, so each is imported when used.
"""
