"""
What a person types, turned into a call, and errors turned into lines and exit codes. This room knows the functions
of training and comparison, and must not know how anything is done. The options are in ``lzero_kvcache_options``.
"""
