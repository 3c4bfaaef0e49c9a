"""The frame of a tensor-core kernel: its arguments and threads, and copies to shared memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, TypeAlias

from tvm import tirx
from tvm.ir import Expr as PrimExpr  # its name since TVM 0.27
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T
from tvm_sepconv.compiler.schedules.cuda_packing import LANES
from tvm_sepconv.compiler.schedules.cuda_tensor_plan import Plan

ELEMENTS = {"float32": "float", "float16": "half", "bfloat16": "nv_bfloat16"}
"""What the device functions call a dtype."""

# Copies that a thread has under way before it waits for one; nvcc would take all there are, and
# spill.
_AT_ONCE = 8
_ROLLED = {"disable_unroll": True}

Index: TypeAlias = PrimExpr | int


def call(name: str, *arguments: Any) -> None:
    """Call a device function."""
    T.evaluate(tirx.call_extern("void", name, *arguments))


def barrier() -> None:
    """Wait for all threads of the block."""
    T.evaluate(T.tvm_storage_sync("shared"))


@contextmanager
def where(*conditions: PrimExpr | bool) -> Iterator[None]:
    """Guard statements by what is not known to be true already."""
    unknown = [c for c in conditions if c is not True]
    with ExitStack() as stack:
        if unknown:
            stack.enter_context(T.If(tirx.all(*unknown)))
            stack.enter_context(T.Then())
        yield


def registers(name: str, count: int, dtype: str = "float32") -> Any:
    """Declare an array of a thread's own; all indices into it must become constants."""
    buffer = T.alloc_buffer((count,), dtype, scope="local", layout=None)
    IRBuilder.name(name, buffer)
    return buffer


def clear(array: Any) -> None:
    """Fill registers with zeros."""
    with T.unroll(0, array.shape[0]) as i:
        T.buffer_store(array, tirx.const(0.0, "float32"), [i])


class Frame:
    """A kernel's arguments, its thread's place, and the copies to shared memory."""

    def __init__(self, plan: Plan, aligned: bool) -> None:
        self.config, self.plan, self.tiling = plan.config, plan, plan.tiling
        self.aligned = aligned
        self.last = plan.config.data_format == "channels_last"
        self.element = ELEMENTS[plan.config.dtype]
        self.size = plan.size
        # cp.async moves 4 bytes at least.
        self.in_pairs = aligned and self.size == 2
        self._declare_arguments()

    def _declare_arguments(self) -> None:
        c, p = self.config, self.plan
        names = ("batch", "steps", "out_steps", "x_batch", "x_row", "y_batch", "y_row")
        sizes = {name: tirx.Var(name, "int32") for name in names}
        self.batch, self.steps, self.out_steps = (sizes[n] for n in names[:3])

        def match(name: str, shape: Any, dtype: str = "float32", **options: Any) -> Any:
            argument = T.arg(name, T.handle())
            options = {"align": 64, "layout": None, **options}
            buffer = T.match_buffer(argument, shape, dtype, **options)
            IRBuilder.name(name, buffer)
            return buffer

        def free(name: str, prefix: str, channels: int, steps: PrimExpr) -> Any:
            axes = (steps, channels) if self.last else (channels, steps)
            strides = (sizes[f"{prefix}_batch"], sizes[f"{prefix}_row"], 1)
            return match(name, (self.batch, *axes), c.dtype, strides=strides, align=self.size)

        panels, m = p.filters // LANES, c.depth_multiplier
        self.x = free("x", "x", c.channels, self.steps)
        self.depthwise = match("depthwise_kernel", (c.kernel_size, m, p.channels))
        self.pointwise = match("pointwise_kernel", (panels, m * p.channels, LANES), c.dtype)
        self.bias = match("bias", (p.filters,)) if c.use_bias else None
        self.left = T.arg("left", tirx.Var("left", "int32"))
        self.output = free("output", "y", c.filters, self.out_steps)
        T.func_attr({"tirx.noalias": True})

    def launch(self, stack: ExitStack) -> None:
        """Bind the threads and declare shared memory, for as long as `stack` is open."""
        p, t = self.plan, self.tiling
        extents = {
            "blockIdx.z": self.batch,
            "blockIdx.y": -(-p.filters // t.filter_tile),
            "blockIdx.x": (self.out_steps + (t.step_tile - 1)) // t.step_tile,
            "threadIdx.y": t.warps,
            "threadIdx.x": LANES,
        }
        self.sample, group, tile, self.warp, self.lane = (
            stack.enter_context(T.launch_thread(*axis)) for axis in extents.items()
        )
        self.thread = self.warp * LANES + self.lane
        self.first_step, self.first_filter = tile * t.step_tile, group * t.filter_tile
        self.first_row = self.first_step * self.config.strides - self.left
        # Of the warp's tile in the block's.
        self.warp_step = self.warp % t.step_warps * (t.step_tile // t.step_warps)
        self.warp_filter = self.warp // t.step_warps * (t.filter_tile // t.filter_warps)
        self.shared = T.alloc_buffer(
            (p.shared_bytes,), "uint8", scope="shared.dyn", align=128, layout=None
        )
        # Loops are unrolled by nvcc, not by TVM: the text stays short.
        stack.enter_context(T.attr(tirx.IntImm("int32", 0), "pragma_unroll_explicit", 0))

    @contextmanager
    def shared_out(self, count: int, at_once: int) -> Iterator[PrimExpr]:
        """Give items 0 … count - 1 to the block's threads, neighbours to neighbours.

        A thread's turns are unrolled `at_once`.
        """
        threads = self.tiling.warps * LANES
        turns = -(-count // threads)
        some = min(turns, at_once)
        with ExitStack() as stack:
            turn = stack.enter_context(T.serial(0, -(-turns // some), annotations=_ROLLED))
            turn = turn * some + stack.enter_context(T.unroll(0, some))
            item = turn * threads + self.thread
            even = count == -(-turns // some) * some * threads
            stack.enter_context(where(True if even else item < count))
            yield item

    def inside(self, row: PrimExpr, channel: Index) -> PrimExpr:
        """Whether an element lies in the input."""
        inside = tirx.all(row >= 0, row < self.steps)
        if self.config.channels % self.tiling.channel_tile:
            inside = tirx.all(inside, channel < self.config.channels)
        return inside

    def source(self, row: PrimExpr, channel: Index) -> PrimExpr:
        """The address of an element of the sample."""
        row_, column = (row, channel) if self.last else (channel, row)
        return tirx.address_of(self.x[self.sample, row_, column])

    # --- Copies ------------------------------------------------------------------------------

    def stage_input(self, chunk: Index) -> None:
        """Copy a chunk's input rows with their halo to shared memory, zeros outside the input."""
        p, t = self.plan, self.tiling
        if not t.stage_input:
            return
        start = p.input_offset + chunk % t.buffers * p.input_bytes
        (self._stage_rows if self.last else self._stage_lines)(chunk * t.channel_tile, start)

    def _stage_rows(self, first_channel: Index, start: Index) -> None:
        p, t = self.plan, self.tiling
        width = 16 // self.size if self.aligned else 1
        vectors = t.channel_tile // width
        with self.shared_out(p.rows * vectors, _AT_ONCE) as item:
            row, place = item // vectors, item % vectors * width
            source_row, channel = self.first_row + row, first_channel + place
            inside, address = self.inside(source_row, channel), self.source(source_row, channel)
            to = (self.shared, start + row * p.input_pitch + place * self.size)
            if self.aligned:
                call("sepconv_copy_async_16", *to, address, inside)
            elif self.size == 4:
                call("sepconv_copy_async_4", *to, address, tirx.if_then_else(inside, 4, 0))
            else:
                call("sepconv_copy", *to, address, inside)

    def early(self) -> Index:
        """Steps that a channels_first copy starts early, so that pairs of them are aligned."""
        return tirx.floormod(self.first_row, 2) if self.in_pairs else 0

    def _stage_lines(self, first_channel: Index, start: Index) -> None:
        # A warp takes a channel: nothing is divided by the odd length of a line.
        p, t = self.plan, self.tiling
        width = 2 if self.in_pairs else 1
        moves = -(-p.rows // width) + (width - 1)
        turns, rounds = -(-t.channel_tile // t.warps), -(-moves // LANES)
        with T.serial(0, turns) as turn, T.serial(0, rounds) as around:
            line, move = turn * t.warps + self.warp, around * LANES + self.lane
            uneven = (t.channel_tile % t.warps, moves % LANES)
            with where(
                line < t.channel_tile if uneven[0] else True, move < moves if uneven[1] else True
            ):
                self._copy_step(first_channel + line, start + line * p.input_pitch, move * width)

    def _copy_step(self, channel: Index, start: Index, time: PrimExpr) -> None:
        row = self.first_row - self.early() + time
        inside, address = self.inside(row, channel), self.source(row, channel)
        to = (self.shared, start + time * self.size)
        if self.size == 2 and not self.in_pairs:
            call("sepconv_copy", *to, address, inside)
            return
        # A pair may be the last step and one beyond it, which must not come in.
        count = tirx.min((self.steps - row) * self.size, 4) if self.in_pairs else 4
        call("sepconv_copy_async_4", *to, address, tirx.if_then_else(inside, count, 0))

    def stage_weights(self, i: Index) -> None:
        """Copy the pointwise weights of round `i` to shared memory, filters contiguous."""
        p, t, m = self.plan, self.tiling, self.config.depth_multiplier
        width = 16 // self.size
        vectors = t.filter_tile // width
        with self.shared_out(t.channel_tile * vectors, _AT_ONCE) as item:
            row, place = item // vectors, item % vectors * width
            channel, filter_ = i // m * t.channel_tile + row, self.first_filter + place
            inside = tirx.const(True, "bool")
            if p.channels % t.channel_tile:
                inside = channel < p.channels
            if p.filters % t.filter_tile:
                inside = tirx.all(inside, filter_ < p.filters)
            panel, lane = tirx.floordiv(filter_, LANES), tirx.floormod(filter_, LANES)
            address = tirx.address_of(self.pointwise[panel, i % m * p.channels + channel, lane])
            start = p.weights_offset + i % t.buffers * p.weights_bytes
            offset = start + row * p.weights_pitch + place * self.size
            call("sepconv_copy_async_16", self.shared, offset, address, inside)
