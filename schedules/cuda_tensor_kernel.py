"""The fused layer on tensor cores as one TIR kernel; `cuda_tensor_cores` says how it works.

It is written as TIR and not scheduled from the tensor expression: the fragments of ``mma.sync``
spread a matrix over the registers of a warp, which TVM 0.27 tensorizes only for whole matrices,
with accumulators that go back through shared memory before an epilogue.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.ir import Expr as PrimExpr  # its name since TVM 0.27
from tvm.script.ir_builder import IRBuilder
from tvm.tirx import PrimFunc
from tvm.tirx.script.builder import ir as T
from tvm_sepconv.compiler.schedules.cuda_tensor_frame import (
    Frame,
    Index,
    barrier,
    call,
    clear,
    registers,
    where,
)
from tvm_sepconv.compiler.schedules.cuda_tensor_plan import Plan

from tvm_sepconv.compiler import epilogue

_SHARING = 4  # taps whose weights share an address; with more nvcc loads too early, and spills


def kernel(plan: Plan, aligned: bool) -> PrimFunc:
    """Return the kernel with its thread bindings.

    Arguments, in order: ``x``, ``depthwise_kernel``, ``pointwise_kernel``, ``bias`` if there is
    one, ``left`` (int32) and ``output``.
    """
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("sepconv1d")
        _Kernel(plan, aligned).write()
    return builder.get()


@dataclass(frozen=True)
class _Place:
    """What a thread of the depthwise stage is at."""

    chunk: PrimExpr
    multiplier: PrimExpr
    channel: PrimExpr  # of the chunk
    step: PrimExpr  # of the tile, the first of the run


class _Kernel(Frame):  # type: ignore[misc]  # mypy cannot follow schedules' own imports
    """The stages of one kernel, written into the builder that is open."""

    def write(self) -> None:
        """Write the body."""
        with ExitStack() as stack:
            self.launch(stack)
            self.sums = registers("sums", self.tiling.sums)
            self._start()
            self._chunks()
            self._finish()

    def _chunks(self) -> None:
        """Depthwise and pointwise of every chunk of channels, for one multiplier at a time."""
        t, m = self.tiling, self.config.depth_multiplier
        rounds = self.plan.chunks * m
        if t.buffers == 2:
            self._stage(0)
        with T.serial(0, rounds) as i:
            if t.buffers == 1:
                barrier()  # the former round has read what this one overwrites
                self._stage(i)
            call("sepconv_wait")
            barrier()
            if t.buffers == 2 and rounds > 1:
                with where(i + 1 < rounds):
                    self._stage(i + 1)
            self._depthwise_stage(i)
            barrier()
            self._pointwise_stage(i)

    def _stage(self, i: Index) -> None:
        m = self.config.depth_multiplier
        with where(i % m == 0 if m > 1 and not isinstance(i, int) else True):
            self.stage_input(i // m)
        self.stage_weights(i)

    # --- Depthwise ---------------------------------------------------------------------------

    def _depthwise_stage(self, i: PrimExpr) -> None:
        """Sum over the taps in registers, `run` steps a thread, into the tensor cores' operand."""
        p, t, m = self.plan, self.tiling, self.config.depth_multiplier
        groups = t.channel_tile // p.width
        self.window = registers("window", t.run * p.width)
        self.results = registers("results", t.run * p.width)
        self.weights = registers("weights", p.width)
        with self.shared_out(groups * p.runs, at_once=1) as item:
            block, residue = item // groups // p.spacing, item // groups % p.spacing
            step = block * (p.spacing * t.run) + residue
            place = _Place(i // m, i % m, item % groups * p.width, step)
            clear(self.results)
            if p.slides:
                for residue in range(min(p.residues, self.config.kernel_size)):
                    self._slide(residue, place)
            else:
                self._sum_plainly(place)
            self._leave(place)

    def _leave(self, place: _Place) -> None:
        p, t = self.plan, self.tiling
        with T.unroll(0, t.run) as number:
            step = place.step + number * p.spacing
            with where(step < t.step_tile if p.long_steps > t.step_tile else True):
                offset = step * p.middle_pitch + place.channel * self.size
                function = f"sepconv_leave<{self.element}, {p.width}>"
                call(function, self.shared, offset, self.results, number * p.width)

    def _slide(self, residue: int, place: _Place) -> None:
        """Add taps residue, residue + residues, …: each needs one row more than the one before."""
        c, p, run = self.config, self.plan, self.tiling.run
        first_row = place.step * c.strides + residue * c.dilation_rate
        taps = -(-(c.kernel_size - residue) // p.residues)

        def add(first: Index, count: int) -> None:
            with T.unroll(0, count) as u:
                newest = first_row + (first + u + (run - 1)) * p.row_spacing
                self._read((u + (run - 1)) % run, newest, place)
                base = first + u // _SHARING * _SHARING
                tap, apart = base * p.residues + residue, u % _SHARING * p.residues
                self._add(tap, apart, place, lambda t: (t + u) % run)

        if run > 1:
            with T.unroll(0, run - 1) as t:
                self._read(t, first_row + t * p.row_spacing, place)
        whole = taps // run * run
        if whole:
            with T.serial(0, whole // run) as turn:
                add(turn * run, run)
        if taps > whole:
            add(whole, taps - whole)

    def _sum_plainly(self, place: _Place) -> None:
        """Add the taps one by one, with a row of its own for every product."""
        c = self.config
        with T.serial(0, c.kernel_size) as tap:
            with T.unroll(0, self.tiling.run) as t:
                self._read(t, (place.step + t) * c.strides + tap * c.dilation_rate, place)
            self._add(tap, 0, place, lambda t: t)

    def _read(self, slot: Index, row: PrimExpr, place: _Place) -> None:
        """Bring one input row of the tile into a slot of the window."""
        p, t = self.plan, self.tiling
        if t.stage_input:
            offset = p.input_offset + place.chunk % t.buffers * p.input_bytes
            if self.last:
                offset = offset + row * p.input_pitch + place.channel * self.size
            else:
                line = offset + place.channel * p.input_pitch
                offset = line + (row + self.early()) * self.size
            function = f"sepconv_read<{self.element}, {p.width}>"
            call(function, self.window, slot * p.width, self.shared, offset)
            return
        for j in range(p.width):
            source_row = self.first_row + row
            channel = place.chunk * t.channel_tile + place.channel + j
            arguments = self.source(source_row, channel), self.inside(source_row, channel)
            value = tirx.call_extern("float32", "sepconv_fetch", *arguments)
            T.buffer_store(self.window, value, [slot * p.width + j])

    def _add(
        self, tap: Index, apart: Index, place: _Place, slot: Callable[[PrimExpr], Index]
    ) -> None:
        """Add the products of tap `tap` + `apart`; the row of step t of the run is in `slot(t)`."""
        p, m = self.plan, self.config.depth_multiplier
        channel = place.chunk * self.tiling.channel_tile + place.channel
        if p.channels % self.tiling.channel_tile:  # what is beyond meets weights of zero
            channel = tirx.min(channel, p.channels - p.width)
        address = tirx.address_of(self.depthwise[tap, place.multiplier, channel])
        call(f"sepconv_weights<{p.width}>", self.weights, address, apart * (m * p.channels))
        with T.unroll(0, self.tiling.run) as t, T.unroll(0, p.width) as j:
            at = t * p.width + j
            product = self.window[slot(t) * p.width + j] * self.weights[j]
            T.buffer_store(self.results, self.results[at] + product, [at])

    # --- Pointwise ---------------------------------------------------------------------------

    def _pointwise_stage(self, i: PrimExpr) -> None:
        """Add the chunk to the sums, 16×8 outputs an instruction."""
        p, t = self.plan, self.tiling
        self.a = registers("a", p.m_tiles * 4, "uint32")
        self.b = registers("b", p.n_tiles * 2, "uint32")
        weights = p.weights_offset + i % t.buffers * p.weights_bytes
        with T.unroll(0, t.channel_tile // p.depth) as k:
            with T.unroll(0, t.step_tile // t.step_warps // 16) as tile:
                self._load_steps(tile, k)
            with T.unroll(0, t.filter_tile // t.filter_warps // 16) as tile:
                self._load_filters(tile, k, weights)
            with T.unroll(0, p.m_tiles) as m, T.unroll(0, p.n_tiles) as n:
                operands = (self.sums, (m * p.n_tiles + n) * 4, self.a, m * 4, self.b, n * 2)
                call(f"sepconv_multiply<{self.element}>", *operands)

    def _corner(self, down_first: bool) -> tuple[PrimExpr, PrimExpr]:
        """The lane's row in an ldmatrix of 16 rows by 32 bytes: (row, which 16 bytes).

        Operand a takes its four matrices down the rows first, operand b along the bytes first.
        """
        eighth = self.lane // 8
        down, along = (eighth % 2, eighth // 2) if down_first else (eighth // 2, eighth % 2)
        return self.lane % 8 + down * 8, along

    def _load_steps(self, tile: PrimExpr, k: PrimExpr) -> None:
        """Load the depthwise results of 16 steps: operand a, in channels_first b."""
        row, half = self._corner(down_first=self.last)
        offset = (self.warp_step + tile * 16 + row) * self.plan.middle_pitch + k * 32 + half * 16
        call("sepconv_matrices", self.a if self.last else self.b, tile * 4, self.shared, offset)

    def _load_filters(self, tile: PrimExpr, k: PrimExpr, weights: Index) -> None:
        """Load the weights of 16 filters, which are stored a channel a row: b, or a."""
        to, pitch = self.b if self.last else self.a, self.plan.weights_pitch
        start = weights + (self.warp_filter + tile * 16) * self.size + k * (self.plan.depth * pitch)
        if self.size == 2:  # transposed, so rows and bytes change places
            row, half = self._corner(down_first=self.last)
            offset = start + row * pitch + half * 16
            call("sepconv_matrices_transposed", to, tile * 4, self.shared, offset)
            return
        for number in range(4):
            low, high = number % 2, number // 2
            down, along = (high, low) if self.last else (low, high)
            row, column = self.lane % 4 + along * 4, self.lane // 4 + down * 8
            offset = start + row * pitch + column * 4
            call("sepconv_element_tf32", to, tile * 4 + number, self.shared, offset)

    # --- Beginning and end -------------------------------------------------------------------

    def _places(self) -> Iterator[tuple[PrimExpr, PrimExpr, PrimExpr]]:
        """For each two neighbouring sums of the lane: step and filter of the first, its index."""
        p = self.plan
        group, pair = self.lane // 4, self.lane % 4 * 2
        step, filter_ = self.first_step + self.warp_step, self.first_filter + self.warp_filter
        with T.unroll(0, p.n_tiles) as n, T.unroll(0, p.m_tiles) as m, T.unroll(0, 2) as half:
            down, along = m * 16 + half * 8 + group, n * 8 + pair
            if not self.last:
                down, along = along, down
            yield step + down, filter_ + along, ((m * p.n_tiles + n) * 2 + half) * 2

    def _start(self) -> None:
        """Begin the sums with the bias: adding it costs nothing, and its latency is hidden."""
        if self.bias is None:
            clear(self.sums)
            return
        filters = self.plan.filters
        for _, filter_, first in self._places():
            if filters % self.tiling.filter_tile:  # what is beyond is not stored
                filter_ = tirx.min(filter_, filters - (2 if self.last else 1))
            for j in range(2):
                value = self.bias[filter_ + j if self.last else filter_]
                T.buffer_store(self.sums, value, [first + j])

    def _finish(self) -> None:
        """Apply the activation in the registers and store, two neighbours a move if aligned."""
        c = self.config
        for step, filter_, first in self._places():
            with where(step < self.out_steps, filter_ < c.filters):
                for j in range(2):
                    value = epilogue.apply(c.activation, self.sums[first + j])
                    T.buffer_store(self.sums, value, [first + j])
                self._store(step, filter_, self.sums[first], self.sums[first + 1])

    def _store(self, step: PrimExpr, filter_: PrimExpr, value: Any, neighbour: Any) -> None:
        if self.aligned:
            call("sepconv_put_pair", self._target(step, filter_), value, neighbour)
            return
        call("sepconv_put", self._target(step, filter_), value)
        if self.last:
            step_, filter__, bound = step, filter_ + 1, filter_ + 1 < self.config.filters
        else:
            step_, filter__, bound = step + 1, filter_, step + 1 < self.out_steps
        with where(bound):
            call("sepconv_put", self._target(step_, filter__), neighbour)

    def _target(self, step: PrimExpr, filter_: PrimExpr) -> PrimExpr:
        row, column = (step, filter_) if self.last else (filter_, step)
        return tirx.address_of(self.output[self.sample, row, column])
