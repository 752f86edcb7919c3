"""Files, hardware, processes, statistics, text tables."""
