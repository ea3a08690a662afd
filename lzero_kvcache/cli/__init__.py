"""
Turns command lines into calls, and errors into lines and exit codes.

Knows the functions of training, info and comparison, and the options in ``lzero_kvcache_options``. Must not know how
anything is done.
"""
