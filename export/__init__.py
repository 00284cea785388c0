"""Everything that turns a checkpoint into an engine folder: graph, weights, proof."""
