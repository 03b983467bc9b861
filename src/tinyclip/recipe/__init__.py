"""Recipes: a training run as data, read from YAML and validated.

`recipe` is the whole run, `stage` one stage with its losses and optimizer, `student_shape` the student's shape
relative to its teacher, `overrides` the `--set key=value` options.

May import: inputs, model, loss and common. Start with `recipe`."""
