"""One module for each command of ``python -m lzero_kvcache``: its options, and a call. The work is done elsewhere."""
