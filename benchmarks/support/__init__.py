"""What the benchmarks share: cases, checks of answers, timing, memory, tables."""
