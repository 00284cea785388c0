"""How the decoder's operations are spelt for a runtime; one file per dialect."""
