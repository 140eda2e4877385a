"""Data in files that are read block by block: Parquet, tar archives, JSON lines, MDS."""
