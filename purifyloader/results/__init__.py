"""Results on disk: an output folder, rows of JSON lines, tables and figures."""
