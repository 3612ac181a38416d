"""What lies in buckets, on servers and on the hub: how to get there, what is there, and writing.

The other modules of `storage` import these only for URLs, as they and their clients are slow to
import.
"""
