"""Statistics, reports and the scripts behind every figure in the README."""
