"""A folder in, a consistent set of snapshots out, each with its step and profile.

Beside these names, the other packages use the module `sampling` (a sample of the snapshots'
values), which takes longer to import.
"""

from posthoc_cli.snapshots.folder import FolderContents as FolderContents
from posthoc_cli.snapshots.folder import read_folder as read_folder
from posthoc_cli.snapshots.folder import select as select
from posthoc_cli.snapshots.identity import Identity as Identity
from posthoc_cli.snapshots.identity import check_profiles as check_profiles
from posthoc_cli.snapshots.identity import identify as identify
from posthoc_cli.snapshots.kinds import SAME_WIDTH as SAME_WIDTH
from posthoc_cli.snapshots.kinds import gamma_of as gamma_of
from posthoc_cli.snapshots.names import Pattern as Pattern
from posthoc_cli.snapshots.names import compile_pattern as compile_pattern
from posthoc_cli.snapshots.names import read_name as read_name
from posthoc_cli.snapshots.snapshot import Contents as Contents
from posthoc_cli.snapshots.snapshot import Snapshot as Snapshot
from posthoc_cli.snapshots.wrappers import describe_wrappers as describe_wrappers
