"""Tuning logs as data, ``<target>.jsonl``; installed as ``tvm_sepconv.compiler.tuning_logs``."""
