"""Profiles in, weights out; knows no files.

What is imported here is cheap; `blup`, `estimates` and `reach` are imported where they are needed.
"""

from posthoc_cli.solver.methods import (
    METHODS,
    Method,
    SolvedWeights,
    check_method,
    default_method,
    methods_for,
    solve,
)
from posthoc_cli.solver.profiles import (
    MAX_SIGMA_REL,
    Average,
    Profile,
    decay,
    gamma_to_sigma_rel,
    sigma_rel_to_gamma,
)

__all__ = [
    "MAX_SIGMA_REL",
    "METHODS",
    "Average",
    "Method",
    "Profile",
    "SolvedWeights",
    "check_method",
    "decay",
    "default_method",
    "gamma_to_sigma_rel",
    "methods_for",
    "sigma_rel_to_gamma",
    "solve",
]
