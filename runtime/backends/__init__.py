"""One file per backend; ``flabc.runtime.backend.BACKENDS`` lists them."""
