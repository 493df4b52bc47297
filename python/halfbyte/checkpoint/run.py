"""Carrying out a plan: one pass over the source by tiles, into OUT.partial, which is renamed at the end.

    plan -> create files, preallocate, write headers
         -> threads:  next tile -> pread -> quantize (C, without the GIL) -> pwrite
         -> the last tile of a tensor: double quantization of its scales, its JSON
         -> hash and fsync each file -> tokenizer files, manifest, config.json -> fsync -> rename

A thread holds one tile. Tiles are given out in the order of the source, so that reading is sequential; each
is written to its own place, so the result does not depend on who did it when. Nothing at OUT is touched
before the rename, config.json is the last file to appear, and OUT.partial is held with flock, so that a
folder left by a killed run is told from one in use: it is removed and the work starts anew.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from halfbyte import _C
from halfbyte.checkpoint.output import MARKER, publish, reserve
from halfbyte.checkpoint.plan import MANIFEST_NAME, Job, Plan
from halfbyte.errors import CheckpointError, from_os_error
from halfbyte.formats.bitsandbytes import NESTED_BLOCKSIZE, quant_state_blob
from halfbyte.formats.folder import read_small
from halfbyte.formats.safetensors import write_at

# Called with (bytes of the source done, bytes of the source, name of the tensor or of the step).
Progress = Callable[[int, int, str], None]

_NUMPY_DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}
_NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_ITEMSIZE = {"F32": 4, "F16": 2, "BF16": 2}
_FLOAT16_ROW_MIN, _FLOAT16_MAX = 2.0**-6, 65504.0  # see _quantize_int8
_COPY_BYTES = 2 << 20
_HASH_BYTES = 1 << 20
# Dirty pages are pushed to the disk after so many bytes, so that the fsync at the end finds little to do.
_FLUSH_BYTES = 64 << 20


def write_plan(
    plan: Plan, out: Path, threads: int, overwrite: bool, progress: Progress | None
) -> dict[str, str]:
    """Make folder `out`. Returns the SHA-256 of each file; on any error `out` is as it was before."""
    partial = reserve(plan, out, overwrite)
    lock = os.open(partial, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        hashes = _fill(plan, partial, threads, progress)
        (partial / MARKER).unlink()
        os.fsync(lock)
        publish(partial, out)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise from_os_error(error, f"writing '{out.name}'") from error
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    finally:
        os.close(lock)
    return hashes


def _fill(plan: Plan, partial: Path, threads: int, progress: Progress | None) -> dict[str, str]:
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    with contextlib.ExitStack() as stack:
        fds = []
        for file in plan.files:
            fd = os.open(partial / file.name, flags, 0o666)
            stack.callback(os.close, fd)
            fds.append(fd)
        for file, fd in zip(plan.files, fds, strict=True):
            _preallocate(fd, file.size)
            write_at(fd, file.header, 0)
        hashes = _Work(plan, fds).run(threads, progress)
    for name, size in plan.copies.items():
        content = read_small(plan.model.root, name)
        if len(content) != size:
            raise CheckpointError("E402", f"'{name}' changed while the model was read")
        hashes[name] = _write_small(partial / name, content)
    for name, content in plan.small.items():
        hashes[name] = hashlib.sha256(content).hexdigest()
    manifest = plan.manifest_bytes(hashes)
    last = {name: content for name, content in plan.small.items() if name != "config.json"}
    last |= {MANIFEST_NAME: manifest, "config.json": plan.small["config.json"]}
    for name, content in last.items():
        _write_small(partial / name, content)
    return hashes | {MANIFEST_NAME: hashlib.sha256(manifest).hexdigest()}


def _preallocate(fd: int, size: int) -> None:
    try:
        os.posix_fallocate(fd, 0, size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise
        os.ftruncate(fd, size)


def _write_small(path: Path, content: bytes) -> str:
    with open(path, "xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return hashlib.sha256(content).hexdigest()


class _Work:
    """The threads and what they share. `lock` guards everything that changes.

    Workers do tiles, and the checksum of a file as soon as its last tile is written. One more thread only
    waits for the disk: it pushes out dirty pages meanwhile and syncs each file when it is complete.
    """

    def __init__(self, plan: Plan, fds: list[int]):
        self.plan = plan
        self.options = plan.options
        self.fds = fds
        self.lock = threading.Condition()
        self.tiles = self._all_tiles()
        self.left = {id(job): _count_tiles(job, plan.options.blocksize) for job in plan.jobs}
        self.jobs_left = [sum(1 for job in file.jobs if self.left[id(job)]) for file in plan.files]
        complete = [i for i, n in enumerate(self.jobs_left) if n == 0]
        self.to_hash, self.to_sync = complete.copy(), complete.copy()
        self.unsynced = len(fds)
        self.absmax: dict[int, np.ndarray] = {}
        self.done_bytes = 0
        self.total_bytes = sum(job.source.nbytes for job in plan.jobs)
        self.current = ""
        self.unflushed = 0
        self.running = 0
        self.stop = False
        self.error: BaseException | None = None
        self.hashes: dict[str, str] = {}

    def run(self, threads: int, progress: Progress | None) -> dict[str, str]:
        names = [f"halfbyte-{i}" for i in range(threads)]
        workers = [threading.Thread(target=self._guard, args=(self._worker,), name=name) for name in names]
        workers.append(threading.Thread(target=self._guard, args=(self._sync,), name="halfbyte-sync"))
        started: list[threading.Thread] = []
        try:
            for thread in workers:
                with self.lock:
                    self.running += 1
                thread.start()
                started.append(thread)
            while True:
                with self.lock:
                    self.lock.wait(0.1)
                    state = (self.done_bytes, self.total_bytes, self.current)
                    running = self.running
                if progress:
                    progress(*state)
                if not running:
                    break
        finally:
            with self.lock:
                self.stop = True
                self.lock.notify_all()
            for thread in started:
                thread.join()
        if self.error is not None:
            raise self.error
        return self.hashes

    def _guard(self, target: Callable[[], None]) -> None:
        """A thread's whole life: the first error of any thread stops them all and is raised by run()."""
        try:
            target()
        except BaseException as error:
            with self.lock:
                self.error = self.error or error
                self.stop = True
        finally:
            with self.lock:
                self.running -= 1
                self.lock.notify_all()

    def _worker(self) -> None:
        buffers = _Buffers()
        while True:
            with self.lock:
                tile = None
                while not self.stop and not self.to_hash and any(self.jobs_left):
                    tile = next(self.tiles, None)
                    if tile is not None:
                        break
                    self.lock.wait()  # others still write the last tiles; their file's checksum may be ours
                if self.stop or (tile is None and not self.to_hash):
                    return
                file = None if tile is not None else self.to_hash.pop(0)
            if tile is not None:
                self._do_tile(buffers, *tile)
            else:
                self._hash_file(file)

    def _sync(self) -> None:
        while True:
            with self.lock:
                while not self.stop and not self.to_sync and self.unflushed < _FLUSH_BYTES:
                    self.lock.wait()
                if self.stop:
                    return
                complete, self.to_sync = self.to_sync, []
                self.unflushed = 0
            sync = os.fsync if complete else os.fdatasync
            for index in complete or range(len(self.fds)):
                sync(self.fds[index])
            self.unsynced -= len(complete)
            if not self.unsynced:
                return

    def _all_tiles(self) -> Iterator[tuple[Job, int, int]]:
        for job in sorted(self.plan.jobs, key=lambda j: (j.source.file.name, j.source.start)):
            for start, count in _tiles(job, self.options.blocksize):
                yield job, start, count

    def _do_tile(self, buffers: _Buffers, job: Job, start: int, count: int) -> None:
        if job.kind == "copy":
            nbytes = count
            data = buffers.bytes("in", count)
            job.source.file.read_into(data, job.source.start + start)
            self._write(job, "data", data, start)
        else:
            x = self._read(buffers, job, start, count)
            nbytes = x.nbytes
            (self._quantize_4bit if job.kind == "4bit" else self._quantize_int8)(
                buffers, job, x, start, count
            )
        with self.lock:
            self.done_bytes += nbytes
            self.current = job.source.name
            self.left[id(job)] -= 1
            if self.left[id(job)]:
                return
        if job.kind != "copy":
            self._finish_tensor(job)
        with self.lock:
            self.jobs_left[job.file] -= 1
            if not self.jobs_left[job.file]:
                self.to_hash.append(job.file)
                self.to_sync.append(job.file)
                self.lock.notify_all()

    def _read(self, buffers: _Buffers, job: Job, start: int, count: int) -> np.ndarray:
        """Elements [start, start + count) of what is quantized, in the source's dtype."""
        source = job.source
        itemsize = _ITEMSIZE[source.dtype]
        dtype = _NUMPY_DTYPES[source.dtype]
        data = buffers.bytes("in", count * itemsize)
        if not job.transposed:
            source.file.read_into(data, source.start + start * itemsize)
            return data.view(dtype)
        rows, depth = job.shape  # the file has [depth, rows]
        first, n = start // depth, count // depth
        strip = data.reshape(depth, n * itemsize)
        for i in range(depth):
            source.file.read_into(strip[i], source.start + (i * rows + first) * itemsize)
        out = buffers.bytes("transposed", count * itemsize).view(dtype)
        np.copyto(out.reshape(n, depth), data.view(dtype).reshape(depth, n).T)
        return out

    def _quantize_4bit(self, buffers: _Buffers, job: Job, x: np.ndarray, start: int, count: int) -> None:
        options = self.options
        packed = buffers.bytes("packed", (count + 1) // 2)
        n_blocks = -(-count // options.blocksize)
        block = start // options.blocksize
        nested = "nested_absmax" in job.slots
        if nested:
            with self.lock:
                scales = self.absmax.get(id(job))
                if scales is None:
                    scales = np.empty(job.slots["absmax"].shape[0], np.float32)
                    self.absmax[id(job)] = scales
            absmax = scales[block : block + n_blocks]
        else:
            absmax = buffers.bytes("absmax", 4 * n_blocks).view(np.float32)
        dtype = "bfloat16" if job.source.dtype == "BF16" else None
        _C.quantize_4bit(
            x, options.to, options.blocksize, options.scales, dtype=dtype, packed=packed, absmax=absmax
        )
        if not np.isfinite(absmax).all():
            raise _not_finite(job, x, start)
        self._write(job, "packed", packed, start // 2)
        if not nested:
            self._write(job, "absmax", absmax, 4 * block)

    def _quantize_int8(self, buffers: _Buffers, job: Job, x: np.ndarray, start: int, count: int) -> None:
        """Rows of w rounded to float16, as LLM.int8() does it.

        Converting costs ten times the quantization, and a bfloat16 row whose absmax is in [2^-6, 65504] does not
        need it: its values of 2^-14 and more are float16 numbers already, and smaller ones have code 0 before
        and after rounding, because 2^-14 * 127 / 2^-6 < 1/2.
        """
        depth = job.shape[1]
        rows = count // depth
        matrix = x.reshape(rows, depth)
        codes = buffers.bytes("packed", count).view(np.int8).reshape(rows, depth)
        scale = buffers.bytes("absmax", 4 * rows).view(np.float32)
        dtype = _NAMES[job.source.dtype]
        if dtype == "float32":
            with np.errstate(over="ignore"):
                matrix = matrix.astype(np.float16)
            dtype = "float16"
        _C.quantize_rows_int8(matrix, dtype=dtype, codes=codes, scale=scale)
        if dtype == "bfloat16":
            for row in np.flatnonzero(~((scale >= _FLOAT16_ROW_MIN) & (scale <= _FLOAT16_MAX))):
                with np.errstate(over="ignore"):
                    x16 = _as_float(matrix[row : row + 1], "BF16").astype(np.float16)
                _C.quantize_rows_int8(x16, codes=codes[row : row + 1], scale=scale[row : row + 1])
        if not np.isfinite(scale).all():
            raise _not_finite(job, x, start, float16=True)
        self._write(job, "codes", codes, start)
        self._write(job, "scale", scale, 4 * (start // depth))

    def _finish_tensor(self, job: Job) -> None:
        """What is known when all tiles of a tensor are done."""
        if job.kind == "int8":
            self._write(job, "format", b"\0", 0)
            return
        offset = None
        if "nested_absmax" in job.slots:
            with self.lock:
                absmax = self.absmax.pop(id(job))
            codes, nested, offset = _C.nest_absmax(absmax, NESTED_BLOCKSIZE)
            self._write(job, "absmax", codes, 0)
            self._write(job, "nested_absmax", nested, 0)
            self._write(job, "nested_quant_map", _C.map8("dynamic"), 0)
        dtype = _NAMES[job.source.dtype]
        blob = quant_state_blob(self.options.to, self.options.blocksize, dtype, job.shape, offset)
        # bitsandbytes stores FP4's negative zero as +0.0
        self._write(job, "quant_map", _C.codebook(self.options.to) + np.float32(0), 0)
        self._write(job, "quant_state", blob, 0)

    def _write(self, job: Job, role: str, data: Any, offset: int) -> None:
        slot = job.slots[role]
        view = memoryview(data).cast("B")
        if offset + len(view) > slot.nbytes:
            raise AssertionError(f"{slot.name}: {offset} + {len(view)} bytes in a slot of {slot.nbytes}")
        write_at(self.fds[job.file], view, slot.start + offset)
        with self.lock:
            before = self.unflushed
            self.unflushed += len(view)
            if before < _FLUSH_BYTES <= self.unflushed:
                self.lock.notify_all()

    def _hash_file(self, index: int) -> None:
        fd, file = self.fds[index], self.plan.files[index]
        with self.lock:
            self.current = f"checksum of {file.name}"
        digest = hashlib.sha256()
        view = memoryview(bytearray(_HASH_BYTES))
        offset = 0
        while offset < file.size and not self.stop:
            got = os.preadv(fd, [view[: file.size - offset]], offset)
            if got == 0:
                raise CheckpointError("E402", f"'{file.name}' became shorter while it was written")
            digest.update(view[:got])
            offset += got
        with self.lock:
            self.hashes[file.name] = digest.hexdigest()


class _Buffers:
    """Memory of one thread, kept from tile to tile."""

    def __init__(self) -> None:
        self._arrays: dict[str, np.ndarray] = {}

    def bytes(self, name: str, nbytes: int) -> np.ndarray:
        array = self._arrays.get(name)
        if array is None or array.nbytes < nbytes:
            array = self._arrays[name] = np.empty(nbytes, np.uint8)
        return array[:nbytes]


def _tiles(job: Job, blocksize: int) -> Iterator[tuple[int, int]]:
    """Job.tiles in elements; for a copy in bytes."""
    if job.kind != "copy":
        yield from job.tiles(blocksize)
        return
    for start in range(0, job.source.nbytes, _COPY_BYTES):
        yield start, min(_COPY_BYTES, job.source.nbytes - start)


def _count_tiles(job: Job, blocksize: int) -> int:
    return sum(1 for _ in _tiles(job, blocksize))


def _as_float(x: np.ndarray, dtype: str) -> np.ndarray:
    return (x.astype(np.uint32) << 16).view(np.float32) if dtype == "BF16" else x


def _not_finite(job: Job, x: np.ndarray, start: int, float16: bool = False) -> CheckpointError:
    """The error for the first NaN or Inf of a tile; for int8 also for a value beyond float16."""
    values = _as_float(x, job.source.dtype)
    with np.errstate(over="ignore"):
        finite = np.isfinite(values.astype(np.float16) if float16 else values)
    position = int(np.argmin(finite))
    row, column = divmod(start + position, job.shape[1])
    index = (column, row) if job.transposed else (row, column)
    value = float(values[position])
    where = f"tensor '{job.source.name}' in '{job.source.file.name}'"
    if np.isfinite(value):
        return CheckpointError(
            "E430",
            f"{where} has {value:g} at index {list(index)}, beyond the range of float16",
            ["LLM.int8() rounds weights to float16 before it quantizes them"],
            "use --to nf4, or --skip the layer",
        )
    return CheckpointError(
        "E430",
        f"{where} has {value} at index {list(index)}",
        ["one such value spoils its whole block", "nothing was written"],
        "repair the model, or --skip the layer",
    )


def default_threads() -> int:
    """Threads for `quantize`: as the extension module (HALFBYTE_NUM_THREADS, cgroup quota, affinity)."""
    return _C.get_num_threads()
