"""Modelled cycles: what an ARM core would take for a library, without a board.

QEMU runs the library and a plugin of ours counts how often each block of instructions ran; llvm-mca
says how many cycles a block takes on a core. Modelled cycles are the sum of blocks' executions
times llvm-mca's total cycles for 100 iterations over 100. There is no cache in it, no memory, no
prefetcher and no second thread, so they rank kernels of one core and are no time.
"""
