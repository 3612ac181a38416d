"""Profiles in, weights out; knows no files.

What is imported here is cheap; `blup`, `estimates` and `reach` are imported where they are needed.
"""

from posthoc_cli.solver.averages import Decay as Decay
from posthoc_cli.solver.averages import Schedule as Schedule
from posthoc_cli.solver.averages import Scheduled as Scheduled
from posthoc_cli.solver.averages import read_average as read_average
from posthoc_cli.solver.methods import DEFAULT as DEFAULT
from posthoc_cli.solver.methods import METHODS as METHODS
from posthoc_cli.solver.methods import SolvedWeights as SolvedWeights
from posthoc_cli.solver.methods import choose_method as choose_method
from posthoc_cli.solver.methods import plain_method as plain_method
from posthoc_cli.solver.methods import solve as solve
from posthoc_cli.solver.methods import solve_apart as solve_apart
from posthoc_cli.solver.profiles import MAX_GAMMA as MAX_GAMMA
from posthoc_cli.solver.profiles import MAX_SIGMA_REL as MAX_SIGMA_REL
from posthoc_cli.solver.profiles import MIN_SIGMA_REL as MIN_SIGMA_REL
from posthoc_cli.solver.profiles import Average as Average
from posthoc_cli.solver.profiles import Profile as Profile
from posthoc_cli.solver.profiles import decay as decay
from posthoc_cli.solver.profiles import gamma_to_sigma_rel as gamma_to_sigma_rel
from posthoc_cli.solver.profiles import sigma_rel_to_gamma as sigma_rel_to_gamma
