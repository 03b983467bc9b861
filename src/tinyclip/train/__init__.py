"""Training: runs a recipe, stage by stage.

`setup` checks the recipe and opens the run's folder, `loop` runs the stages and their steps, `step` is one optimizer
step, `student` is the module it trains, `pruner` learns masks, `resume` saves and restores checkpoints, `tracking`
feeds TensorBoard and the like. Without training: `plan` estimates a run's cost, `smoke` is a dry run.

May import: teachers, loading and below. Start with `loop`."""
