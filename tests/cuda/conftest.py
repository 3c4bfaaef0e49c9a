"""GPUs that are not there, for whatever needs some."""

from gpu_machine import emulated_gpus, gpus  # noqa: F401  # fixtures
