"""Other tools' files as tables of tensors that say where in the file each lies.

`networks.READERS` is the table of formats; what they answer with is a TensorIndex.
"""

from posthoc_cli.formats.checkpoint import Checkpoint as Checkpoint
from posthoc_cli.formats.checkpoint import is_beside as is_beside
from posthoc_cli.formats.checkpoint import state_dict as state_dict
from posthoc_cli.formats.distributed import holds_distributed as holds_distributed
from posthoc_cli.formats.distributed import is_distributed as is_distributed
from posthoc_cli.formats.files import as_snapshot as as_snapshot
from posthoc_cli.formats.files import index_of_shard as index_of_shard
from posthoc_cli.formats.files import list_checkpoints as list_checkpoints
from posthoc_cli.formats.files import of_training as of_training
from posthoc_cli.formats.files import preferred as preferred
from posthoc_cli.formats.files import without_ending as without_ending
from posthoc_cli.formats.networks import AS_USUAL as AS_USUAL
from posthoc_cli.formats.networks import How as How
from posthoc_cli.formats.networks import find_checkpoint as find_checkpoint
from posthoc_cli.formats.networks import is_there as is_there
from posthoc_cli.formats.networks import open_network as open_network
from posthoc_cli.formats.ranks import in_ranks as in_ranks
from posthoc_cli.formats.sharding import METADATA as METADATA
from posthoc_cli.formats.tensors import StoredTensor as StoredTensor
from posthoc_cli.formats.tools import DEFAULT_UPDATE_EVERY as DEFAULT_UPDATE_EVERY
from posthoc_cli.formats.tools import KINDS as KINDS
from posthoc_cli.formats.tools import averaged_steps as averaged_steps
from posthoc_cli.formats.tools import effective_gamma as effective_gamma
from posthoc_cli.formats.torchfile import read_checkpoint as read_checkpoint
