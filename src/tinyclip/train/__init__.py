"""A recipe carried out: `setup` checks it and opens the run's folder, `loop` goes through stages and steps, `step` is
one step, `resume` saves and restores it, `pruner` learns masks on the way.

Imports everything below but export. Begin with `loop`."""
