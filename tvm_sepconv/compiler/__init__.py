"""The parts that need TVM: compute, schedules, tuning, building and linking."""
