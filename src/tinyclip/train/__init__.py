"""Training: a recipe carried out, stage by stage.

`setup` checks the recipe and opens the run's folder, `loop` runs stages and steps, `step` is one optimizer step,
`student` the module it trains, `pruner` learns masks, `resume` saves and restores.

May import: everything below except export. Start with `loop`."""
