"""Sources: what ``--data`` may name. Each is a numbered list of images that can be read in any order.

A numbered list is all that shuffling over the whole set, splitting over processes and resuming in the middle of an
epoch need. Where the images are too many and too far away for any order, a source says which of them lie together.

    base.py           what a source is; fingerprints
    opening.py        from the user's words to a source
    patterns.py       braces, stars, folders of parts
    files.py          folders; files one by one
    tables.py         lists and tables of paths or URLs
    parquet.py        parquet files: paths, or images inside
    shards.py         tar shards on the disk
    shard_index.py    what lies where in a tar
    cached_shards.py  shards from far away
    hugging_face.py   data sets of Hugging Face
    remote.py         bytes over http, S3, ...: retries
    cache.py          the folder of downloads
    compact.py        a million names in two arrays
    shapes.py         the embedded synthetic set
"""

from hardpatch.data.sources.base import Blocks, Source, class_indices, fingerprint
from hardpatch.data.sources.downloads import Downloads
from hardpatch.data.sources.files import FileSource
from hardpatch.data.sources.opening import open_source
from hardpatch.data.sources.shapes import ShapesSource
from hardpatch.data.sources.shards import ShardSource

__all__ = [
    "Blocks",
    "Downloads",
    "FileSource",
    "ShapesSource",
    "ShardSource",
    "Source",
    "class_indices",
    "fingerprint",
    "open_source",
]
