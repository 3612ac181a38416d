"""The library: a folder of snapshots in, any other average out.

    run = open_snapshots("snapshots")
    solution = run.solve(sigma_rel=[0.05, 0.10])
    paths = solution.save("emas/ema-{sigma_rel}.safetensors")

This is the one pipeline: the command line, the trackers and `verify` go through it. Everything
raises PosthocError or one of its kinds, whose messages name files and arguments.
"""

from posthoc_cli.api.run import Run as Run
from posthoc_cli.api.run import open_snapshots as open_snapshots
from posthoc_cli.api.run import verify as verify
from posthoc_cli.api.solution import Progress as Progress
from posthoc_cli.api.solution import Solution as Solution
from posthoc_cli.api.solution import check_max_error as check_max_error
from posthoc_cli.solver import Profile as Profile
