"""Where the samples come from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from tyro.conf import arg

from hvd_train.config_values import require, require_usable

LastBatch = Literal["keep", "drop", "merge"]
"""What becomes of the rows at the end of an epoch that are no full batch."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the samples come from."""

    path: Annotated[str, arg(aliases=["--data"])] = "digits"
    """A folder with a manifest.json, a folder of HDF5 files, one file, a glob pattern, or the word
    `digits` for the embedded default. Or a Python dataset: `file.py:make_dataset` or
    `package.module:make_dataset`, a function or class without arguments that gives a torch `Dataset`, another
    sequence of samples, or an iterable."""

    validation: float | str = ""
    """Validation data of a source without a manifest: a path or glob pattern, a Python dataset, or a fraction
    of the training rows (0.1), split off in blocks. Empty: the validation part of the manifest, else none."""

    fields: dict[str, str] = field(default_factory=dict)
    """What a sample is made of: a name in the batch -> its place in every file. A place is a dataset
    (`entry/data`), columns of a table (`table[x,y]`) or a part of each sample (`spectrum[100:900]`). Inputs,
    targets, weights and the mask need no entry where the dataset has the name itself."""

    inputs: str = "inputs"
    """Name of the field, or of the HDF5 dataset, that holds the inputs."""

    targets: str = "targets"
    """Name of the field, or of the HDF5 dataset, that holds the targets."""

    weights: str = ""
    """Name of the field, or of the HDF5 dataset, with a weight for each sample, not below 0: its loss and its
    part in the error are multiplied by it; a sample of weight 0 does not count. Empty: all count alike."""

    mask: str = ""
    """Name of the field, or of the HDF5 dataset, that marks what counts of the targets of a sample (true or
    not 0), in their shape. Empty: all of them."""

    classes: tuple[str, ...] = ()
    """The values of the targets that are classes, in the order of the class numbers 0, 1, 2, ...: `-1 1`, or
    `cat dog`, for whole numbers of any type and for strings. Empty: the values are the class numbers."""

    one_hot: bool = False
    """Take the last axis of the targets as classes: 1 for the class of a sample, 0 for all others."""

    ignore_index: int | None = None
    """The value that marks targets without a class. Default: -100, as torch has it, which always does."""

    max_length: int | None = None
    """Values to which rows of any length are padded with zeros: those of variable-length datasets, and of
    places such as `packed(tokens, offsets)`. A batch then has a mask beside each such field, of the name
    `tokens_mask`: true for values, false for padding. Longer rows are refused. Default: rows of any length
    are refused, with the length of the longest."""

    truncate: bool = False
    """Cut rows that are longer than data.max_length, instead of refusing them."""

    samples_axis: int = 0
    """The axis of the datasets along which the samples are; -1 for the last, as files of MATLAB have it where
    its matrices have one row a sample."""

    follow_links: bool = False
    """Take datasets that links of a shard lead to in other files, and virtual datasets. These files must be
    in the folder of the shard or below it. Every one of them must be there."""

    batch_size: Annotated[int, arg(aliases=["--batch-size"])] = 64
    """Samples of one local step on one rank."""

    last_batch: LastBatch = "keep"
    """The rows at the end of an epoch that are no full batch: `keep` makes them a smaller batch, a single row
    joins the batch before; `merge` joins them to the batch before, which has up to twice as many rows; `drop`
    leaves them out, others in each epoch, but never all rows of a rank. Default: every row is used once an
    epoch, and no batch needs more memory than another, but for one row."""

    workers: int = 0
    """Processes of each rank that transform batches to train on while it takes its local steps; for an
    augmentation in the `transform` of a task of your own. Each needs a core of its own among those that the
    rank may use, memory for torch and some batches, and makes the task anew. 0: in the rank itself. The
    batches are the same for any number, if random numbers are drawn from `training` alone."""

    reading: Literal["auto", "memory", "mmap", "stream"] = "auto"
    """`memory` keeps the rank's rows in memory. `mmap` maps files without chunks into memory, which the ranks
    of a host share. `stream` reads blocks of rows in random order as they are needed. `auto` takes memory if
    the rows of all ranks of a host fit into half of its free memory, within the limits of the kernel, the
    job's cgroups, the Slurm allocation, and `ulimit -v` and `-d`. Else it takes mmap for files of local file
    systems whose rows fit into three quarters of it, or are of 64 KiB or more, and stream for all others."""

    order: Literal["rank", "global"] = "rank"
    """`rank`: every rank shuffles rows of its own. `global`: all rows are shuffled as one sequence, the same
    for any number of ranks. Step j of p ranks takes the rows from j p B to (j + 1) p B of it, B =
    `data.batch_size`. Every rank then reads all shards, and with `memory` holds all of their rows."""

    redeal: Literal["never", "epoch"] = "never"
    """`epoch`: in every epoch a rank reads the rows that the next rank read in the one before, so that every
    rank meets all data. With `memory` it reads its part of the files again in every epoch."""

    cache: str = ""
    """A folder on a disk of each host, such as `$TMPDIR`, into which the shards of its ranks are copied
    before the first step, each file once a host, as far as there is room. The copies are removed when the run
    ends. Empty: shards are read from where they are."""

    scale: float | Literal["auto"] | None = None
    """Factor applied to integer inputs before the model. Default: the one recorded in the shard, else 1.
    `auto`: the recorded one, else one that brings the largest value to about 1, such as 1/255 for 8-bit
    images. It reads all integer inputs once more before the first step."""

    standardize: Literal["component", "channel", "all"] | None = None
    """Have the built-in models subtract the mean of the inputs and divide by their standard deviation: those
    of each `component` of a sample, as suits tables, of each `channel` of [channels, ...], or of `all` values
    together, as suits images [height, width]. All inputs for training are read once more before the first
    step. The figures are a part of the model. Integers are then not multiplied by a scale."""

    not_finite: Literal["error", "skip", "keep"] = "keep"
    """What becomes of a row with a value that is not finite in float32, in any of its fields; targets that do
    not count, by mask or weight, may be anything. `error`: the run ends when it reads one. `skip`: such rows
    are left out of training and evaluation, and counted. Default: `keep`, as `transform` may replace such
    values; a rank whose model becomes not finite loses the steps of that round."""

    on_damage: Literal["error", "skip"] = "error"
    """What becomes of training rows that cannot be read or decoded, or are not what was written. `error`: the
    run ends and names them. `skip`: they are left out, counted and reported; of the rest of the file nothing
    is lost. A file that cannot be opened and damaged validation data are always an error."""

    def __post_init__(self) -> None:
        require_usable(self, "data.")
        require(self.path != "", "data.path", self.path, "a path, a glob pattern or `digits`")
        require(self.inputs != "", "data.inputs", self.inputs, "the name of a field or dataset")
        require(self.targets != "", "data.targets", self.targets, "the name of a field or dataset")
        self._check_classes()
        require(
            -8 <= self.samples_axis <= 8, "data.samples_axis", self.samples_axis, "an axis, such as 0 or -1"
        )
        length = self.max_length
        require(length is None or 1 <= length < 2**31, "data.max_length", length, "at least 1 value")
        expected = "false without data.max_length, at which it cuts. Set that as well"
        require(length is not None or not self.truncate, "data.truncate", self.truncate, expected)
        require(self.batch_size >= 1, "data.batch_size", self.batch_size, "at least 1 sample")
        require(self.workers >= 0, "data.workers", self.workers, "0 or more processes")
        if isinstance(self.validation, (int, float)):
            expected = "a fraction between 0 and 1"
            require(0 < self.validation < 1, "data.validation", self.validation, expected)
        expected = "never with data.order = 'global', where every rank reads all shards"
        require(self.order == "rank" or self.redeal == "never", "data.redeal", self.redeal, expected)
        require(
            self.scale != 0, "data.scale", self.scale, "a factor other than 0, which would remove the inputs"
        )
        own = self.order == "rank" and self.redeal == "never"
        expected = "none with data.order or data.redeal, by which ranks read the files of others"
        require(self.cache == "" or own, "data.cache", self.cache, expected)
        expected = "`error` with data.reading = 'mmap', which finds damage in single rows of a batch"
        require(
            self.reading != "mmap" or self.on_damage == "error", "data.on_damage", self.on_damage, expected
        )
        expected = "none with data.standardize, which brings inputs of any scale to mean 0 and deviation 1"
        require(self.scale is None or self.standardize is None, "data.scale", self.scale, expected)
        expected = "none with data.follow_links: a copy is without the files that it links to"
        require(not (self.cache and self.follow_links), "data.cache", self.cache, expected)

    def _check_classes(self) -> None:
        classes, ignored = self.classes, self.ignore_index
        require(len(classes) != 1, "data.classes", classes, "two classes or more")
        require(len(set(classes)) == len(classes), "data.classes", classes, "each value once")
        require(
            str(ignored) not in classes, "data.ignore_index", ignored, "a value that is not in data.classes"
        )
        require(ignored is None or not self.one_hot, "data.ignore_index", ignored, "none with data.one_hot")
        if classes or self.one_hot or ignored is not None:
            expected = "another dataset than data.inputs, with data.classes, one_hot or ignore_index"
            require(self.targets != self.inputs, "data.targets", self.targets, expected)
