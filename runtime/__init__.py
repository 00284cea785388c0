"""Everything that runs an engine: sessions, generation, evaluation, measuring.

Imports, starts and serves without torch or transformers; only the torch backend, the dense reference, imports them.
"""
