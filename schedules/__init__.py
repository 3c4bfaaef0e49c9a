"""Schedules, one file a processor family; installed as ``tvm_sepconv.compiler.schedules``."""
