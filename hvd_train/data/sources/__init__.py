"""What shards are written from."""

from hvd_train.data.sources.base import Arrays as Arrays
from hvd_train.data.sources.digits import load_digits as load_digits
from hvd_train.data.sources.idx import read_idx as read_idx
from hvd_train.data.sources.npz import load_npz as load_npz
from hvd_train.data.sources.opening import open_source as open_source
