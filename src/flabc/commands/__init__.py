"""Commands that have a module of their own; ``flabc.cli`` lists them."""
