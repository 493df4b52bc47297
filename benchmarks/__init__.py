"""Measurements, each beside what the machine could do at best, in one run.

- `python -m benchmarks [OP]`: every C kernel and operation against bandwidth and peak
- `python -m benchmarks peers [PART]`: layers and functions against torch and bitsandbytes
- `python -m benchmarks.quantize_checkpoint`: the checkpoint tool against reading and writing the files
"""
