"""One file per task that generates; ``flabc.runtime.evaluate.task.TASKS`` lists them."""
