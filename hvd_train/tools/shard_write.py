"""`hvd_train shard write`: shards from files of many kinds."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import Positional, arg

from hvd_train.config_values import require, require_usable
from hvd_train.errors import DataError
from hvd_train.io.output import warn

if TYPE_CHECKING:
    from hvd_train.data.format import Manifest
    from hvd_train.data.writer import Request


@dataclass(frozen=True, kw_only=True)
class WriteArgs:
    """Write HDF5 shards, and the manifest beside them, from files of other kinds. The rows are streamed:
    memory does not grow with their number. A call that was ended goes on where it was."""

    sources: Annotated[Positional[tuple[str, ...]], arg(metavar="SOURCE...")]
    """Two idx files or two .npy files (inputs, targets), one .npz file, HDF5, CSV, Parquet, text (.txt) or
    WebDataset (.tar) files, or a folder of images with a folder for each class; or the word `digits`."""

    from_: Annotated[str, arg(name="from")] = ""
    """Instead of files a Python dataset: `file.py:make_dataset` or `package.module:make_dataset`, a function
    or class without arguments. The fields have the names that its samples give them."""

    out: str
    """Folder for the shards and their manifest.json; created if missing."""

    part: Literal["train", "validation"] = "train"
    """Which part of the data set the shards are; the manifest keeps both."""

    shards: int = 1
    """Number of files; usually one per rank."""

    split: str = ""
    """Parts and their fractions of the rows, such as `validation=0.1` or `validation=0.1,test=0.1`; the rest
    is the train part. `validation` is in the same manifest; others get a folder of their name in --out."""

    stratify: bool = False
    """With --split: the same share of every class in each part."""

    group: str = ""
    """With --split: the array, dataset or column whose value, such as a patient's, is in one part only."""

    by_class: bool = False
    """Divide into shards by contiguous ranges of classes instead of equal ranges of rows."""

    shuffle: bool = False
    """Shuffle the rows before they are divided, on disk where they are more than the memory used. Readers
    shuffle too, but only within a rank's shards."""

    seed: int = 0
    """Seed of --shuffle and --split."""

    compression: Literal["none", "gzip", "lz4", "zstd", "blosc"] = "none"
    """Of chunks; all but gzip need hdf5plugin, also where they are read. `lz4` and `blosc` are read fast."""

    chunk_rows: int | None = None
    """Rows of one HDF5 chunk. Default: contiguous, with compression chunks of about 256 KiB."""

    inputs: str = "inputs"
    """Array of a .npz file, or place in HDF5 files: `entry/data`, `table[x,y]`. Of CSV and Parquet files the
    columns, such as `x,y`; without such a column all that are not used otherwise. Of WebDataset files the
    ending of the members: `png`, `npy`."""

    targets: str = "targets"
    """Array, place or column of the targets."""

    fields: Mapping[str, str] = field(default_factory=dict)
    """Further fields of a sample: names, and arrays, places, columns or .npy files."""

    classes: tuple[str, ...] = ()
    """Names of the classes, in the order of their numbers: the texts in the column of targets, the folders of
    images, or for targets that are numbers what 0, 1, ... stand for."""

    resize: tuple[int, int] | None = None
    """Height and width to which images are resized. Default: all must have the same."""

    tokenizer: str = "bytes"
    """Of text: `bytes` for a token per byte, or `file.py:function` or `package.module:function`, which makes
    a sequence of whole numbers of each line."""

    length: int = 128
    """Of text: tokens of a sample. The targets are the tokens that follow, for the task `next-token`."""

    scale: float | None = None
    """Factor for integer inputs, recorded in the shards. Default: 1/255 for 8-bit images, 1/16 for digits."""

    force: bool = False
    """Replace shards that exist."""

    def __post_init__(self) -> None:
        require_usable(self, "--")
        require(self.out != "", "--out", self.out, "a folder")
        require(self.seed >= 0, "--seed", self.seed, "a seed of at least 0")
        require(self.scale != 0, "--scale", self.scale, "a factor other than 0")
        require(self.length >= 1, "--length", self.length, "at least 1 token")
        sizes = self.resize or (1, 1)
        require(min(sizes) >= 1, "--resize", self.resize, "a height and a width of at least 1")


def write(args: WriteArgs) -> int:
    """`shard write`. Raises `DataError` where a source cannot be read or a shard not be written."""
    from hvd_train.data.sources.opening import Wanted, open_source
    from hvd_train.data.target_remark import TargetRemark
    from hvd_train.data.writer import refuse_written, write_shards
    from hvd_train.tools.shard_progress import WriteProgress

    request = _request(args)
    with _writing_to(args.out):
        refuse_written(args.out, request)
    with WriteProgress() as progress:
        wanted = Wanted(
            inputs=args.inputs,
            targets=args.targets,
            others=args.fields,
            group=args.group,
            classes=args.classes,
            resize=args.resize,
            tokenizer=args.tokenizer,
            length=args.length,
            python=args.from_,
            progress=progress.report,
        )
        source = TargetRemark(open_source(args.sources, wanted), args.targets, args.from_ or args.sources[-1])
        with _writing_to(args.out):
            manifest = write_shards(args.out, source, request, progress.report)
    said = source.remark()
    if said:
        warn(f"written, but the task `classification` would refuse it: {said}")
    _show(args, manifest)
    return 0


@contextmanager
def _writing_to(out: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        # What HDF5 says has many lines.
        seen = os.strerror(error.errno) if error.errno else str(error)
        of = f" ({error.filename})" if error.filename and str(error.filename) != out else ""
        raise DataError(
            f"{out}: cannot be written: {seen}{of}. Give --out a folder that can be, or make room there: the "
            "same command goes on with the shards that are complete."
        ) from None


def _show(args: WriteArgs, manifest: Manifest) -> None:
    """The shards that were written, and the names of their classes."""
    from hvd_train.data.manifest import load_manifest
    from hvd_train.data.splitting import parse_split

    others = parse_split(args.split) if args.split else {}
    listed = {args.out: (*manifest.train, *manifest.validation)}
    if not others:
        listed[args.out] = manifest.train if args.part == "train" else manifest.validation
    for name in others.keys() - {"validation"}:
        part = load_manifest(os.path.join(args.out, name))
        listed[os.path.join(args.out, name)] = part.train if part else ()
    for folder, entries in listed.items():
        for entry in entries:
            print(f"{os.path.join(folder, entry.file)}: {entry.num_samples} samples")
    if manifest.class_names:
        print("classes: " + ", ".join(f"{i} {name}" for i, name in enumerate(manifest.class_names)))


def _request(args: WriteArgs) -> Request:
    from hvd_train.data.splitting import parse_split
    from hvd_train.data.writer import Request

    return Request(
        part=args.part,
        shards=args.shards,
        by_class=args.by_class,
        shuffle_seed=args.seed if args.shuffle else None,
        split=tuple(parse_split(args.split).items()) if args.split else (),
        split_seed=args.seed,
        stratify=args.stratify,
        group=args.group,
        compression=args.compression,
        chunk_rows=args.chunk_rows,
        scale=args.scale,
        class_names=args.classes,
        force=args.force,
    )
