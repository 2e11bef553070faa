"""Side-by-side measurements, one claim a file: `python -m benchmarks.NAME [--quick] [--json FILE]`."""
