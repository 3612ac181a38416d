"""Bytes on disk: safetensors files and shards, read and written whole or not at all.

Beside these names, the other packages use the modules `atomic` (files that appear whole), `disk`
(folders and single files), `dtypes`, `metadata` (its keys) and `workers` (threads).
"""

from posthoc_cli.storage.header import Cache as Cache
from posthoc_cli.storage.header import Content as Content
from posthoc_cli.storage.header import File as File
from posthoc_cli.storage.header import Part as Part
from posthoc_cli.storage.header import TensorIndex as TensorIndex
from posthoc_cli.storage.header import TensorInfo as TensorInfo
from posthoc_cli.storage.header import make_header as make_header
from posthoc_cli.storage.header import read_header as read_header
from posthoc_cli.storage.header import spans as spans
from posthoc_cli.storage.layout import fits_any as fits_any
from posthoc_cli.storage.readers import Reader as Reader
from posthoc_cli.storage.readers import fingerprint as fingerprint
from posthoc_cli.storage.shards import ENDING as ENDING
from posthoc_cli.storage.shards import existing_output as existing_output
from posthoc_cli.storage.shards import index_of_shard as index_of_shard
from posthoc_cli.storage.shards import index_path as index_path
from posthoc_cli.storage.shards import is_output as is_output
from posthoc_cli.storage.shards import made_by_posthoc as made_by_posthoc
from posthoc_cli.storage.shards import make_index as make_index
from posthoc_cli.storage.shards import open_tensors as open_tensors
from posthoc_cli.storage.shards import replaced_files as replaced_files
from posthoc_cli.storage.shards import shard_paths as shard_paths
from posthoc_cli.storage.shards import shards_of as shards_of
from posthoc_cli.storage.shards import split as split
